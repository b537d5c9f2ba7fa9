"""Calls that outlive what breaks on the way: the same call again, the same turn from its last event on."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Protocol, TypeVar

import grpc

from moltbot.channel import Link, Ways
from moltbot.errors import MoltBotClientError, from_status
from moltbot.patience import FIRST_CONTACT, PATIENCE, Budget, Patience
from moltbot.v1 import chat_pb2

_Answer = TypeVar("_Answer")
Method = Callable[[Link], Callable[..., Awaitable[_Answer]]]
"""Finds a method among the stubs of a link."""
_TURNS = "/turns/"
Metadata = tuple[tuple[str, str], ...]
_EVENTS = (chat_pb2.StreamTurnResponse, chat_pb2.ResumeTurnResponse)  # what a stream yields before its end


class _EventStream(Protocol):
    async def read(self) -> Any: ...

    def cancel(self) -> bool: ...


class Calls:
    """Makes calls on the ways to a core, and makes them again where that is safe and of use."""

    def __init__(
        self,
        ways: Ways,
        *,
        patience: float = PATIENCE,
        first_contact: float = FIRST_CONTACT,
        resume: bool = True,
        on_repeat: Callable[[str], None] | None = None,
    ) -> None:
        """`patience` is in seconds without any progress, `first_contact` as much before a core has ever answered.

        `on_repeat` hears `call`, `start`, `resume` or `receive` at each repeat. Without `resume` nothing is made again,
        and what breaks is told.
        """
        self.ways = ways
        self._limit = patience
        self._first = first_contact
        self._resume = resume
        self._on_repeat = on_repeat or _nobody_listens
        self._budget = Budget()

    async def unary(
        self,
        method: Method[_Answer],
        request: Any,
        metadata: Metadata,
        *,
        within: float | None = None,
        safe: bool = True,
        kind: str = "call",
    ) -> _Answer:
        """Return the answer of a unary method; one that is not `safe` to repeat is made once.

        Raises:
            MoltBotClientError: the core refused, or nothing led to it for too long.
        """
        patience = self.patience(within, safe=safe)
        while True:
            link = self.ways.pick(_session_of(request))
            try:
                answer = await method(link)(request, timeout=patience.left(), metadata=metadata)
            except grpc.aio.AioRpcError as error:
                failure = from_status(error, link.address)
            else:
                patience.progress()
                return answer
            await self.pause(patience, failure, link, kind)

    async def follow(
        self,
        turn: chat_pb2.TurnInput | None,
        name: str,
        last: int,
        metadata: Metadata,
        *,
        within: float | None = None,
    ) -> AsyncGenerator[chat_pb2.Event, None]:
        """Yield the events of a turn: of the one that `turn` starts, or of `name` after the sequence number `last`.

        `turn.request_id` must be set. Each event comes once and in order, through whatever breaks.

        Raises:
            MoltBotClientError: the core refused, or nothing led to it for too long.
        """
        patience = self.patience(within)
        starting = turn is not None
        while True:
            link = self.ways.pick(name.partition(_TURNS)[0] if name or turn is None else turn.session)
            call = _open(link, turn, name, last, metadata, patience.left())
            try:
                # read() and not `async for`: one generator less for each event.
                while isinstance(response := await call.read(), _EVENTS):
                    event = response.event
                    patience.progress()
                    if event.sequence <= last:
                        continue
                    first, last = last == 0, event.sequence
                    if event.HasField("accepted"):
                        name = event.accepted.turn
                        if not first:
                            continue  # a core that carries the turn on says again what was said
                    yield event
                return
            except grpc.aio.AioRpcError as error:
                failure = from_status(error, link.address)
            finally:
                call.cancel()
            if failure.reason == "TURN_NOT_FOUND" and starting and name:
                raise _interrupted()
            await self.pause(patience, failure, link, "resume" if name else "start")

    def patience(self, within: float | None = None, *, safe: bool = True) -> Patience:
        """Return what a call has left that begins now."""
        return Patience(self.ways, self._budget, limit=self._limit, first=self._first, within=within, safe=safe)

    async def pause(self, patience: Patience, failure: MoltBotClientError, link: Link, kind: str) -> None:
        """Wait until a call that failed is to be made again.

        Raises:
            MoltBotClientError: `failure`, where that would be in vain.
        """
        if not self._resume:
            raise failure
        await patience.pause(failure, link)
        self._on_repeat(kind)


def _session_of(request: Any) -> str:
    """Return the session that a request is about, `sessions/{session}`; empty for none, or a new one."""
    if isinstance(request, chat_pb2.RunTurnRequest):
        return request.turn.session
    name: str = getattr(request, "name", "") or getattr(request, "parent", "")
    return name.partition(_TURNS)[0] if name.startswith("sessions/") else ""


def _open(
    link: Link, turn: chat_pb2.TurnInput | None, name: str, last: int, metadata: Metadata, within: float | None
) -> _EventStream:
    call: _EventStream
    if turn is not None and not name:
        call = link.chat.StreamTurn(chat_pb2.StreamTurnRequest(turn=turn), timeout=within, metadata=metadata)
    else:
        request = chat_pb2.ResumeTurnRequest(name=name, after_sequence=last)
        call = link.chat.ResumeTurn(request, timeout=within, metadata=metadata)
    return call


def _interrupted() -> MoltBotClientError:
    return MoltBotClientError(
        grpc.StatusCode.UNAVAILABLE,
        "the core restarted while the turn ran; say it again",
        reason="TURN_INTERRUPTED",
        retryable=True,
    )


def _nobody_listens(kind: str) -> None:
    """Stand in for who would hear of repeats."""
