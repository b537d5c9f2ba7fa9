"""The core's side of the engine role: models that another process serves, on this machine or on others.

An `EngineLink` is the connection to an address, which may stand for several machines; a `RemoteEngine` is one model
behind it. What has not begun to stream when the connection breaks is asked again, unseen, until `PATIENCE` is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from weakref import WeakSet

import grpc
from grpc import aio
from moltbot.v1 import inference_pb2, inference_pb2_grpc, model_pb2, model_pb2_grpc

from moltbot_server import tasks
from moltbot_server.config import is_loopback
from moltbot_server.errors import (
    ModelExists,
    ModelNotFound,
    ModelNotLoadable,
    ModelUnavailable,
    MoltBotError,
    QueueFull,
)
from moltbot_server.models.engine import NOBODY, Asker, Embedded, Engine, Generation, Listener
from moltbot_server.models.limits import check_options
from moltbot_server.models.manager import ModelSpec, Progress
from moltbot_server.rpc import remote_convert
from moltbot_server.rpc.engine_stream import EngineStream
from moltbot_server.rpc.peer_trust import distrust_of_engine
from moltbot_server.rpc.remote_errors import error_of
from moltbot_server.rpc.remote_generation import PATIENCE, RemoteGeneration
from moltbot_server.turns import GenerationOptions, Message

log = logging.getLogger(__name__)

_FLUSH = 0.02
_LONGEST_EMBEDDING = 60.0
_CALM = 1.0  # seconds without a refusal after which a flood is over
_MANY = 1024
_SOON = 3.0  # seconds that an engine on this machine takes at most to start
_TELLS_WITHIN = 1.0  # seconds; why there is no connection is known here
_LOOK_AGAIN = 5.0  # seconds
_LONGEST_TOKEN = 12  # characters; a guess on the safe side, the engine counts exactly
_SERVICE_CONFIG = json.dumps({"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": ""}})
_OPTIONS = (
    ("grpc.service_config", _SERVICE_CONFIG),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.enable_retries", 0),  # who asks again, and when, is decided here
)


class EngineLink:
    """A connection to the engine role at an address: `unix:PATH`, `HOST:PORT` or `dns:///HOST:PORT`."""

    def __init__(self, address: str, key: str, *, ca: Path | None = None, own: bool = False) -> None:
        """`key` opens the engine. Beyond this machine the connection is encrypted.

        `ca` holds the certificates that the engine's own is proved by; without it the system's do. `own` tells that it
        is the engine of this workspace, which `moltbot start` starts beside the core.
        """
        self.address = address
        self._own = own
        self._has_ca = ca is not None
        self._metadata = (("authorization", f"Bearer {key}"),)
        self._channel = _channel(address, ca)
        self.inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        # A name may stand for several engines, between which gRPC spreads calls.
        one = address.startswith("unix:") or is_loopback(_host(address))
        self.stream = EngineStream(self.inference, self._metadata) if one else None
        """All answers on one stream; None where each has a call of its own."""
        self._models = model_pb2_grpc.ModelServiceStub(self._channel)
        self._watch: asyncio.Task[None] | None = None
        self._lost_at = 0.0
        self._engines: dict[str, RemoteEngine] = {}
        self._known: WeakSet[RemoteEngine] = WeakSet()
        self._looking: asyncio.Task[None] | None = None

    def knows(self, engine: RemoteEngine) -> None:
        """Take note of a model over there, of which it is told how it is."""
        self._known.add(engine)

    def look(self) -> None:
        """See how the models over there are, and again until all are well."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())

    async def _look(self) -> None:
        while True:
            try:
                found = {model.name: model for model in await self.models()}
            except MoltBotError as problem:
                log.debug("the engine does not tell how its models are", extra={"problem": problem.message})
            else:
                for engine in self._known:
                    engine.is_as(found.get(f"models/{engine.id}"))
            if not any(engine.trouble for engine in self._known):
                return
            await asyncio.sleep(_LOOK_AGAIN)

    @property
    def lost_for(self) -> float:
        """Seconds since the connection was lost; 0 while there is one."""
        return time.monotonic() - self._lost_at if self._lost_at else 0.0

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call carries."""
        return self._metadata

    async def open(self, within: float) -> None:
        """Connect, and keep watch over the connection from then on.

        Raises:
            ModelUnavailable: nothing that serves models answered within `within` seconds.
        """
        try:
            async with asyncio.timeout(within):
                if not await self.ready(asyncio.get_running_loop().time() + _SOON):
                    await self._say_waiting()
                await self._channel.channel_ready()
        except TimeoutError:
            if why := await self._distrusted():
                raise ModelUnavailable(f"The engine at {self.address} is there and not trusted: {why}.") from None
            advice = (
                "its log says why; where no `moltbot start` runs it, start it with `moltbot engine`."
                if self._own
                else "start it with `moltbot engine`, or correct `engine` in the configuration."
            )
            raise ModelUnavailable(
                f"The engine at {self.address} did not answer within {within:g} s; {advice}"
            ) from None
        self._watch = asyncio.create_task(self._keep_watch())

    async def _say_waiting(self) -> None:
        why = await self._distrusted()
        if self._channel.get_state() is grpc.ChannelConnectivity.READY:
            return
        fields = {"address": self.address, "for_seconds": int(_SOON)}
        if self._own:
            log.info("this workspace's engine does not answer yet: it may still be starting", extra=fields)
        elif why:
            log.warning("the engine is there and not trusted", extra=fields | {"problem": why})
        else:
            text = "the engine cannot be reached yet: start `moltbot engine` there, or correct `engine` here"
            log.warning(text, extra=fields)

    async def _distrusted(self) -> str:
        """Return why the engine is not trusted and what to do; empty where it is, or is not there at all."""
        try:
            await self._models.ListModels(model_pb2.ListModelsRequest(), metadata=self._metadata, timeout=_TELLS_WITHIN)
        except aio.AioRpcError as problem:
            return distrust_of_engine(problem, named=self._has_ca)
        return ""

    def wrong_key(self) -> ModelUnavailable:
        """Return what is told when the engine does not let this core in."""
        return ModelUnavailable(
            f"The engine at {self.address} does not know this core's key: start all of MoltBot again if the key was "
            "changed while it ran; an engine elsewhere needs the core's key file in its workspace."
        )

    async def close(self) -> None:
        """Leave; what still waits for an answer is cancelled."""
        for task in (self._watch, self._looking):
            if task is not None:
                await tasks.end(task)
        if self.stream is not None:
            await self.stream.close()
        await self._channel.close()

    async def ready(self, until: float) -> bool:
        """Wait for a connection until a time of the event loop's clock; tell whether there is one."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                await self._channel.channel_ready()
                return True
        return False

    async def models(self) -> list[model_pb2.Model]:
        """Return the models over there, its default one first.

        Raises:
            MoltBotError: the engine cannot be asked.
        """
        try:
            found = await self._models.ListModels(
                model_pb2.ListModelsRequest(page_size=200), metadata=self._metadata, timeout=PATIENCE
            )
        except aio.AioRpcError as problem:
            raise error_of(problem, "the engine") from None
        return list(found.models)

    # --- a `Loader` of models ----------------------------------------------------------------------------------------

    async def load(self, spec: ModelSpec, progress: Progress) -> RemoteEngine:
        """Have a model loaded over there and return it; see `Loader.load`."""
        engine = RemoteEngine(self, await self._load(spec, progress), spec)
        self._engines[engine.id] = engine
        return engine

    async def prefer(self, engine: Engine) -> None:
        """Tell the engine which model answers by default; see `Loader.prefer`."""
        request = model_pb2.SwitchModelRequest(name=f"models/{engine.id}")
        try:
            await self._models.SwitchModel(request, metadata=self._metadata, timeout=PATIENCE)
        except aio.AioRpcError as problem:
            raise error_of(problem, "the engine") from None

    async def unload(self, engine: Engine) -> None:
        """Have a model's memory freed over there; see `Loader.unload`."""
        self._engines.pop(engine.id, None)
        request = model_pb2.UnloadModelRequest(name=f"models/{engine.id}")
        try:
            await self._models.UnloadModel(request, metadata=self._metadata)
        except aio.AioRpcError as problem:
            error = error_of(problem, "the engine")
            if not isinstance(error, ModelNotFound):  # it is gone, which is what was wanted
                raise error from None

    async def restore(self, spec: ModelSpec) -> None:
        """Have a model loaded again that an engine lost when it was started anew.

        Raises:
            MoltBotError: it cannot be loaded any more.
        """
        await self._load(spec, lambda stage, share: None)

    async def _load(self, spec: ModelSpec, progress: Progress) -> model_pb2.Model:
        request = model_pb2.LoadModelRequest(
            name=f"models/{spec.name}", path=spec.path, type=spec.type, context_length=spec.context_length or 0
        )
        try:
            async for step in self._models.LoadModel(request, metadata=self._metadata):
                progress(step.stage, step.progress)
                if step.HasField("model"):
                    return step.model
        except aio.AioRpcError as problem:
            raise error_of(problem, "the engine") from None
        raise ModelNotLoadable("the engine ended the load without a word")

    async def _keep_watch(self) -> None:
        """Note when the connection is lost, and after it came back have loaded again what is missing there."""
        while True:
            state = self._channel.get_state(try_to_connect=True)
            if state is grpc.ChannelConnectivity.READY:
                if self._lost_at:
                    log.info("the engine is back", extra={"seconds": round(self.lost_for, 3)})
                    self._lost_at = 0.0
                    await self._restore_all()
            elif not self._lost_at:
                self._lost_at = time.monotonic()
                log.warning("the engine cannot be reached", extra={"address": self.address})
            await self._channel.wait_for_state_change(state)

    async def _restore_all(self) -> None:
        for engine in tuple(self._engines.values()):
            try:
                if engine.spec is not None:
                    await self.restore(engine.spec)
            except ModelExists:
                continue  # the engine has it by its own configuration
            except MoltBotError as problem:
                log.error("a model is missing", extra={"model": engine.id, "problem": problem.message})


class RemoteEngine:
    """One model that the engine role serves. Everything is counted and cut to the context over there."""

    is_route = False
    is_free = True
    rest = 0.0

    def __init__(
        self, link: EngineLink, model: model_pb2.Model, spec: ModelSpec | None = None, *, queue_limit: int = 256
    ) -> None:
        """`spec` is what it was loaded by, for a model that has to be loaded again after its engine was lost."""
        self._link = link
        self.spec = spec
        self.id = model.name.removeprefix("models/")
        self.display_name = model.display_name
        self.type = model.type
        self.memory_bytes = model.memory_bytes
        self.parallel = model.parallel
        self.capabilities = remote_convert.capabilities(model.capabilities)
        self.overhead = 0  # the engine cuts by itself
        self.under_way = 0
        self._limit = queue_limit
        self._gap = 0.0  # seconds between two answers that end while others wait
        self._last_end = 0.0
        self._refused: dict[str, float] = {}
        self.trouble = ""
        """Why its engine says that it answers nobody."""
        link.knows(self)

    @property
    def greedy(self) -> bool:
        """Whether it says the same to the same question unless it is told to vary: a script may do as it likes."""
        return self.type != "scripted"

    @property
    def healthy(self) -> bool:
        """Whether its engine answers, or has been away for a short while only, and says nothing against it."""
        return self._link.lost_for < PATIENCE and not self.trouble

    def is_as(self, told: model_pb2.Model | None) -> None:
        """Take note of how its engine says that it is; one that is not there is loaded again when it is asked."""
        failed = told is not None and told.state == model_pb2.MODEL_STATE_FAILED
        trouble = (told.state_message or "it failed") if told is not None and failed else ""
        if trouble != self.trouble:
            log.log(
                logging.WARNING if trouble else logging.INFO,
                "a model cannot answer any more" if trouble else "a model answers again",
                extra={"model": self.id, "problem": trouble} if trouble else {"model": self.id},
            )
        self.trouble = trouble

    def failed(self) -> None:
        """Take note that it could not answer, and see whether that is so from now on."""
        self._link.look()

    def _unwell(self) -> ModelUnavailable:
        if self.trouble:
            return ModelUnavailable(f"The model {self.id} cannot answer: {self.trouble}")
        return ModelUnavailable(f"The engine of {self.id} has been away for {self._link.lost_for:.0f} s.")

    async def start(self) -> None:
        """Do nothing: the engine loaded the model and proved it before it told of it."""

    async def close(self) -> None:
        """Do nothing: the model belongs to its engine."""

    def check(self, options: GenerationOptions) -> None:
        """Refuse options that are out of range or that the model would not honour."""
        check_options(options, self.capabilities)

    def count(self, message: Message) -> int:
        """Return the least that a message can take: what is sent too much of a history is cut over there."""
        return len(message.text) // _LONGEST_TOKEN

    async def tokens(self, content: str | Sequence[Message]) -> int:
        """Return how many tokens a text or a conversation takes, counted by the engine."""
        request = inference_pb2.CountTokensRequest(model=f"models/{self.id}")
        if isinstance(content, str):
            request.text = content
        else:
            request.prompt.messages.extend(map(remote_convert.message, content))
        try:
            counted = await self._link.inference.CountTokens(request, metadata=self._link.metadata, timeout=PATIENCE)
        except aio.AioRpcError as problem:
            raise error_of(problem, "the engine") from None
        return int(counted.token_count)

    async def embed(self, texts: Sequence[str]) -> Embedded:
        """Have texts turned into vectors over there; see `Engine.embed`."""
        request = inference_pb2.EmbedRequest(model=f"models/{self.id}", texts=texts)
        try:
            found = await self._link.inference.Embed(request, metadata=self._link.metadata, timeout=_LONGEST_EMBEDDING)
        except aio.AioRpcError as problem:
            raise error_of(problem, "the engine") from None
        return Embedded(
            [each.values for each in found.embeddings], found.token_count, [each.truncated for each in found.embeddings]
        )

    @property
    def numbers(self) -> Mapping[str, float]:
        """Answers asked for and not ended, and how long the engine has been away."""
        return {"answers": self.under_way, "away_seconds": self._link.lost_for}

    def admit(self, asker: Asker) -> None:
        """Refuse what, by the pace of the latest answers, could not begin in time.

        The engine has the last word. But a turn that it refuses was stored before, and whoever floods a core would have
        all of it stored; so a workspace that was refused lately gets in only as much as keeps the engine busy.
        """
        if not self.healthy:
            raise self._unwell()
        ahead = self.under_way - self.parallel
        if ahead < 0 or not self.parallel:
            return
        now = asyncio.get_running_loop().time()
        wait = (ahead + 1) * self._gap
        late = asker.deadline is not None and now + wait > asker.deadline
        flood = ahead >= self.parallel and now - self._refused.get(asker.workspace, -_CALM) < _CALM
        if late or flood or ahead >= self._limit:
            self.was_refused(asker.workspace)
            # A round number, so that a flood of refusals finds its words written already.
            raise QueueFull("Too many answers wait already; come back later.", retry_after=_rounded(wait))

    def was_refused(self, workspace: str) -> None:
        """Take note that too much of a workspace's waits, as this side or the other one has found."""
        if len(self._refused) >= _MANY:
            self._refused.clear()
        self._refused[workspace] = asyncio.get_running_loop().time()

    def begin(
        self, messages: Sequence[Message], options: GenerationOptions, listener: Listener, asker: Asker = NOBODY
    ) -> Generation:
        """Begin the answer to a conversation over there; see `Engine.begin`."""
        if not self.healthy:
            raise self._unwell()
        request = inference_pb2.GenerateRequest(
            model=f"models/{self.id}",
            prompt=inference_pb2.Prompt(messages=map(remote_convert.message, messages), trim=not asker.whole),
            asker=inference_pb2.Asker(workspace=asker.workspace, session=asker.session),
        )
        request.flush_interval.FromNanoseconds(int(_FLUSH * 1e9))
        if options != _NOTHING_ASKED:
            request.options.CopyFrom(remote_convert.options(options))
        return RemoteGeneration(self, self._link, request, listener, asker.deadline)

    def left(self) -> None:
        """Take note that an answer is over, for the pace."""
        now = time.monotonic()
        if self.under_way > self.parallel:
            gap = now - self._last_end
            # An answer that ended before the queue formed tells nothing of the pace.
            if self._last_end and gap < PATIENCE:
                self._gap += 0.05 * (gap - self._gap) if self._gap else gap
        self.under_way -= 1
        self._last_end = now


def _rounded(seconds: float) -> float:
    """Return a wait in steps that grow with it, from 50 ms to 30 s."""
    return min(math.ldexp(0.05, max(0, math.ceil(math.log2(max(seconds, 0.05) / 0.05)))), 30.0)


def _host(address: str) -> str:
    return address.rpartition("/")[2].rpartition(":")[0]


def _channel(address: str, ca: Path | None) -> aio.Channel:
    if address.startswith("unix:") or (is_loopback(_host(address)) and ca is None):
        return aio.insecure_channel(address, options=_OPTIONS)
    roots = ca.read_bytes() if ca is not None else None
    return aio.secure_channel(address, grpc.ssl_channel_credentials(roots), options=_OPTIONS)


_NOTHING_ASKED = GenerationOptions()
