"""InferenceService: the engine role over the core's own models, without sessions."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import msgspec
from moltbot.v1 import inference_pb2, inference_pb2_grpc

from moltbot_server.errors import ContextLengthExceeded, DeadlineExceeded, InvalidField, Unimplemented
from moltbot_server.models.catalog import Catalog
from moltbot_server.models.engine import Chunk, Engine, Finished, stream
from moltbot_server.models.limits import check_content
from moltbot_server.rpc import convert, names
from moltbot_server.rpc.interceptors import Call
from moltbot_server.turns import FinishReason, GenerationOptions, Message, Role, TextPart, Usage

_FLUSH_INTERVAL = 0.02


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Serves generations."""

    def __init__(self, catalog: Catalog, reader: convert.Reader) -> None:
        self._catalog = catalog
        self._reader = reader
        self._under_way: dict[tuple[str, str], _Generation] = {}

    async def Generate(self, request: inference_pb2.GenerateRequest, call: Call) -> None:  # type: ignore[override]
        """Generate an answer and stream it."""
        engine = self._catalog.get(names.read_model(request.model, "model"))
        options = self._reader.options(request.options, "options")
        engine.check(options)
        messages = self._reader.messages(request.prompt.messages, "prompt.messages")
        if not messages or messages[-1].role not in (Role.USER, Role.TOOL):
            raise InvalidField("prompt.messages", "end with the message that is to be answered")
        for index, message in enumerate(messages):
            try:
                check_content(message.parts, engine.capabilities)
            except InvalidField as error:
                raise error.under(f"prompt.messages[{index}]") from None
        interval = _FLUSH_INTERVAL
        if request.HasField("flush_interval"):
            interval = convert.seconds(request.flush_interval, "flush_interval")
        generation = _Generation(call, engine, interval)
        key = (call.principal.workspace, request.request_id)
        if request.request_id:
            if key in self._under_way:
                raise InvalidField("request_id", "a generation of this name is under way")
            self._under_way[key] = generation
        try:
            await generation.run(messages, options)
        except ContextLengthExceeded as error:
            raise error.at("prompt.messages") from None
        finally:
            if self._under_way.get(key) is generation:
                del self._under_way[key]

    async def CountTokens(  # type: ignore[override]
        self, request: inference_pb2.CountTokensRequest, call: Call
    ) -> inference_pb2.CountTokensResponse:
        """Count the tokens of a text or of a conversation."""
        engine = self._catalog.get(names.read_model(request.model, "model"))
        kind = request.WhichOneof("input")
        if kind == "text":
            # The markers of an empty message are what a message takes beyond its text.
            empty = engine.count(Message(role=Role.USER, parts=(TextPart(text=""),)))
            total = engine.count(Message(role=Role.USER, parts=(TextPart(text=request.text),))) - empty
        elif kind == "prompt":
            total = sum(map(engine.count, self._reader.messages(request.prompt.messages, "prompt.messages")))
        else:
            raise InvalidField("input", "set `text` or `prompt`")
        return inference_pb2.CountTokensResponse(token_count=total, model=f"models/{engine.id}")

    async def Abort(self, request: inference_pb2.AbortRequest, call: Call) -> inference_pb2.AbortResponse:  # type: ignore[override]
        """End a generation by its request_id."""
        if not request.request_id:
            raise InvalidField("request_id", "name the generation")
        generation = self._under_way.get((call.principal.workspace, request.request_id))
        if generation is None:
            return inference_pb2.AbortResponse(aborted=False)
        generation.abort()
        return inference_pb2.AbortResponse(aborted=True)

    async def Embed(self, request: inference_pb2.EmbedRequest, call: Call) -> inference_pb2.EmbedResponse:  # type: ignore[override]
        """Refuse: no model here embeds."""
        engine = self._catalog.get(names.read_model(request.model, "model"))
        raise Unimplemented(f"the model {engine.id} writes answers and embeds nothing")


class _Generation:
    """One generation under way: a task reads the engine, the call writes what came, gathered for up to an interval."""

    def __init__(self, call: Call, engine: Engine, interval: float) -> None:
        self._call = call
        self._engine = engine
        self._interval = interval
        self._written = 0
        self._waiting: list[Chunk] = []
        self._more = asyncio.Event()
        self._reading: asyncio.Task[Finished | None] | None = None

    def abort(self) -> None:
        """End the generation now; its last response says that it was cancelled."""
        if self._reading is not None:
            self._reading.cancel()

    async def run(self, messages: tuple[Message, ...], options: GenerationOptions) -> None:
        """Write the answer and its end; however it ends, the engine is free before this returns."""
        self._reading = reading = asyncio.create_task(self._read(messages, options))
        reading.add_done_callback(lambda _: self._more.set())
        try:
            async with asyncio.timeout_at(self._call.deadline()):
                await self._write_pieces(reading)
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed before the answer was complete") from None
        finally:
            reading.cancel()
            await asyncio.wait({reading})
        await self._end(None if reading.cancelled() else reading.result(), sum(map(self._engine.count, messages)))

    async def _read(self, messages: tuple[Message, ...], options: GenerationOptions) -> Finished | None:
        async with aclosing(stream(self._engine, messages, options)) as chunks:
            async for chunk in chunks:
                if isinstance(chunk, Finished):
                    return chunk
                self._waiting.append(chunk)
                self._more.set()
        return None

    async def _write_pieces(self, reading: asyncio.Task[Finished | None]) -> None:
        """Write pieces until the engine has no more: the first at once, the others together."""
        while not reading.done() or self._waiting:
            await self._more.wait()
            if self._written and not reading.done():
                await asyncio.wait({reading}, timeout=self._interval)
            self._more.clear()
            if reading.done():
                self._more.set()
            pieces, self._waiting = self._waiting, []
            for piece in pieces if self._interval <= 0 else _joined(pieces):
                self._written += piece.tokens
                await self._call.context.write(
                    inference_pb2.GenerateResponse(text=piece.text, token_count=piece.tokens)
                )

    async def _end(self, finished: Finished | None, prompt_tokens: int) -> None:
        if finished is None:
            finished = Finished(finish_reason=FinishReason.CANCELLED, usage=Usage(output_tokens=self._written))
        counted = finished.usage
        if not counted.input_tokens:
            counted = msgspec.structs.replace(counted, input_tokens=prompt_tokens)
        await self._call.context.write(
            inference_pb2.GenerateResponse(
                finished=inference_pb2.GenerateFinished(
                    finish_reason=convert.finish_reason(finished.finish_reason),
                    usage=convert.usage(counted),
                    model=f"models/{self._engine.id}",
                    queue=convert.duration(finished.queue),
                    first_token=convert.duration(finished.first_token),
                    generation=convert.duration(finished.generation),
                )
            )
        )


def _joined(pieces: list[Chunk]) -> list[Chunk]:
    if len(pieces) < 2:
        return pieces
    return [Chunk(text="".join(piece.text for piece in pieces), tokens=sum(piece.tokens for piece in pieces))]
