"""InferenceService: the engine role over this process' own models, without sessions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from moltbot.v1 import inference_pb2, inference_pb2_grpc

from moltbot_server.errors import ContextLengthExceeded, DeadlineExceeded, InvalidField, NotServing
from moltbot_server.metrics import Metrics
from moltbot_server.models.catalog import Catalog
from moltbot_server.models.engine import Asker
from moltbot_server.models.limits import check_content
from moltbot_server.rpc import convert, names
from moltbot_server.rpc.generation import Generation
from moltbot_server.rpc.inference_stream import GenerationStream
from moltbot_server.rpc.interceptors import Call
from moltbot_server.turns import Role

_FLUSH_INTERVAL = 0.02
_MOST_TEXTS = 256


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Serves generations."""

    def __init__(self, catalog: Catalog, reader: convert.Reader, metrics: Metrics, *, trusted: bool = False) -> None:
        """`trusted`: whoever has a key here is a core, and is believed whom an answer is for."""
        self._metrics = metrics
        self._catalog = catalog
        self._reader = reader
        self._trusted = trusted
        self._under_way: dict[tuple[str, str], Generation] = {}
        self._streams: set[GenerationStream] = set()
        self._leaving = False

    async def Generate(self, request: inference_pb2.GenerateRequest, call: Call) -> None:  # type: ignore[override]
        """Generate an answer and stream it."""
        wake = asyncio.Event()
        deadline = call.deadline()
        generation, release = self._begin(request, call, deadline, wake.set)
        write = call.context.write
        try:
            async with asyncio.timeout_at(deadline):
                while not generation.is_over:
                    await wake.wait()
                    wake.clear()
                    for response in generation.take():
                        await write(response)
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed before the answer was complete") from None
        finally:
            release()
        if generation.problem is not None:
            raise generation.problem

    async def GenerateMany(  # type: ignore[override]
        self, requests: AsyncIterator[inference_pb2.GenerateManyRequest], call: Call
    ) -> None:
        """Carry many generations on one stream."""
        if self._leaving:
            raise NotServing("the engine is leaving; ask another one", retry_after=1.0)
        stream = GenerationStream(
            call, lambda request, until, wake: self._begin(request, call, until, wake), self._ended
        )
        self._streams.add(stream)
        try:
            await stream.run(requests)
        finally:
            self._streams.discard(stream)

    def _ended(self, status: str, reason: str, seconds: float) -> None:
        """Count a generation of a stream as if it had had a call of its own."""
        if reason:
            self._metrics.errors.add(reason)
        self._metrics.call_ended("InferenceService/Generate", status, seconds)

    def leave(self) -> None:
        """Let streams of many generations end with those that are under way: nobody else would end them."""
        self._leaving = True
        for stream in self._streams:
            stream.leave()

    def _begin(
        self, request: inference_pb2.GenerateRequest, call: Call, deadline: float | None, wake: Callable[[], None]
    ) -> tuple[Generation, Callable[[], None]]:
        """Begin a generation; return it with what lets it go.

        Raises:
            MoltBotError: it does not begin; nothing is held.
        """
        entry = self._catalog.ready(names.read_model(request.model, "model"))
        asker = self._asker(request, call, deadline)
        entry.engine.admit(asker)  # before anything is read: whoever floods is to cost little
        options = self._reader.options(request.options, "options")
        entry.engine.check(options)
        messages = self._reader.messages(request.prompt.messages, "prompt.messages")
        begun = 1 if messages and messages[-1].role is Role.ASSISTANT else 0
        if len(messages) <= begun or messages[-1 - begun].role not in (Role.USER, Role.TOOL):
            raise InvalidField("prompt.messages", "end with the message that is to be answered")
        if begun and not entry.engine.capabilities.continuation:
            text = "end with the message that is to be answered: this model does not go on with an answer"
            raise InvalidField("prompt.messages", text)
        for index, message in enumerate(messages):
            try:
                check_content(message.parts, entry.engine.capabilities)
            except InvalidField as error:
                raise error.under(f"prompt.messages[{index}]") from None
        interval = _FLUSH_INTERVAL
        if request.HasField("flush_interval"):
            interval = convert.seconds(request.flush_interval, "flush_interval", most=convert.LONGEST_FLUSH)
        key = (asker.workspace, request.request_id)
        if request.request_id and key in self._under_way:
            raise InvalidField("request_id", "a generation of this name is under way")
        generation = Generation(entry.hold(), interval, wake)
        if request.request_id:
            self._under_way[key] = generation

        def release() -> None:
            generation.stop()
            entry.release()
            if self._under_way.get(key) is generation:
                del self._under_way[key]

        try:
            generation.begin(messages, options, asker, trim=request.prompt.trim)
        except BaseException as problem:
            release()
            if isinstance(problem, ContextLengthExceeded):
                raise problem.at("prompt.messages") from None
            raise
        return generation, release

    def _asker(self, request: inference_pb2.GenerateRequest, call: Call, deadline: float | None) -> Asker:
        """Return who asks: as a core says, or the workspace of the caller's key."""
        asker = request.asker
        workspace = asker.workspace if self._trusted else call.principal.workspace
        whole = not request.prompt.trim
        return Asker(workspace=workspace, session=asker.session, deadline=deadline, whole=whole)

    async def CountTokens(  # type: ignore[override]
        self, request: inference_pb2.CountTokensRequest, call: Call
    ) -> inference_pb2.CountTokensResponse:
        """Count the tokens of a text or of a conversation."""
        engine = self._catalog.get(names.read_model(request.model, "model"))
        kind = request.WhichOneof("input")
        if kind is None:
            raise InvalidField("input", "set `text` or `prompt`")
        total = await engine.tokens(
            request.text if kind == "text" else self._reader.messages(request.prompt.messages, "prompt.messages")
        )
        return inference_pb2.CountTokensResponse(token_count=total, model=f"models/{engine.id}")

    async def Abort(self, request: inference_pb2.AbortRequest, call: Call) -> inference_pb2.AbortResponse:  # type: ignore[override]
        """End a generation by its request_id."""
        if not request.request_id:
            raise InvalidField("request_id", "name the generation")
        generation = self._named(call.principal.workspace, request.request_id)
        if generation is None:
            return inference_pb2.AbortResponse(aborted=False)
        generation.abort()
        return inference_pb2.AbortResponse(aborted=True)

    def _named(self, workspace: str, request_id: str) -> Generation | None:
        """Return the generation of a name; a core's may be of any workspace, and it says of which only as it begins."""
        if not self._trusted:
            return self._under_way.get((workspace, request_id))
        return next((found for (_, name), found in self._under_way.items() if name == request_id), None)

    async def Embed(self, request: inference_pb2.EmbedRequest, call: Call) -> inference_pb2.EmbedResponse:  # type: ignore[override]
        """Turn texts into vectors."""
        if not request.model:
            raise InvalidField("model", "name a model that embeds: `models/{model}`")
        entry = self._catalog.ready(names.read_model(request.model, "model"))
        if not 1 <= len(request.texts) <= _MOST_TEXTS:
            raise InvalidField("texts", f"send 1 to {_MOST_TEXTS} texts")
        for index, text in enumerate(request.texts):
            if not text or text.isspace():
                raise InvalidField(f"texts[{index}]", "is empty")
        engine = entry.hold()
        try:
            async with asyncio.timeout_at(call.deadline()):
                found = await engine.embed(request.texts)
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed before the texts were embedded") from None
        finally:
            entry.release()
        return inference_pb2.EmbedResponse(
            embeddings=[
                inference_pb2.Embedding(values=vector, truncated=cut)
                for vector, cut in zip(found.vectors, found.truncated, strict=True)
            ],
            model=f"models/{engine.id}",
            token_count=found.tokens,
        )
