"""The chat page, its assets, and signing in and out."""

import hashlib
import mimetypes
import re
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from moltbot_adapters.http.body import read_json, text_field
from moltbot_adapters.http.errors import HttpError
from moltbot_adapters.http.origin import Origin
from moltbot_adapters.http.settings import Settings
from moltbot_adapters.http.signin import COOKIE, COOKIE_LIFE_S, KeyFile, SignIn

STATIC = Path(__file__).parent / "static"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*")
# Not left to the machine's own table of types: a script served as text does not run.
_TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
    ".json": "application/json",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
    ".txt": "text/plain",
    ".md": "text/plain",
    ".webmanifest": "application/manifest+json",
}


@dataclass(frozen=True, slots=True)
class Asset:
    """A file of the page as it was read."""

    stamp: tuple[int, int]
    body: bytes
    etag: str
    kind: str


class Assets:
    """Files of one folder, kept in memory and read again when they change. No name leads out of the folder."""

    def __init__(self, folder: Path = STATIC) -> None:
        self._folder = folder.resolve()
        self._known: dict[str, Asset] = {}

    def get(self, name: str) -> Asset:
        """Returns a file. Raises `HttpError` 404."""
        path = self._folder / name
        if not _NAME.fullmatch(name) or not path.is_file() or self._folder not in path.resolve().parents:
            raise HttpError(404, "not_found", "There is no such file.")
        status = path.stat()
        stamp = (status.st_mtime_ns, status.st_size)
        known = self._known.get(name)
        if known is None or known.stamp != stamp:
            body = path.read_bytes()
            kind = _TYPES.get(path.suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
            known = Asset(stamp, body, hashlib.sha256(body).hexdigest()[:32], kind)
            self._known[name] = known
        return known


class Pages:
    """Handles what a browser opens: the page, its assets, the one-time link, the key form."""

    def __init__(self, assets: Assets, signin: SignIn, key_file: KeyFile, origin: Origin, settings: Settings) -> None:
        self._assets = assets
        self._signin = signin
        self._key_file = key_file
        self._origin = origin
        self._settings = settings

    async def index(self, request: web.Request) -> web.Response:
        """`GET /`: the page; 401 with the same page, which then asks for sign-in, without a good cookie."""
        signed_in = self._signin.user(request.cookies.get(COOKIE)) is not None
        return self._file("index.html", request, status=200 if signed_in else 401)

    async def asset(self, request: web.Request) -> web.Response:
        """`GET /static/{name}`."""
        return self._file(request.match_info["name"], request)

    async def login_link(self, request: web.Request) -> web.Response:
        """`GET /login?code=CODE`: uses up a one-time link and signs the browser in."""
        if "prefetch" in request.headers.get("Sec-Purpose", request.headers.get("Purpose", "")):
            return web.Response(status=503)  # a browser that only guesses: the link is for the person's own click
        if not self._signin.redeem(request.query.get("code", "")):
            return web.Response(status=303, headers={"Location": "/?error=link"})
        response = web.Response(status=303, headers={"Location": "/"})
        self._sign_in(request, response)
        return response

    async def login(self, request: web.Request) -> web.Response:
        """`POST /api/login`: signs in with the workspace key."""
        body = await read_json(request, self._settings)
        if not self._key_file.matches(text_field(body, "key").strip()):
            raise HttpError(401, "invalid_api_key", "The key is not the workspace's.", param="key")
        response = web.Response(status=204)
        self._sign_in(request, response)
        return response

    async def logout(self, request: web.Request) -> web.Response:
        """`POST /api/logout`: takes the cookie away."""
        response = web.Response(status=204)
        response.del_cookie(COOKIE, path="/")
        return response

    def _sign_in(self, request: web.Request, response: web.Response) -> None:
        response.set_cookie(
            COOKIE,
            self._signin.cookie(),
            max_age=COOKIE_LIFE_S,
            path="/",
            httponly=True,
            samesite="Strict",
            secure=self._origin.is_https(request),
        )

    def _file(self, name: str, request: web.Request, status: int = 200) -> web.Response:
        asset = self._assets.get(name)
        headers = {"Cache-Control": "no-cache", "ETag": f'"{asset.etag}"'}
        known = request.headers.get("If-None-Match", "")
        if status == 200 and asset.etag in (tag.strip().removeprefix("W/").strip('"') for tag in known.split(",")):
            return web.Response(status=304, headers=headers)
        text = asset.kind.startswith("text/") or asset.kind.endswith(("json", "xml"))
        return web.Response(
            status=status, body=asset.body, content_type=asset.kind, charset="utf-8" if text else None, headers=headers
        )
