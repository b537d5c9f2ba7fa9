"""Many generations on one stream: what several of them have to say at a moment is one message."""

from __future__ import annotations

import asyncio
import logging
import secrets
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

Begin = Callable[
    [inference_pb2.GenerateRequest, float | None, Callable[[], None]], tuple[Generation, Callable[[], None]]
]
"""Begins a generation until a time of the event loop's clock, which calls when there is something to take of it; what
is returned beside it lets it go."""


class GenerationStream:
    """One `GenerateMany` call."""

    def __init__(self, call: Call, begin: Begin) -> None:
        self._call = call
        self._begin = begin
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
            for numbered in tuple(self._under_way.values()):
                numbered.let_go()
            await tasks.end(reading)

    def leave(self) -> None:
        """Begin no more, and end when all that is under way has ended."""
        self._hears_no_more = True
        self._wake.set()

    # --- from the caller ---------------------------------------------------------------------------------------------

    async def _read(self, requests: AsyncIterator[inference_pb2.GenerateManyRequest]) -> None:
        try:
            async for request in requests:
                for start in request.start:
                    self._start(start)
                for number in request.cancel:
                    if (numbered := self._under_way.pop(number, None)) is not None:
                        numbered.let_go()
                        self._wake.set()  # it may have been the last one
        finally:
            self.leave()

    def _start(self, start: inference_pb2.NumberedGeneration) -> None:
        number = start.number
        try:
            if number <= self._last:
                raise InvalidField("start.number", "use a number above all before it")
            self._last = number
            if self._hears_no_more:
                raise NotServing("the engine is leaving; ask another one", retry_after=1.0)
            if len(self._under_way) >= MOST:
                raise QueueFull(f"{MOST} generations are under way on this stream already", retry_after=1.0)
            within = convert.seconds(start.timeout, "start.timeout") if start.HasField("timeout") else None
            until = None if within is None else asyncio.get_running_loop().time() + within
            numbered = _Numbered(self, number, until)
            numbered.begin(self._begin, start.request)
        except Exception as problem:
            self._refused.append(_failed(number, problem))
            self._wake.set()
        else:
            self._under_way[number] = numbered

    # --- to the caller -----------------------------------------------------------------------------------------------

    def spoke(self, numbered: _Numbered) -> None:
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
                    pieces += numbered.take()
                    if numbered.is_over:
                        del self._under_way[numbered.number]
                        numbered.let_go()
            if pieces:
                await self._call.context.write(inference_pb2.GenerateManyResponse(pieces=pieces))


class _Numbered:
    """One generation of a stream, by its number."""

    def __init__(self, stream: GenerationStream, number: int, until: float | None) -> None:
        self._stream = stream
        self.number = number
        self._until = until
        self._timer: asyncio.TimerHandle | None = None
        self._generation: Generation | None = None
        self._release: Callable[[], None] | None = None

    def begin(self, begin: Begin, request: inference_pb2.GenerateRequest) -> None:
        """Set the engine to work.

        Raises:
            MoltBotError: it does not begin.
        """
        self._generation, self._release = begin(request, self._until, self._woken)
        if self._until is not None:
            self._timer = asyncio.get_running_loop().call_at(self._until, self._expire)

    def _woken(self) -> None:
        self._stream.spoke(self)

    def _expire(self) -> None:
        if self._generation is not None:
            self._generation.ended(DeadlineExceeded("the deadline passed before the answer was complete"))

    @property
    def is_over(self) -> bool:
        """True when all was taken."""
        return self._generation is None or self._generation.is_over

    def take(self) -> list[inference_pb2.NumberedPiece]:
        """Return what is to be sent now."""
        generation = self._generation
        if generation is None:
            return []
        pieces = [inference_pb2.NumberedPiece(number=self.number, response=response) for response in generation.take()]
        if generation.is_over and generation.problem is not None:
            pieces.append(_failed(self.number, generation.problem))
        return pieces

    def let_go(self) -> None:
        """Free the engine, whatever it still has to say."""
        if self._timer is not None:
            self._timer.cancel()
        release, self._release = self._release, None
        if release is not None:
            release()


def _failed(number: int, problem: Exception) -> inference_pb2.NumberedPiece:
    if not isinstance(problem, MoltBotError):
        incident = secrets.token_hex(4)
        log.error("a generation failed", exc_info=problem, extra={"incident": incident})
        problem = InternalError(f"something went wrong (incident {incident})")
    field, text = next(iter(problem.fields.items()), ("", problem.message))
    delay = None if problem.retry_after is None else convert.duration(problem.retry_after)
    failed = inference_pb2.GenerationFailed(
        code=int(problem.status), reason=problem.reason, message=text, retry_delay=delay, field=field
    )
    return inference_pb2.NumberedPiece(number=number, failed=failed)
