"""A hub of models that speaks the layout of Hugging Face: what a repository holds, and its files from any byte on.

The layout is `/api/models/{repository}/revision/{revision}` for the commit and its files,
`/api/models/{repository}/tree/{commit}` where the first names no sizes, and `/{repository}/resolve/{commit}/{file}` for
the bytes, most often by way of a redirect to a store of large files. See https://huggingface.co/docs/hub/api.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import random
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from importlib import metadata
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, unquote, urlsplit

import aiohttp
from yarl import URL

from moltbot_server.config import is_loopback
from moltbot_server.turns import Value

DEFAULT_HUB = "https://huggingface.co"
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
_COMMIT = re.compile(r"[0-9a-f]{40,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")
_LARGEST_ANSWER = 32 << 20
_BUFFER = 256 << 10
_MOST_PAGES = 50
_MOST_HOPS = 5
_LONGEST_ASKED = 120.0  # a hub that wants to be left alone longer is told to the person instead
_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


class HubError(Exception):
    """A hub cannot be used, or what it gives is wrong; the text says what was found and what to do."""


class Unsteady(HubError):
    """A failure that another try may not meet; `retry_after` is in seconds when the hub says so."""

    def __init__(self, text: str, retry_after: float | None = None) -> None:
        super().__init__(text)
        self.retry_after = retry_after


class Patience(Value, frozen=True, kw_only=True):
    """How long a hub is tried. Times in seconds: pauses between tries grow from the first to the longest."""

    tries: int = 8
    first_pause: float = 1.0
    longest_pause: float = 30.0
    connect: float = 20.0
    silence: float = 60.0


class Source(Value, frozen=True, kw_only=True):
    """A repository of a hub at a revision: a branch, a tag or a commit."""

    hub: str
    repository: str
    revision: str = "main"

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}"


class HubFile(Value, frozen=True, kw_only=True):
    """A file of a repository. `size` in bytes; one of the digests is known, or neither where a hub tells none.

    `sha256` is that of the content, as hubs keep for large files; `git_sha1` is git's, of a header and the content.
    """

    path: str
    size: int
    sha256: str = ""
    git_sha1: str = ""


class Listing(Value, frozen=True, kw_only=True):
    """What a repository holds at one commit."""

    source: Source
    commit: str
    files: tuple[HubFile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A file's bytes from `start` on, and the digests that the hub named with them."""

    start: int
    pieces: AsyncIterator[bytes]
    sha256: str
    git_sha1: str


def parse_source(text: str, hub: str, revision: str = "") -> Source:
    """Return the repository that a person named: `org/name`, `org/name@revision`, or the address of its page.

    The address of a page goes before `hub`, and `revision` before what the text says.

    Raises:
        HubError: the text names no repository.
    """
    found, _, at = text.strip().partition("@")
    if "://" in text:
        parts = urlsplit(text.strip())
        hub = f"{parts.scheme}://{parts.netloc}"
        found, _, at = parts.path.strip("/").removeprefix("models/").partition("@")
        head, sign, tail = found.partition("/tree/")
        found, at = (head, unquote(tail)) if sign else (found, at)
    source = Source(hub=str(parse_hub(hub)), repository=found, revision=revision or at or "main")
    if not _REPOSITORY.fullmatch(found) or ".." in found:
        raise HubError(f"{text[:120]!r} is no repository of a hub; name it as org/name or by the address of its page.")
    if not _REVISION.fullmatch(source.revision) or ".." in source.revision:
        raise HubError(f"{source.revision[:120]!r} is no revision; use a branch, a tag or a commit.")
    return source


def parse_hub(text: str) -> URL:
    """Return a hub's address.

    Raises:
        HubError: it is none.
    """
    try:
        url = URL(text.strip().rstrip("/"))
    except ValueError:
        url = URL()
    if url.scheme not in ("http", "https") or not url.host or url.user or url.password or url.query or url.fragment:
        shown = text if "@" not in text else "what was given, with a name or a password in it,"
        raise HubError(f"{shown!r} is no address of a hub; expected one such as {DEFAULT_HUB}.")
    return url


class Backoff:
    """Pauses between tries, longer each time and never in step with others; `reset` begins anew after progress."""

    def __init__(self, patience: Patience, tries: int, note: Callable[[str], None]) -> None:
        self._patience = patience
        self._tries = tries
        self._note = note
        self._tried = 0

    def reset(self) -> None:
        """Take note that something was reached."""
        self._tried = 0

    async def wait(self, problem: Unsteady) -> None:
        """Wait before the next try.

        Raises:
            HubError: it was tried often enough, or the hub asks for more patience than anybody has.
        """
        self._tried += 1
        asked = problem.retry_after or 0.0
        if self._tried >= self._tries or asked > _LONGEST_ASKED:
            wait = f" It asks to be tried again in {asked:.0f} s." if asked else " Try again later."
            raise HubError(f"{problem}{wait}") from None
        grown = min(self._patience.first_pause * 2 ** (self._tried - 1), self._patience.longest_pause)
        pause = max(asked, grown * random.uniform(0.5, 1.0))
        self._note(f"{problem} Trying again in {pause:.0f} s.")
        await asyncio.sleep(pause)


class Hub:
    """A connection to a hub, as an asynchronous context.

    `token` goes to the hub itself and to no other host, whatever it redirects to, and never over a line that others
    could read.
    """

    def __init__(self, address: str, *, token: str = "", patience: Patience | None = None) -> None:
        """Raises HubError when the address is none, or when the token would travel unencrypted."""
        self._base = parse_hub(address)
        self._token = token
        self.patience = patience or Patience()
        if token and self._base.scheme == "http" and not is_loopback(self._base.host or ""):
            raise HubError(f"MOLTBOT_HUB_TOKEN would travel unencrypted to {self.host}: use https, or unset the token.")
        self._session: aiohttp.ClientSession | None = None

    @property
    def host(self) -> str:
        """The hub's host, with its port where that is not the usual one, for messages."""
        return self._base.authority

    async def __aenter__(self) -> Self:
        times = aiohttp.ClientTimeout(connect=self.patience.connect, sock_read=self.patience.silence)
        # `trust_env` is what makes HTTPS_PROXY work; what is in a buffer when a connection breaks is lost with it.
        names = {"User-Agent": f"moltbot/{metadata.version('moltbot')}"}
        self._session = aiohttp.ClientSession(timeout=times, trust_env=True, read_bufsize=_BUFFER, headers=names)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def listing(self, source: Source, note: Callable[[str], None] = lambda text: None) -> Listing:
        """Return what a repository holds at the commit that its revision means now.

        Raises:
            HubError: it is not there, may not be read, or its hub cannot be reached or understood.
        """
        # Nothing was reached yet: a name that is wrong or a cable that is out should be told soon.
        backoff = Backoff(self.patience, self.patience.tries // 2, note)
        while True:
            try:
                return await self._list(source)
            except Unsteady as problem:
                await backoff.wait(problem)

    async def _list(self, source: Source) -> Listing:
        api = f"api/models/{source.repository}"
        answer, _ = await self._json(f"{api}/revision/{quote(source.revision, safe='')}?blobs=true", source)
        said = answer.get("sha") if isinstance(answer, dict) else None
        if not isinstance(answer, dict) or not isinstance(siblings := answer.get("siblings"), list):
            raise HubError(f"{self.host} does not answer as a hub does; is MOLTBOT_HUB right?")
        commit = said if isinstance(said, str) and _COMMIT.fullmatch(said) else source.revision
        files = [_from_sibling(item) for item in siblings]
        if any(file is None for file in files):
            files = [file async for file in self._tree(f"{api}/tree/{quote(commit, safe='')}?recursive=1", source)]
        return Listing(source=source, commit=commit, files=tuple(file for file in files if file is not None))

    async def _tree(self, path: str, source: Source) -> AsyncGenerator[HubFile, None]:
        """Yield the files of the pages of a tree."""
        for _ in range(_MOST_PAGES):
            page, following = await self._json(path, source)
            if not isinstance(page, list):
                raise HubError(f"{self.host} does not list {source} as a hub does; is MOLTBOT_HUB right?")
            for item in page:
                if isinstance(item, dict) and item.get("type") == "file":
                    yield self._from_tree(item)
            if not following:
                return
            path = following
        raise HubError(f"{source} has too many files; this is no repository of one model.")

    def _from_tree(self, item: Mapping[str, Any]) -> HubFile:
        lfs = item.get("lfs")
        large = lfs if isinstance(lfs, dict) else {}
        file = _file(item.get("path"), large.get("size", item.get("size")), large.get("oid"), item.get("oid"))
        if file is None:
            raise HubError(f"{self.host} lists a file without name or size; is MOLTBOT_HUB right?")
        return file

    @asynccontextmanager
    async def open(self, listing: Listing, file: HubFile, start: int = 0) -> AsyncGenerator[Opened, None]:
        """Give a file's bytes from `start` on; where the hub cannot begin there, from the first on.

        Raises:
            Unsteady: the connection broke, now or while pieces were read; worth another try.
            HubError: the hub refuses, or gives something else than it listed.
        """
        path = f"{listing.source.repository}/resolve/{quote(listing.commit, safe='')}/{quote(file.path)}"
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        with self._told():
            response, etag = await self._get(self._url(path), headers)
            if response.status == 416:  # what is here already is of no use there
                response.close()
                del headers["Range"]
                response, etag = await self._get(self._url(path), headers)
            try:
                self._check(response, listing.source, file.path)
                begun = _begun(response, file)
                if begun not in (0, start):
                    raise Unsteady(f"{response.url.host} gave another part of {file.path} than it was asked for.")
                yield Opened(
                    start=begun,
                    pieces=response.content.iter_any(),
                    sha256=etag if _SHA256.fullmatch(etag) else "",
                    git_sha1=etag if _SHA1.fullmatch(etag) else "",
                )
            finally:
                response.close()

    async def _json(self, path: str, source: Source) -> tuple[Any, str]:
        """Return a decoded answer, and the address of its next page if it has one."""
        with self._told():
            response, _ = await self._get(self._url(path), {})
            async with response:
                self._check(response, source)
                try:
                    content = await response.content.readexactly(_LARGEST_ANSWER)
                except asyncio.IncompleteReadError as whole:
                    content = whole.partial
                else:
                    raise HubError(f"{self.host} lists more of {source} than can be one model.")
                link = response.links.get("next")
        following = str(_target(response.url, str(link["url"]))) if link else ""
        try:
            return json.loads(content), following
        except ValueError:
            raise HubError(f"{self.host} does not answer as a hub does; is MOLTBOT_HUB right?") from None

    def _url(self, path: str) -> URL:
        return URL(path if "://" in path else f"{self._base}/{path}", encoded=True)

    async def _get(self, url: URL, headers: Mapping[str, str]) -> tuple[aiohttp.ClientResponse, str]:
        """Follow redirects; return the answer and the digest that the hub itself named on the way, if any."""
        assert self._session is not None, "the hub is an asynchronous context"
        etag = ""
        for _ in range(_MOST_HOPS):
            own = url.origin() == self._base.origin()
            secret = {"Authorization": f"Bearer {self._token}"} if own and self._token else {}
            response = await self._session.get(url, headers={**headers, **secret}, allow_redirects=False)
            if own and not etag:
                told = response.headers.get("X-Linked-Etag", response.headers.get("ETag", ""))
                etag = told.removeprefix("W/").strip('"')
            if response.status not in _REDIRECTS:
                return response, etag
            response.close()
            target = _target(url, response.headers.get("Location", ""))
            if url.scheme == "https" and target.scheme == "http":
                raise HubError(f"{url.host} redirects to {target.host} without encryption, which is not followed.")
            url = target
        raise HubError(f"{self.host} redirects without an end.")

    def _check(self, response: aiohttp.ClientResponse, source: Source, file: str = "") -> None:
        """Turn a status that is no success into its error."""
        status, host = response.status, response.url.host
        elsewhere = response.url.origin() != self._base.origin()
        what = f"{file} of {source}" if file else str(source)
        if status in (200, 206):
            return
        if status in _AGAIN or (status in (401, 403) and elsewhere):  # a signed address that has ended
            raise Unsteady(f"{host} answers {status} for {what}.", _retry_after(response.headers))
        if status in (401, 403):
            page = f"{self._base}/{source.repository}"
            how = "the token may not read it" if self._token else "set MOLTBOT_HUB_TOKEN to a token that may read it"
            raise HubError(
                f"{self.host} does not give {what} ({status}): there is no such repository, or it is private, or its "
                f"terms must be accepted at {page} first; {how}."
            )
        if status == 404:
            raise HubError(f"{self.host} has no {what}; look for it at {self._base}.")
        raise HubError(f"{host} answers {status} for {what}.")

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Say in our words what breaks a connection; addresses are not told whole, they may be signed."""
        try:
            yield
        except aiohttp.ClientConnectorCertificateError as error:
            raise HubError(f"The certificate of {error.host} cannot be trusted: {error.certificate_error}.") from None
        except aiohttp.ClientConnectorError as error:
            why = error.os_error.strerror or "no connection"
            raise Unsteady(
                f"{error.host}:{error.port} cannot be reached ({why}); is this machine online? MOLTBOT_HUB names "
                "another hub, HTTPS_PROXY a proxy."
            ) from None
        except TimeoutError:
            raise Unsteady(f"{self.host} is silent.") from None
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError):
            raise HubError(f"{self.host} redirects to something that is no address.") from None
        except aiohttp.ClientError as error:
            raise Unsteady(f"The connection to {self.host} broke ({type(error).__name__}).") from None


def _target(base: URL, text: str) -> URL:
    """Return where a redirect or a link leads."""
    try:
        target = base.join(URL(text, encoded=True))
        target.origin()
    except ValueError:
        target = URL()
    if target.scheme not in ("http", "https"):
        raise HubError(f"{base.host} leads to something that is no address of the web, which is not followed.")
    return target


def _from_sibling(item: object) -> HubFile | None:
    """Return a file of a repository's page, or None where the hub tells no size with it."""
    if not isinstance(item, dict):
        return None
    lfs = item.get("lfs")
    large = lfs if isinstance(lfs, dict) else {}
    return _file(item.get("rfilename"), large.get("size", item.get("size")), large.get("sha256"), item.get("blobId"))


def _file(path: object, size: object, sha256: object, git_sha1: object) -> HubFile | None:
    if not isinstance(path, str) or not isinstance(size, int) or isinstance(size, bool):
        return None
    large = isinstance(sha256, str) and bool(_SHA256.fullmatch(sha256))
    # The id of a large file in git is that of a pointer to it, not of its content.
    small = not large and isinstance(git_sha1, str) and bool(_SHA1.fullmatch(git_sha1))
    return HubFile(path=path, size=size, sha256=str(sha256) if large else "", git_sha1=str(git_sha1) if small else "")


def _begun(response: aiohttp.ClientResponse, file: HubFile) -> int:
    """Return the first byte of an answer, after a look at what else it says of itself."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise HubError(f"{response.url.host} gives {file.path} in another coding than was asked for.")
    if response.status == 200:
        if response.content_length not in (None, file.size):
            raise Unsteady(
                f"{response.url.host} gives {file.path} with {response.content_length} bytes, not {file.size}."
            )
        return 0
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if match is None or match[2] not in ("*", str(file.size)):
        raise Unsteady(f"{response.url.host} gives a part of {file.path} that does not fit.")
    return int(match[1])


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of a Retry-After header, which is a number or a date."""
    text = headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return float(text)
    try:
        return max(email.utils.parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except ValueError:
        return None
