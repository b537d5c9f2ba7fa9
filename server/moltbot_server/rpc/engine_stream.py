"""The core's side of `GenerateMany`: all that it asks of an engine on one stream, opened anew whenever it ended.

A call of gRPC for each answer would cost core and engine more than what it carries. An engine of an earlier release
does not know the method; and where an address stands for several engines, calls are to be spread between them.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol, TypeAlias

import grpc
from grpc import aio
from moltbot.v1 import inference_pb2, inference_pb2_grpc

from moltbot_server import tasks

log = logging.getLogger(__name__)

_LARGE = 1 << 20
"""Bytes of generations to begin after which a message has enough of them."""

Metadata = tuple[tuple[str, str], ...]
_Call: TypeAlias = "aio.StreamStreamCall[inference_pb2.GenerateManyRequest, inference_pb2.GenerateManyResponse]"


class Hearer(Protocol):
    """Who began a generation."""

    def heard(self, response: inference_pb2.GenerateResponse) -> None:
        """Take what the engine says; the last response carries `finished`."""

    def failed(self, failed: inference_pb2.GenerationFailed) -> None:
        """Take that the engine refused, or broke off."""

    def lost(self, problem: aio.AioRpcError | None) -> None:
        """Take that the stream ended before the answer did; None where the engine ended it well, because it leaves."""


class EngineStream:
    """One stream to one engine."""

    def __init__(self, stub: inference_pb2_grpc.InferenceServiceAsyncStub, metadata: Metadata) -> None:
        """Nothing is opened before the first generation."""
        self._stub = stub
        self._metadata = metadata
        self._hearers: dict[int, Hearer] = {}
        self._number = 0
        self._start: list[inference_pb2.NumberedGeneration] = []
        self._cancel: list[int] = []
        self._wanted = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.is_known = True
        """False once the engine has said that it does not know the method."""

    def begin(self, request: inference_pb2.GenerateRequest, seconds: float | None, hearer: Hearer) -> int:
        """Have a generation begun that may take so many seconds; return its number."""
        self._number += 1
        start = inference_pb2.NumberedGeneration(number=self._number, request=request)
        if seconds is not None:
            start.timeout.FromNanoseconds(int(seconds * 1e9))
        self._start.append(start)
        self._hearers[self._number] = hearer
        self._wanted.set()
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return self._number

    def cancel(self, number: int) -> None:
        """Have a generation ended that nobody wants any more; nothing more is heard of it."""
        if self._hearers.pop(number, None) is not None:
            self._cancel.append(number)
            self._wanted.set()

    async def close(self) -> None:
        """Leave; nothing more is heard."""
        self._hearers.clear()
        task, self._task = self._task, None
        if task is not None:
            await tasks.end(task)

    async def _run(self) -> None:
        """Keep a stream open until it ends, and tell those whose answers had not."""
        call = self._stub.GenerateMany(metadata=self._metadata)
        writing = asyncio.create_task(self._write(call))
        problem: aio.AioRpcError | None = None
        try:
            while isinstance(response := await call.read(), inference_pb2.GenerateManyResponse):
                for piece in response.pieces:
                    self._tell(piece)
        except aio.AioRpcError as ended:
            problem = ended
        except Exception:
            log.exception("what the engine says is not understood")
        finally:
            call.cancel()
            await tasks.end(writing)
        if problem is not None and problem.code() is grpc.StatusCode.UNIMPLEMENTED:
            self.is_known = False
        self._task = None
        self._start.clear()
        self._cancel.clear()
        hearers, self._hearers = self._hearers, {}
        for hearer in hearers.values():
            try:
                hearer.lost(problem)
            except Exception:
                log.exception("a listener failed")

    async def _write(self, call: _Call) -> None:
        while True:
            await self._wanted.wait()
            try:
                while self._start or self._cancel:
                    await call.write(self._next_request())
            except (aio.AioRpcError, aio.UsageError, asyncio.InvalidStateError):
                return  # the stream has ended: who reads from it tells why
            self._wanted.clear()

    def _next_request(self) -> inference_pb2.GenerateManyRequest:
        """Return what is to be begun and ended, as much as makes no message too large."""
        count = size = 0
        while count < len(self._start) and size < _LARGE:
            size += self._start[count].ByteSize()
            count += 1
        start, self._start = self._start[:count], self._start[count:]
        cancel: list[int] = []
        if not self._start:  # nothing is ended before it was begun
            cancel, self._cancel = self._cancel, []
        return inference_pb2.GenerateManyRequest(start=start, cancel=cancel)

    def _tell(self, piece: inference_pb2.NumberedPiece) -> None:
        number = piece.number
        hearer = self._hearers.get(number)
        if hearer is None:
            return  # it was cancelled while this was on its way
        try:
            if piece.HasField("response"):
                if piece.response.HasField("finished"):
                    del self._hearers[number]
                hearer.heard(piece.response)
            else:
                del self._hearers[number]
                hearer.failed(piece.failed)
        except Exception:
            log.exception("a listener failed")
            self.cancel(number)
