"""HTTP adapters as processes that are killed, and people who read Server-Sent Events from them and come back."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import aiohttp
from fault_history import Entry, Fault, Told
from fault_load import Follower
from fault_nodes import Node, Setup
from moltbot_server.workspace import Workspace

_STATUSES = {409: "ABORTED", 429: "RESOURCE_EXHAUSTED"}
_SAYS = ("text_delta", "reset", "completed")


class Adapter(Node):
    """An HTTP adapter in front of a core, on a port of its own that stays the same when it is started again."""

    def __init__(self, setup: Setup, name: str, note: Callable[[Entry], None], *, core: str, proxy: str = "") -> None:
        """`core` is the address that it calls; `proxy` the network of a proxy that it believes."""
        super().__init__(setup, name, note)
        self._core = core
        self._proxy = ("--trusted-proxy", proxy) if proxy else ()

    def command(self) -> list[str]:
        """Return the command that starts it."""
        workspace = Workspace(folder=self.setup.folder)
        return [
            *(sys.executable, "-m", "moltbot_adapters", "http", "--port", str(self.port), "--core", self._core),
            *("--key-file", str(workspace.key_file), "--state", str(workspace.http_state), *self._proxy),
        ]

    async def _watch(self, process: Process) -> None:
        """Serve as soon as somebody listens on its port."""
        while process.returncode is None:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            except OSError:
                await asyncio.sleep(0.05)  # it tells nobody but its log
            else:
                writer.close()
                self._note(Fault(at=time.monotonic(), what="serves", node=self.name))
                self.serving.set()
                return


class HttpLines:
    """The connections of some people to the adapters, at which they are signed in."""

    def __init__(self, adapters: Sequence[Adapter], key: str) -> None:
        self._adapters = adapters
        self._key = key
        self._http: aiohttp.ClientSession | None = None

    async def ask(self, follower: HttpFollower) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """Ask for a turn, or for what comes after the last event of it, at any adapter, rather one that serves."""
        dice = follower.dice
        serving = [adapter for adapter in self._adapters if adapter.serving.is_set()] or self._adapters
        address = f"http://{dice.choice(serving).address}"
        headers = {"X-MoltBot": "1", "Origin": address}
        http = await self._signed_in(address, headers)
        if follower.seen:
            headers["Last-Event-ID"] = str(follower.seen)
        if follower.turn and dice.random() < 0.5:  # as an EventSource does; otherwise as the page does
            return http.get(f"{address}/api/{follower.turn}/events", headers=headers)
        body = {"session": follower.session, "text": follower.question, "request_id": follower.question}
        return http.post(f"{address}/api/turns", json=body, headers=headers)

    async def _signed_in(self, address: str, headers: dict[str, str]) -> aiohttp.ClientSession:
        if self._http is None:
            jar = aiohttp.CookieJar(unsafe=True)  # cookies of an address without a name; it is good at any port
            http = aiohttp.ClientSession(cookie_jar=jar, timeout=aiohttp.ClientTimeout(total=None, sock_connect=5))
            try:
                async with http.post(f"{address}/api/login", json={"key": self._key}, headers=headers) as answer:
                    if answer.status != 204:
                        raise aiohttp.ClientError(f"the sign-in was answered with {answer.status}")
            except BaseException:
                await http.close()
                raise
            if self._http is None:
                self._http = http
            else:
                await http.close()  # another one of these people was sooner
        return self._http

    async def close(self) -> None:
        """Hang up."""
        if self._http is not None:
            await self._http.close()


class HttpFollower(Follower):
    """One reader of one request over HTTP."""

    dice: random.Random
    lines: HttpLines

    async def listen(self, stream: int) -> tuple[str, str]:
        """Hear one stream to its end, and return the status and the reason of its break; empty where it ended well.

        A stream that ends without an end of its turn is one that an adapter could not go on with.
        """
        try:
            async with await self.lines.ask(self) as answer:
                if answer.status != 200:
                    return await _refusal(answer)
                async for entry in _events(stream, answer):
                    self.hear(entry)
        except (aiohttp.ClientError, OSError, TimeoutError):
            return "UNAVAILABLE", ""
        return ("", "") if self.ended else ("UNAVAILABLE", "")


async def _refusal(answer: aiohttp.ClientResponse) -> tuple[str, str]:
    """Return what an answer other than 200 stands for."""
    if answer.status == 204:
        return "", ""
    said = await answer.json()
    status = "UNAVAILABLE" if answer.status >= 500 else _STATUSES.get(answer.status, "INVALID_ARGUMENT")
    code = str(said["error"]["code"])
    return status, "INTERNAL" if code == "internal_error" else code.upper()


async def _events(stream: int, answer: aiohttp.ClientResponse) -> AsyncIterator[Told]:
    """Yield the events of an answer; one counts when its frame is whole."""
    frame: dict[str, str] = {}
    async for line in answer.content:
        name, _, value = line.decode().rstrip("\n").partition(": ")
        if name:
            frame[name] = value
        elif "data" in frame:
            if "id" not in frame:  # why the stream ends: no event of the turn, which goes on after the last of them
                return
            yield _told(stream, frame["event"], json.loads(frame["data"]))
            frame = {}


def _told(stream: int, kind: str, body: dict[str, Any]) -> Told:
    return Told(
        at=time.monotonic(),
        stream=stream,
        sequence=body["sequence"],
        kind=kind,
        turn=f"sessions/{body['session']}/turns/{body['turn']}" if kind == "accepted" else "",
        text=body["text"] if kind in _SAYS else "",
        code=body["reason"] if kind == "failed" else "",
        retryable=kind == "failed" and body["retryable"],
    )
