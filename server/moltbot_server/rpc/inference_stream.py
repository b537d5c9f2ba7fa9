"""Many generations on one stream: what several of them have to say at a moment is one message."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable

from moltbot.v1 import inference_pb2

from moltbot_server import tasks
from moltbot_server.errors import DeadlineExceeded, InternalError, InvalidField, MoltBotError, NotServing, QueueFull
from moltbot_server.rpc import convert
from moltbot_server.rpc.generation import Generation
from moltbot_server.rpc.interceptors import Call

log = logging.getLogger(__name__)

MOST = 4096
"""Generations that a stream may have at a time."""

_MOST_AT_ONCE = 4096
_MOST_UNREAD = 4  # refusals that a caller has not read, of as many as generations may be under way

Begin = Callable[
    [inference_pb2.GenerateRequest, float | None, Callable[[], None]], tuple[Generation, Callable[[], None]]
]
"""Begins a generation until a time of the event loop's clock, which calls when there is something to take of it; what
is returned beside it lets it go."""


Ended = Callable[[str, str, float], None]
"""Hears how a generation ended: its status and, of one that failed, its reason, and after how many seconds."""


_LONGEST = 315_576_000_000  # seconds that a Duration can say


class GenerationStream:
    """One `GenerateMany` call."""

    def __init__(self, call: Call, begin: Begin, ended: Ended) -> None:
        self._call = call
        self._begin = begin
        self._ended = ended
        self._under_way: dict[int, _Numbered] = {}
        self._last = 0
        self._spoke: dict[_Numbered, None] = {}
        self._refused: list[inference_pb2.NumberedPiece] = []
        self._wake = asyncio.Event()
        self._hears_no_more = False

    async def run(self, requests: AsyncIterator[inference_pb2.GenerateManyRequest]) -> None:
        """Carry generations until the caller begins no more and all have ended; however it ends, the engine is free."""
        reading = asyncio.create_task(self._read(requests))
        try:
            await self._write()
            if reading.done():
                reading.result()
        finally:
            while self._under_way:
                self._over(self._under_way.popitem()[1], "CANCELLED")
            await tasks.end(reading)
            if not reading.cancelled():
                reading.exception()  # it was raised above, or the caller is gone and hears of nothing

    def leave(self) -> None:
        """Begin no more, and end when all that is under way has ended."""
        self._hears_no_more = True
        self._wake.set()

    # --- from the caller ---------------------------------------------------------------------------------------------

    async def _read(self, requests: AsyncIterator[inference_pb2.GenerateManyRequest]) -> None:
        try:
            async for request in requests:
                if max(len(request.start), len(request.cancel)) > _MOST_AT_ONCE:
                    raise InvalidField("start", f"begin and cancel at most {_MOST_AT_ONCE} with one message")
                for start in request.start:
                    self._start(start)
                for number in request.cancel:
                    if (numbered := self._under_way.pop(number, None)) is not None:
                        self._over(numbered, "CANCELLED")
                        self._wake.set()  # it may have been the last one
        finally:
            self.leave()

    def _start(self, start: inference_pb2.NumberedGeneration) -> None:
        number, arrived = start.number, time.perf_counter()
        try:
            if number <= self._last:
                raise InvalidField("start.number", "use a number above all before it")
            self._last = number
            if self._hears_no_more:
                raise NotServing("the engine is leaving; ask another one", retry_after=1.0)
            if len(self._under_way) >= MOST:
                raise QueueFull(f"{MOST} generations are under way on this stream already", retry_after=1.0)
            numbered = _Numbered(number, self._until(start))
            numbered.begin(self._begin, start.request, self._speaks)
        except Exception as problem:
            error = _understood(problem)
            if len(self._refused) >= _MOST_UNREAD * MOST:
                raise QueueFull("too many refusals of this stream are not read yet", retry_after=1.0) from None
            self._refused.append(_failed(number, error))
            self._ended(error.status.name, error.reason, time.perf_counter() - arrived)
            self._wake.set()
        else:
            self._under_way[number] = numbered

    def _until(self, start: inference_pb2.NumberedGeneration) -> float | None:
        """Return when a generation is to be over, on the event loop's clock; None for as long as the stream."""
        if not start.HasField("timeout"):
            return None
        within = convert.seconds(start.timeout, "start.timeout", most=_LONGEST)
        return asyncio.get_running_loop().time() + within

    # --- to the caller -----------------------------------------------------------------------------------------------

    def _speaks(self, numbered: _Numbered) -> None:
        """Have what a generation says sent."""
        self._spoke[numbered] = None
        self._wake.set()

    async def _write(self) -> None:
        while self._under_way or self._refused or not self._hears_no_more:
            await self._wake.wait()
            self._wake.clear()
            spoke, self._spoke = self._spoke, {}
            pieces, self._refused = self._refused, []
            for numbered in spoke:
                if self._under_way.get(numbered.number) is numbered:
                    self._take(numbered, pieces)
            if pieces:
                await self._call.context.write(inference_pb2.GenerateManyResponse(pieces=pieces))

    def _take(self, numbered: _Numbered, pieces: list[inference_pb2.NumberedPiece]) -> None:
        """Add what a generation has to say; when that is its end, it is let go."""
        number = numbered.number
        generation = numbered.generation
        pieces += [inference_pb2.NumberedPiece(number=number, response=response) for response in generation.take()]
        if not generation.is_over:
            return
        del self._under_way[number]
        if generation.problem is None:
            self._over(numbered, "OK")
            return
        error = _understood(generation.problem)
        pieces.append(_failed(number, error))
        self._over(numbered, error.status.name, error.reason)

    def _over(self, numbered: _Numbered, status: str, reason: str = "") -> None:
        numbered.let_go()
        self._ended(status, reason, time.perf_counter() - numbered.arrived)


class _Numbered:
    """One generation of a stream, by its number."""

    generation: Generation
    _release: Callable[[], None]

    def __init__(self, number: int, until: float | None) -> None:
        self.number = number
        self.arrived = time.perf_counter()
        self._until = until
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, begin: Begin, request: inference_pb2.GenerateRequest, speaks: Callable[[_Numbered], None]) -> None:
        """Set the engine to work; `speaks` is called when there is something to take of it.

        Raises:
            MoltBotError: it does not begin.
        """
        self.generation, self._release = begin(request, self._until, lambda: speaks(self))
        if self._until is not None:
            late = DeadlineExceeded("the deadline passed before the answer was complete")
            self._timer = asyncio.get_running_loop().call_at(self._until, self.generation.ended, late)

    def let_go(self) -> None:
        """Free the engine, whatever it still has to say; called once."""
        if self._timer is not None:
            self._timer.cancel()
        self._release()


def _understood(problem: Exception) -> MoltBotError:
    """Return an error that can be told; what nobody foresaw is in the log, with a number."""
    if isinstance(problem, MoltBotError):
        return problem
    incident = secrets.token_hex(4)
    log.error("a generation failed", exc_info=problem, extra={"incident": incident})
    return InternalError(f"something went wrong (incident {incident})")


def _failed(number: int, error: MoltBotError) -> inference_pb2.NumberedPiece:
    field, text = next(iter(error.fields.items()), ("", error.message))
    delay = None if error.retry_after is None else convert.duration(error.retry_after)
    failed = inference_pb2.GenerationFailed(
        code=int(error.status), reason=error.reason, message=text, retry_delay=delay, field=field
    )
    return inference_pb2.NumberedPiece(number=number, failed=failed)
