"""A small hub of models on this machine, for tests, demonstrations and rooms without a line to the world.

`python -m moltbot_server.testing_hub FOLDER` serves each `FOLDER/{organisation}/{name}` as a repository in the layout
of Hugging Face. Large files come from a second address, as they do from the large hubs. It can be told to fail in the
ways in which hubs and lines fail.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from aiohttp import web

_LARGE = (".bin", ".safetensors", ".model", ".gguf", ".onnx")
_PIECE = 64 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request as it came: `place` is `api`, `resolve` or `store`."""

    place: str
    path: str
    range: str = ""
    authorization: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A status that a request ends with, and how long the caller is asked to wait, in seconds."""

    status: int
    retry_after: str = ""


@dataclass(slots=True, kw_only=True)
class Faults:
    """What goes wrong; what stands in a list happens once for each entry, in this order."""

    refusals: list[Refusal] = field(default_factory=list)
    """Answers of the store of large files instead of a file."""
    api_refusals: list[Refusal] = field(default_factory=list)
    """Answers of the hub itself instead of a list."""
    cuts: list[int] = field(default_factory=list)
    """After so many bytes of an answer that has more, with a large file, the connection is gone."""
    spoiled: list[str] = field(default_factory=list)
    """Names of files that come with one wrong byte."""
    no_ranges: bool = False
    """Every answer begins at the first byte."""
    no_sizes: bool = False
    """A repository's page names its files without sizes, as some hubs do; their tree must be asked for."""
    stall_after: int | None = None
    """After so many bytes nothing more comes of a large file until `go_on` is set."""
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    redirect: str = ""
    """Large files are said to be here, instead of in the store."""
    names: list[str] = field(default_factory=list)
    """Names of files that every repository claims to hold besides."""


class SmallHub:
    """A hub that serves folders. `asked` is what it was asked for."""

    def __init__(self, folder: Path, *, token: str = "") -> None:
        """With a `token` every request to the hub itself, but none to its store, needs it."""
        self.folder = folder
        self.faults = Faults()
        self.asked: list[Asked] = []
        self.address = ""
        self.store = ""
        self._token = token

    @asynccontextmanager
    async def running(self, port: int = 0) -> AsyncGenerator[SmallHub, None]:
        """Serve on a port of the loopback, any free one by default, until the end of the body."""
        hub, store = web.Application(), web.Application()
        hub.router.add_get("/api/models/{organisation}/{name}/revision/{revision}", self._page)
        hub.router.add_get("/api/models/{organisation}/{name}/tree/{revision}", self._tree)
        hub.router.add_get("/{organisation}/{name}/resolve/{revision}/{file:.+}", self._resolve)
        store.router.add_get("/store/{organisation}/{name}/{file:.+}", self._store)
        async with contextlib.AsyncExitStack() as undo:
            for application, name, wanted in ((hub, "address", port), (store, "store", 0)):
                runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
                await runner.setup()
                undo.push_async_callback(runner.cleanup)
                await web.TCPSite(runner, "127.0.0.1", wanted).start()
                setattr(self, name, f"http://127.0.0.1:{runner.addresses[0][1]}")
            undo.callback(self.faults.go_on.set)
            yield self

    def of(self, place: str) -> list[Asked]:
        """Return what one place was asked for."""
        return [each for each in self.asked if each.place == place]

    async def _page(self, request: web.Request) -> web.StreamResponse:
        repository = self._enter("api", request)
        if self.faults.api_refusals:
            return _refused(self.faults.api_refusals.pop(0))
        siblings = [self._sibling(repository, name) for name in self._names(repository)]
        return web.json_response({"id": request.path, "sha": self._commit(repository), "siblings": siblings})

    async def _tree(self, request: web.Request) -> web.StreamResponse:
        """Answer one page of two files, with a link to the next."""
        repository = self._enter("api", request)
        names, start = self._names(repository), int(request.query.get("cursor", "0"))
        entries = [self._entry(repository, name) for name in names[start : start + 2]]
        headers = {}
        if start + 2 < len(names):
            headers["Link"] = f'<{request.url.update_query(cursor=start + 2)}>; rel="next"'
        return web.json_response(entries, headers=headers)

    async def _resolve(self, request: web.Request) -> web.StreamResponse:
        repository = self._enter("resolve", request)
        name = request.match_info["file"]
        file = repository / name
        if name not in self._names(repository) or not file.is_file():
            raise web.HTTPNotFound
        sha256, sha1 = _digests(file)
        commit = {"X-Repo-Commit": self._commit(repository)}
        if name.endswith(_LARGE):
            path = f"{request.match_info['organisation']}/{request.match_info['name']}/{name}"
            target = self.faults.redirect or f"{self.store}/store/{path}?signed=secret"
            headers = {"Location": target, "X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(file.stat().st_size)}
            return web.Response(status=302, headers=headers | commit)
        return await self._send(request, file, name, {"ETag": f'"{sha1}"'} | commit)

    async def _store(self, request: web.Request) -> web.StreamResponse:
        repository = self._enter("store", request, guarded=False)
        if self.faults.refusals:
            return _refused(self.faults.refusals.pop(0))
        name = request.match_info["file"]
        return await self._send(request, repository / name, name, {})

    def _enter(self, place: str, request: web.Request, *, guarded: bool = True) -> Path:
        """Take note of a request and return its repository."""
        authorization = request.headers.get("Authorization", "")
        self.asked.append(
            Asked(
                place=place,
                path=request.path,
                range=request.headers.get("Range", ""),
                authorization=authorization,
            )
        )
        if guarded and self._token and authorization != f"Bearer {self._token}":
            raise web.HTTPUnauthorized
        repository = self.folder / request.match_info["organisation"] / request.match_info["name"]
        if not repository.is_dir() or not repository.resolve().is_relative_to(self.folder.resolve()):
            raise web.HTTPNotFound
        revision = request.match_info.get("revision", "main")
        if revision not in ("main", self._commit(repository)):
            raise web.HTTPNotFound
        return repository

    async def _send(
        self, request: web.Request, file: Path, name: str, headers: Mapping[str, str]
    ) -> web.StreamResponse:
        content, start = await asyncio.to_thread(file.read_bytes), 0
        size = len(content)
        if name in self.faults.spoiled:
            self.faults.spoiled.remove(name)
            content = content[:-1] + bytes([content[-1] ^ 1])
        asked = request.headers.get("Range", "").removeprefix("bytes=").removesuffix("-")
        if asked and not self.faults.no_ranges:
            start = int(asked)
            if start >= size:
                return web.Response(status=416, headers={"Content-Range": f"bytes */{size}"})
        response = web.StreamResponse(status=206 if start else 200, headers=headers)
        if start:
            response.headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        response.content_length = size - start
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        await self._write(request, response, content[start:], large=name.endswith(_LARGE))
        return response

    async def _write(self, request: web.Request, response: web.StreamResponse, body: bytes, *, large: bool) -> None:
        cut = self.faults.cuts.pop(0) if large and self.faults.cuts and self.faults.cuts[0] < len(body) else None
        stall = self.faults.stall_after if large else None
        end = min((limit for limit in (cut, stall) if limit is not None), default=len(body))
        for at in range(0, min(end, len(body)), _PIECE):
            await response.write(body[at : min(at + _PIECE, end)])
        if cut is not None and request.transport is not None:
            request.transport.close()  # what was written still goes out, and then the line is gone
        elif stall is not None:
            await self.faults.go_on.wait()
            await response.write(body[end:])

    def _names(self, repository: Path) -> list[str]:
        files = (path for path in repository.rglob("*") if path.is_file())
        return sorted([path.relative_to(repository).as_posix() for path in files] + self.faults.names)

    def _commit(self, repository: Path) -> str:
        """Return an id of all that the repository holds."""
        held = [
            (name, _digests(repository / name)) for name in self._names(repository) if name not in self.faults.names
        ]
        return hashlib.sha1(json.dumps(held).encode(), usedforsecurity=False).hexdigest()

    def _sibling(self, repository: Path, name: str) -> dict[str, Any]:
        """Return a file as a repository's page names it."""
        if self.faults.no_sizes:
            return {"rfilename": name}
        entry = self._entry(repository, name)
        pointer = {"sha256": entry["lfs"]["oid"], "size": entry["size"], "pointerSize": 134} if "lfs" in entry else {}
        return {"rfilename": name, "size": entry["size"], "blobId": entry["oid"]} | (
            {"lfs": pointer} if pointer else {}
        )

    def _entry(self, repository: Path, name: str) -> dict[str, Any]:
        """Return a file as a tree names it."""
        if name in self.faults.names:
            return {"type": "file", "path": name, "size": 1, "oid": "0" * 40}
        file = repository / name
        sha256, sha1 = _digests(file)
        size = file.stat().st_size
        if name.endswith(_LARGE):  # its own id in git is that of a pointer
            pointer = {"oid": sha256, "size": size, "pointerSize": 134}
            return {"type": "file", "path": name, "size": size, "oid": "f" * 40, "lfs": pointer}
        return {"type": "file", "path": name, "size": size, "oid": sha1}


def _refused(refusal: Refusal) -> web.Response:
    headers = {"Retry-After": refusal.retry_after} if refusal.retry_after else {}
    return web.Response(status=refusal.status, headers=headers)


def _digests(file: Path) -> tuple[str, str]:
    """Return a file's SHA-256 and its id in git."""
    status = file.stat()
    return _digests_of(file, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _digests_of(file: Path, size: int, changed: int) -> tuple[str, str]:
    content = file.read_bytes()
    sha1 = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return hashlib.sha256(content).hexdigest(), sha1.hexdigest()


async def _serve(folder: Path, port: int) -> None:
    async with SmallHub(folder).running(port) as hub:
        print(json.dumps({"address": hub.address, "folder": str(folder)}), flush=True)
        await asyncio.Event().wait()


def main() -> None:
    """Serve a folder of repositories until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m moltbot_server.testing_hub", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="holds {organisation}/{name}/ with a model's files")
    parser.add_argument("--port", type=int, default=0, help="on 127.0.0.1; default: any free one")
    given = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(given.folder, given.port))


if __name__ == "__main__":
    main()
