"""The connections to one origin: kept while they live, made with a limit on time, through a proxy where one is set."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import socket
import ssl
from collections.abc import Mapping
from functools import lru_cache
from itertools import zip_longest
from typing import Any, NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies_environment

from moltbot_server.config import is_loopback
from moltbot_server.models.providers.connection import Connection

_MOST_IDLE = 256
_LONGEST_IDLE = 50.0  # seconds; many servers and middle boxes forget a quiet line after a minute
_STAGGER = 0.25  # seconds that an address is waited for before the next one of the name is tried beside it (RFC 8305)
_LARGEST_REPLY = 16 << 10


class Unreachable(Exception):
    """There is no connection to be had; the text says why, with no address in it."""


class Origin(NamedTuple):
    """Where a server is: whether encrypted, its host and its port."""

    tls: bool
    host: str
    port: int

    @classmethod
    def of(cls, url: SplitResult) -> Origin:
        """Return the origin of an address with http or https."""
        tls = url.scheme == "https"
        return cls(tls, url.hostname or "", url.port or (443 if tls else 80))


class Pool:
    """The connections to one origin. It belongs to the event loop on which it is used."""

    def __init__(self, origin: Origin, *, tls: ssl.SSLContext | None = None) -> None:
        """`tls` says whom to trust; by default whom this machine trusts."""
        self._origin = origin
        self._tls = tls
        self._proxy = proxy_for(origin)
        self._idle: dict[Connection, float] = {}
        self._all: set[Connection] = set()
        self._closed = False

    def __len__(self) -> int:
        """How many connections there are."""
        return len(self._all)

    def take(self) -> Connection | None:
        """Return a connection that is there already, the one that was used last; None when there is none."""
        while self._idle:
            connection, since = self._idle.popitem()
            if connection.closed or asyncio.get_running_loop().time() - since > _LONGEST_IDLE:
                connection.abort()
                continue
            return connection
        return None

    async def connect(self, within: float) -> Connection:
        """Return a new connection, made within so many seconds.

        Raises:
            Unreachable: there is none to be had.
        """
        try:
            async with asyncio.timeout(within):
                connection = await self._connect()
        except TimeoutError:
            raise Unreachable(f"it could not be reached within {within:g} s") from None
        except ssl.SSLCertVerificationError as error:
            raise Unreachable(f"its certificate is not trusted ({error.verify_message})") from None
        except ssl.SSLError as error:
            raise Unreachable(f"it cannot be spoken to in TLS ({error.reason or 'no reason given'})") from None
        except socket.gaierror:
            raise Unreachable("the name of its host is not known (DNS)") from None
        except OSError as error:
            # The text of a failed connection names the address; that of its number does not.
            why = os.strerror(error.errno) if error.errno else error.strerror or type(error).__name__
            raise Unreachable(f"it cannot be reached ({why})") from None
        if self._closed:
            connection.abort()
            raise Unreachable("the model was taken away")
        self._all.add(connection)
        return connection

    def close(self) -> None:
        """Close all connections; whoever waits for an answer hears that it is lost."""
        self._closed = True
        for connection in tuple(self._all):
            connection.drop("the model was taken away")

    def _free(self, connection: Connection) -> None:
        if self._closed or len(self._idle) >= _MOST_IDLE:
            connection.abort()
        else:
            self._idle[connection] = asyncio.get_running_loop().time()

    def _gone(self, connection: Connection) -> None:
        self._idle.pop(connection, None)
        self._all.discard(connection)

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        origin, proxy = self._origin, self._proxy
        sock = await _dial(Origin.of(proxy) if proxy else origin)
        connection = Connection(self._free, self._gone)
        try:
            if proxy is not None and origin.tls:
                await _tunnel(sock, origin, proxy)
            tls: Any = (self._tls or trusted()) if origin.tls else None
            name = origin.host if tls else None
            await loop.create_connection(lambda: connection, sock=sock, ssl=tls, server_hostname=name)
        except BaseException:
            connection.abort()  # it may be there already when whoever wanted it has left
            sock.close()
            raise
        return connection


@lru_cache(maxsize=1)
def trusted() -> ssl.SSLContext:
    """Return the context of everything that this machine trusts; made once, because reading it takes a while."""
    return ssl.create_default_context()


def proxy_for(origin: Origin, environ: Mapping[str, str] | None = None) -> SplitResult | None:
    """Return the proxy that the environment names for an origin (HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY).

    What is on this machine needs none. Only proxies that speak HTTP are used. `environ` has the names as
    `urllib.request.getproxies` has them: `http`, `https`, `all` and `no`.
    """
    proxies = environ if environ is not None else getproxies_environment()
    named = proxies.get("https" if origin.tls else "http") or proxies.get("all")
    spared = [each.strip().lstrip("*.").lower() for each in proxies.get("no", "").split(",") if each.strip()]
    host = origin.host.lower()
    if not named or is_loopback(host) or any(not each or f".{host}".endswith(f".{each}") for each in spared):
        return None
    address = urlsplit(named if "://" in named else f"http://{named}")
    return address if address.scheme == "http" and address.hostname else None


async def _dial(origin: Origin) -> socket.socket:
    """Return a socket that is connected to one of a name's addresses, whichever answers first."""
    found = await asyncio.get_running_loop().getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
    left = _mixed([(family, address) for family, _, _, _, address in found])
    running: set[asyncio.Task[socket.socket]] = set()
    problem: BaseException | None = None
    try:
        while left or running:
            if left:
                running.add(asyncio.ensure_future(_dial_one(*left.pop(0))))
            done, _ = await asyncio.wait(
                running, timeout=_STAGGER if left else None, return_when=asyncio.FIRST_COMPLETED
            )
            for each in done:
                running.discard(each)
                problem = each.exception()
                if problem is None:
                    return each.result()
        raise problem or OSError(0, "its name has no address")
    finally:
        for each in running:
            each.add_done_callback(_close_late)
            each.cancel()


def _mixed(addresses: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
    """Return addresses with their families in turn, so that a family that does not work here costs one wait."""
    families = list(dict.fromkeys(family for family, _ in addresses))
    groups = [[each for each in dict.fromkeys(addresses) if each[0] == family] for family in families]
    return [each for row in zip_longest(*groups) for each in row if each is not None]


async def _dial_one(family: int, address: Any) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        await asyncio.get_running_loop().sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return sock


def _close_late(task: asyncio.Task[socket.socket]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().close()


async def _tunnel(sock: socket.socket, origin: Origin, proxy: SplitResult) -> None:
    """Have a proxy open a line to an origin; what goes through it is encrypted from end to end."""
    loop = asyncio.get_running_loop()
    host = f"[{origin.host}]" if ":" in origin.host else origin.host
    lines = [f"CONNECT {host}:{origin.port} HTTP/1.1", f"Host: {host}:{origin.port}", *proxy_headers(proxy)]
    await loop.sock_sendall(sock, ("\r\n".join(lines) + "\r\n\r\n").encode())
    reply = b""
    while b"\r\n\r\n" not in reply:
        more = await loop.sock_recv(sock, 1)  # one byte after the head belongs to somebody else already
        reply += more
        if not more or len(reply) > _LARGEST_REPLY:
            raise OSError(0, "the proxy did not answer")
    status = reply.split(b" ", 2)[1:2]
    if status != [b"200"]:
        said = status[0][:3].decode("latin-1") if status else "nothing"
        raise OSError(0, f"the proxy refused with {said}")


def proxy_headers(proxy: SplitResult) -> tuple[str, ...]:
    """Return the header that opens a proxy with the name and the word in its address, if it has any."""
    if proxy.username is None:
        return ()
    word = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}".encode()
    return (f"Proxy-Authorization: Basic {base64.b64encode(word).decode()}",)
