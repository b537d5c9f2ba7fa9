"""An answer that another process writes, and the listener that is told of it."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from grpc import aio
from moltbot.v1 import inference_pb2, inference_pb2_grpc

from moltbot_server.errors import (
    ModelNotFound,
    ModelUnavailable,
    MoltBotError,
    NotServing,
    PermissionDenied,
    QueueFull,
    TurnInterrupted,
    Unauthenticated,
)
from moltbot_server.models.engine import Finished, Listener
from moltbot_server.models.manager import ModelSpec
from moltbot_server.rpc import remote_convert
from moltbot_server.rpc.engine_stream import EngineStream, Metadata
from moltbot_server.rpc.remote_errors import error_in_band, error_of, was_lost

log = logging.getLogger(__name__)

PATIENCE = 10.0
"""How long an engine may be away before those who wait for it are told, in seconds."""

MOST_LOSSES = 5
"""How often an answer may lose its engine before anything of it was told: what it asks may be what ends them."""


class Link(Protocol):
    """The connection to an engine."""

    stream: EngineStream | None
    inference: inference_pb2_grpc.InferenceServiceAsyncStub

    @property
    def metadata(self) -> Metadata:
        """What every call carries."""

    def wrong_key(self) -> ModelUnavailable:
        """Return what is told when the engine does not let this core in."""

    async def ready(self, until: float) -> bool:
        """Wait for a connection until a time of the event loop's clock; tell whether there is one."""

    async def restore(self, spec: ModelSpec) -> None:
        """Have a model loaded again that an engine lost when it was started anew."""


class Asked(Protocol):
    """The model that is asked."""

    id: str
    spec: ModelSpec | None
    under_way: int

    def was_refused(self, workspace: str) -> None:
        """Take note that too much of a workspace's waits."""

    def failed(self) -> None:
        """Take note that the model could not answer, for a reason of its own."""

    def left(self) -> None:
        """Take note that an answer is over."""


class RemoteGeneration:
    """One answer.

    It is one of many on the link's stream. What that cannot have answered has a call of its own, by a task that asks
    again when it is lost before anything was told.
    """

    def __init__(
        self,
        engine: Asked,
        link: Link,
        request: inference_pb2.GenerateRequest,
        listener: Listener,
        deadline: float | None,
    ) -> None:
        self._engine = engine
        self._link = link
        self._request = request
        self._listener = listener
        self._deadline = deadline
        self._spoke = self._over = False
        self._losses = 0
        self._task: asyncio.Task[None] | None = None
        self._number = 0
        engine.under_way += 1
        if link.stream is not None and link.stream.is_known:
            self._number = link.stream.begin(request, self._seconds_left(), self)
        else:
            self._call()

    def stop(self) -> None:
        """Have it stopped over there, within one step of the model."""
        if self._task is not None:
            self._task.cancel()
        elif not self._over and self._link.stream is not None:
            self._link.stream.cancel(self._number)
            self._leave()

    def _seconds_left(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - asyncio.get_running_loop().time())

    def _leave(self) -> None:
        if not self._over:
            self._over = True
            self._engine.left()

    # --- on the stream -----------------------------------------------------------------------------------------------

    def heard(self, response: inference_pb2.GenerateResponse) -> None:
        """Tell the listener what the engine says; the stream calls this."""
        self._pass_on(response)
        if response.HasField("finished"):
            self._leave()
            self._listener.ended(remote_convert.finished(response.finished))

    def _pass_on(self, response: inference_pb2.GenerateResponse) -> None:
        """Tell the listener all but the end."""
        if response.text:
            self._spoke = True
            self._listener.wrote(response.text, response.token_count)
        elif response.reasoning:
            self._spoke = True
            self._listener.thought(response.reasoning)
        elif response.queue_position:
            self._listener.queued(response.queue_position)

    def failed(self, failed: inference_pb2.GenerationFailed) -> None:
        """Tell the listener that the engine refused or broke off, or ask in another way; the stream calls this."""
        error = error_in_band(failed, "the engine")
        if not self._spoke and isinstance(error, NotServing | ModelNotFound):
            self._call()
            return
        if isinstance(error, QueueFull):
            self._engine.was_refused(self._request.asker.workspace)
        self._end_badly(error)

    def _end_badly(self, error: Exception) -> None:
        if isinstance(error, ModelUnavailable):
            self._engine.failed()
        self._leave()
        self._listener.ended(error)

    def lost(self, problem: aio.AioRpcError | None) -> None:
        """Ask again if nothing was told yet; the stream calls this."""
        if self._over:
            return  # another one's loss had it stopped
        if not self._spoke:
            self._losses = int(problem is not None and was_lost(problem))
            self._call()
            return
        self._leave()
        if problem is None or was_lost(problem):
            self._listener.ended(TurnInterrupted("the engine stopped while it wrote this answer"))
        else:
            self._listener.ended(error_of(problem, "the engine"))

    # --- by a call of its own ----------------------------------------------------------------------------------------

    def _call(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._leave()
        if not task.cancelled() and (problem := task.exception()) is not None:
            log.error("a listener failed", exc_info=problem, extra={"model": self._engine.id})

    async def _run(self) -> None:
        try:
            end = await self._answer()
        except (MoltBotError, aio.UsageError) as problem:
            self._end_badly(problem)
            return
        self._leave()
        self._listener.ended(end)

    async def _answer(self) -> Finished:
        """Read one answer to its end; ask again when it was lost before anything of it was told."""
        loop = asyncio.get_running_loop()
        restored = False
        while True:
            begun = loop.time()
            try:
                return await self._read(self._seconds_left())
            except aio.AioRpcError as problem:
                error = error_of(problem, "the engine")
                if isinstance(error, Unauthenticated | PermissionDenied):
                    error = self._link.wrong_key()  # it is the core that was not let in there, not its caller
                if isinstance(error, QueueFull):
                    self._engine.was_refused(self._request.asker.workspace)
                if self._spoke:
                    if was_lost(problem):
                        raise TurnInterrupted("the engine stopped while it wrote this answer") from None
                    raise error from None
                if was_lost(problem):
                    self._losses += 1
                    if self._losses == MOST_LOSSES:
                        raise error from None
                    until = begun + PATIENCE if self._deadline is None else min(begun + PATIENCE, self._deadline)
                    if not await self._link.ready(until):
                        raise error from None
                elif isinstance(error, ModelNotFound) and self._engine.spec is not None and not restored:
                    restored = True
                    await self._link.restore(self._engine.spec)
                else:
                    raise error from None

    async def _read(self, seconds: float | None) -> Finished:
        call = self._link.inference.Generate(self._request, metadata=self._link.metadata, timeout=seconds)
        async for response in call:
            self._pass_on(response)
            if response.HasField("finished"):
                return remote_convert.finished(response.finished)
        raise ModelUnavailable("the engine ended an answer without saying how")
