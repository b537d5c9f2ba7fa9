"""One connection to a provider: a request out, a response in, read as it comes and without a task of its own.

It speaks what a streamed answer needs of HTTP/1.1 and nothing else; docs/decisions/0010-provider-clients.md says why.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, cast

from moltbot_server.models.providers.http_body import LARGEST_HEAD, Body, Head, Malformed, body_of, read_head

_LINGER = 1.0  # seconds in which the rest of a body that nobody wants may come before its connection is closed


class Hearer(Protocol):
    """Who hears a response. No method may raise."""

    def opened(self, head: Head) -> None:
        """Hear of the head."""

    def received(self, data: bytes, last: bool) -> None:
        """Hear more of the body; with `last` it is all, and the connection is not the hearer's any more."""

    def lost(self, problem: str, unheard: bool) -> None:
        """Hear that the connection broke; `unheard` when it had been used before and nothing came back this time."""


class Connection(asyncio.Protocol):
    """A connection that carries one request at a time and is used again after it."""

    __slots__ = ("_body", "_free", "_gone", "_head", "_hearer", "_linger", "_loop", "_rest", "_transport", "uses")

    def __init__(self, free: Callable[[Connection], None], gone: Callable[[Connection], None]) -> None:
        """`free` hears that it can carry another request, `gone` that it cannot any more."""
        self._free = free
        self._gone = gone
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._hearer: Hearer | None = None
        self._head: Head | None = None
        self._body: Body | None = None
        self._rest = b""
        self._linger: asyncio.TimerHandle | None = None
        self.uses = 0

    @property
    def closed(self) -> bool:
        """Whether it can carry nothing any more."""
        return self._transport is None or self._transport.is_closing()

    def ask(self, request: bytes, hearer: Hearer) -> None:
        """Send a request, head and body; the hearer hears the response."""
        self.uses += 1
        self._hearer, self._head, self._body, self._rest = hearer, None, None, b""
        if self._transport is None or self._transport.is_closing():
            self._loop.call_soon(self._lose, "it closed the connection")
        else:
            self._transport.write(request)

    def leave(self) -> None:
        """Hear no more: the rest of the body may still come, for a moment, so that the connection can be kept."""
        self._hearer = None
        if self._linger is None and self._transport is not None:
            self._linger = self._loop.call_later(_LINGER, self.abort)

    def abort(self) -> None:
        """Close at once; the hearer hears no more."""
        self._hearer = None
        if self._transport is not None:
            self._transport.abort()

    def drop(self, problem: str) -> None:
        """Close at once; the hearer hears that its answer is lost."""
        self._lose(problem)

    # --- asyncio.Protocol --------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one without saying so

    def data_received(self, data: bytes) -> None:
        """Read what came, and tell it."""
        body = self._body
        try:
            if body is None:
                if (after := self._read_head(data)) is None:
                    return
                data, body = after, self._body
                assert body is not None
            data = body.feed(data)
        except Malformed as problem:
            self._lose(str(problem))
            return
        if body.done:
            hearer = self._hearer
            self._release()
            if hearer is not None:
                hearer.received(data, True)
        elif data and self._hearer is not None:
            self._hearer.received(data, False)

    def eof_received(self) -> bool:
        """Close this side too."""
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """Tell whoever still waits for something."""
        self._transport = None
        if self._linger is not None:
            self._linger.cancel()
        self._gone(self)
        hearer, body = self._hearer, self._body
        if hearer is None:
            return
        if error is None and body is not None and not body.cut():
            self._hearer = None
            hearer.received(b"", True)
        else:
            self._lose("it closed the connection in the middle of an answer" if body else "it closed the connection")

    # -----------------------------------------------------------------------------------------------------------------

    def _read_head(self, data: bytes) -> bytes | None:
        """Read the head; return what came after it, or None while it is not complete."""
        if self._hearer is None:
            raise Malformed("it spoke without being asked")
        if self._rest:
            data = self._rest + data
        while True:
            head, end, rest = data.partition(b"\r\n\r\n")
            if len(head) > LARGEST_HEAD:
                raise Malformed("its headers are too large")
            if not end:
                self._rest = data
                return None
            self._head = read_head(head)
            if self._head.status < 200:  # a word on the way, such as 103; 101 was not asked for and ends as one
                data = rest
                continue
            self._body, self._rest = body_of(self._head), b""
            self._hearer.opened(self._head)
            return rest

    def _release(self) -> None:
        """Give the connection up for other requests, or close it if the other side will."""
        keeps = self._head is not None and self._head.keeps and not self.closed
        keeps = keeps and self._body is not None and self._body.clean
        self._hearer = self._head = self._body = None
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        if keeps:
            self._free(self)
        elif self._transport is not None:
            self._transport.abort()

    def _lose(self, problem: str) -> None:
        hearer, self._hearer = self._hearer, None
        unheard = self._head is None and not self._rest and self.uses > 1
        if self._transport is not None:
            self._transport.abort()
        if hearer is not None:
            hearer.lost(problem, unheard)
