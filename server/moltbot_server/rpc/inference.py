"""InferenceService: the engine role over the core's own models, without sessions."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing

import msgspec
from moltbot.v1 import inference_pb2, inference_pb2_grpc

from moltbot_server.errors import DeadlineExceeded, InvalidField
from moltbot_server.models.catalog import Catalog
from moltbot_server.models.engine import Chunk, Engine, Finished
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
        for message in messages:
            check_content(message, engine.capabilities)
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
        generation.aborted.set()
        return inference_pb2.AbortResponse(aborted=True)


class _Generation:
    """One generation under way: its pieces are gathered for up to an interval and written in order."""

    def __init__(self, call: Call, engine: Engine, interval: float) -> None:
        self.aborted = asyncio.Event()
        self._call = call
        self._engine = engine
        self._interval = interval
        self._written = 0
        self._waiting: list[Chunk] = []
        self._sent_at = 0.0

    async def run(self, messages: tuple[Message, ...], options: GenerationOptions) -> None:
        """Write the answer and its end."""
        finished: Finished | None = None
        abort = asyncio.create_task(self.aborted.wait())
        try:
            async with (
                asyncio.timeout_at(self._call.deadline()),
                aclosing(self._engine.generate(messages, options)) as chunks,
            ):
                while finished is None:
                    following = asyncio.ensure_future(anext(chunks))
                    await asyncio.wait({following, abort}, return_when=asyncio.FIRST_COMPLETED)
                    if abort.done() and not following.done():
                        following.cancel()
                        await asyncio.wait({following})
                        break
                    chunk = following.result()
                    if isinstance(chunk, Finished):
                        finished = chunk
                    else:
                        await self._say(chunk)
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed before the answer was complete") from None
        finally:
            abort.cancel()
        await self._end(finished, sum(map(self._engine.count, messages)))

    async def _say(self, chunk: Chunk) -> None:
        self._waiting.append(chunk)
        if not self._written or time.monotonic() - self._sent_at >= self._interval:
            await self._flush()

    async def _flush(self) -> None:
        tokens = sum(chunk.tokens for chunk in self._waiting)
        text = "".join(chunk.text for chunk in self._waiting)
        self._waiting.clear()
        self._written += tokens
        self._sent_at = time.monotonic()
        await self._call.context.write(inference_pb2.GenerateResponse(text=text, token_count=tokens))

    async def _end(self, finished: Finished | None, prompt_tokens: int) -> None:
        if self._waiting:
            await self._flush()
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
