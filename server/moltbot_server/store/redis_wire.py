"""The bytes of a connection to Redis that the client library has opened: written at once, and read where they arrive.

The library's own reading and writing are coroutines, which cost each call three more rounds of the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import hiredis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import (
    AuthenticationError,
    InvalidResponse,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as ConnectionLost

_MORE = object()
_KINDS = {
    "NOAUTH": AuthenticationError,
    "WRONGPASS": AuthenticationError,
    "NOPERM": NoPermissionError,
    "NOSCRIPT": NoScriptError,
    "OOM": OutOfMemoryError,
    "READONLY": ReadOnlyError,
}


class Wire(asyncio.Protocol):
    """A connection whose handshake is over, and whose replies were all read."""

    def __init__(
        self,
        connection: AbstractConnection,
        *,
        hear: Callable[[Any], None],
        lost: Callable[[Exception], None],
        room: Callable[[], None],
    ) -> None:
        """Take a connection over.

        `hear` is told each reply, refusals among them as errors; `lost` why it is over; `room` that more can be sent.

        Raises:
            ConnectionError: it is over already.
        """
        self._connection = connection
        self._hear = hear
        self._lost = lost
        self._room = room
        self._replies = hiredis.Reader(protocolError=InvalidResponse, replyError=_refusal, notEnoughData=_MORE)
        self._over = False
        self.is_full = False
        writer = connection._writer
        if writer is None or writer.transport.is_closing():
            raise ConnectionLost("Connection closed by server")
        self._transport = writer.transport
        self._transport.set_protocol(self)

    def write(self, data: Sequence[bytes]) -> None:
        """Send bytes, or keep them until they can be sent: `is_full` tells when that is too much."""
        self._transport.write(b"".join(data))

    async def close(self) -> None:
        """Close the connection; nothing more is heard of it."""
        self._over = True
        await self._connection.disconnect(nowait=True)

    # --- from the event loop ------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Read what has arrived."""
        if self._over:
            return
        try:
            self._replies.feed(data)
            while (reply := self._replies.gets(False)) is not _MORE and not self._over:
                self._hear(reply)
        except Exception as problem:
            self._end(problem)

    def eof_received(self) -> bool:
        """Let the connection be closed: who sends nothing more answers nothing more."""
        return False

    def connection_lost(self, problem: Exception | None) -> None:
        """Tell that the connection is over."""
        self._end(problem or ConnectionLost("Connection closed by server"))

    def pause_writing(self) -> None:
        """Take note that Redis reads too slowly."""
        self.is_full = True

    def resume_writing(self) -> None:
        """Take note that it has read most of it."""
        self.is_full = False
        self._room()

    def _end(self, problem: Exception) -> None:
        if not self._over:
            self._over = True
            self._lost(problem)


def _refusal(text: str) -> RedisError:
    """Return a refusal as an error: of the kinds that are told apart, or any."""
    code, _, rest = text.partition(" ")
    kind = _KINDS.get(code)
    return ResponseError(text) if kind is None else kind(rest)
