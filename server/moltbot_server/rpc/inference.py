"""InferenceService: the engine role over this process' own models, without sessions."""

from __future__ import annotations

import asyncio

import msgspec
from moltbot.v1 import inference_pb2, inference_pb2_grpc

from moltbot_server.errors import ContextLengthExceeded, DeadlineExceeded, InvalidField, TurnInterrupted
from moltbot_server.models.catalog import Catalog
from moltbot_server.models.context import ContextWindow
from moltbot_server.models.engine import Asker, Engine, Finished, Generation
from moltbot_server.models.limits import check_content
from moltbot_server.rpc import convert, names
from moltbot_server.rpc.interceptors import Call
from moltbot_server.turns import (
    FinishReason,
    GenerationOptions,
    Message,
    Notice,
    Reset,
    Role,
    Routed,
    ToolCallPart,
    Usage,
)

_FLUSH_INTERVAL = 0.02
_MOST_TEXTS = 256


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Serves generations."""

    def __init__(self, catalog: Catalog, reader: convert.Reader, *, trusted: bool = False) -> None:
        """`trusted`: whoever has a key here is a core, and is believed whom an answer is for."""
        self._catalog = catalog
        self._reader = reader
        self._trusted = trusted
        self._under_way: dict[tuple[str, str], _Generation] = {}

    async def Generate(self, request: inference_pb2.GenerateRequest, call: Call) -> None:  # type: ignore[override]
        """Generate an answer and stream it."""
        entry = self._catalog.ready(names.read_model(request.model, "model"))
        asker = self._asker(request, call)
        entry.engine.admit(asker)  # before anything is read: whoever floods is to cost little
        options = self._reader.options(request.options, "options")
        entry.engine.check(options)
        messages = self._reader.messages(request.prompt.messages, "prompt.messages")
        if not messages or messages[-1].role not in (Role.USER, Role.TOOL):
            raise InvalidField("prompt.messages", "end with the message that is to be answered")
        for index, message in enumerate(messages):
            try:
                check_content(message.parts, entry.engine.capabilities)
            except InvalidField as error:
                raise error.under(f"prompt.messages[{index}]") from None
        interval = _FLUSH_INTERVAL
        if request.HasField("flush_interval"):
            interval = convert.seconds(request.flush_interval, "flush_interval")
        key = (asker.workspace, request.request_id)
        if request.request_id and key in self._under_way:
            raise InvalidField("request_id", "a generation of this name is under way")
        generation = _Generation(call, entry.hold(), interval)
        if request.request_id:
            self._under_way[key] = generation
        try:
            await generation.run(messages, options, asker, trim=request.prompt.trim)
        except ContextLengthExceeded as error:
            raise error.at("prompt.messages") from None
        finally:
            entry.release()
            if self._under_way.get(key) is generation:
                del self._under_way[key]

    def _asker(self, request: inference_pb2.GenerateRequest, call: Call) -> Asker:
        """Return who asks: as a core says, or the workspace of the caller's key."""
        asker = request.asker
        workspace = asker.workspace if self._trusted else call.principal.workspace
        return Asker(workspace=workspace, session=asker.session, deadline=call.deadline())

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
        generation = self._under_way.get((call.principal.workspace, request.request_id))
        if generation is None:
            return inference_pb2.AbortResponse(aborted=False)
        generation.abort()
        return inference_pb2.AbortResponse(aborted=True)

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


class _Generation:
    """One generation under way: hears what the engine writes, and sends it on, gathered for up to an interval."""

    def __init__(self, call: Call, engine: Engine, interval: float) -> None:
        self._call = call
        self._engine = engine
        self._interval = interval
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._sent_at = 0.0
        self._pieces: list[tuple[str, int]] = []
        self._thoughts: list[str] = []
        self._position = 0
        self._generation: Generation | None = None
        self._trimmed = self._told = 0
        self._end: Finished | Exception | None = None

    # --- from the engine ---------------------------------------------------------------------------------------------

    def queued(self, position: int) -> None:
        """Tell the caller that the answer waits, and where."""
        self._position = position
        self._wake.set()

    def wrote(self, text: str, tokens: int) -> None:
        """Take another piece: the first goes out at once, others wait for their mates."""
        self._pieces.append((text, tokens))
        if self._timer is None and not self._wake.is_set():
            rest = self._sent_at + self._interval - self._loop.time() if self._told else 0.0
            if rest > 0:
                self._timer = self._loop.call_later(rest, self._wake.set)
            else:
                self._wake.set()

    def thought(self, text: str) -> None:
        """Take more of what the model thinks."""
        self._thoughts.append(text)
        self._wake.set()

    def noted(self, what: Routed | Notice | Reset) -> None:
        """Drop what is void, if it was not sent yet; if it was, it cannot be taken back, and the answer ends."""
        if isinstance(what, Reset):
            if self._told:
                self.ended(TurnInterrupted("the model broke off and another one would begin anew; ask again"))
            self._pieces.clear()

    def ended(self, end: Finished | Exception) -> None:
        """Take the end."""
        if self._end is None:
            self._end = end
            self._wake.set()

    # --- to the caller -----------------------------------------------------------------------------------------------

    def abort(self) -> None:
        """End the generation now; its last response says that it was cancelled."""
        if self._generation is not None:
            self._generation.stop()
        self.ended(_CANCELLED)

    async def run(self, messages: tuple[Message, ...], options: GenerationOptions, asker: Asker, *, trim: bool) -> None:
        """Send the answer and its end; however it ends, the engine is free within a step."""
        read, tokens = self._fitting(messages, options) if trim else (messages, 0)
        self._generation = generation = self._engine.begin(read, options, self, asker)
        try:
            async with asyncio.timeout_at(asker.deadline):
                await self._send()
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed before the answer was complete") from None
        finally:
            if self._timer is not None:
                self._timer.cancel()
            generation.stop()
        await self._send_end(tokens or sum(map(self._engine.count, read)))

    def _fitting(self, messages: tuple[Message, ...], options: GenerationOptions) -> tuple[list[Message], int]:
        """Return the conversation without the oldest turns that do not fit, and how many tokens that is."""
        window = ContextWindow.of(messages[:-1], self._engine.count, self._engine.capabilities.context_length)
        fitted = window.fit(messages[-1], options, overhead=self._engine.overhead)
        self._trimmed = fitted.trimmed_messages
        return fitted.messages, fitted.tokens

    async def _send(self) -> None:
        """Send pieces until the engine has no more."""
        write = self._call.context.write
        while self._end is None or self._pieces:
            await self._wake.wait()
            self._wake.clear()
            self._timer = None
            if self._position:
                position, self._position = self._position, 0
                if not self._told and not self._pieces:
                    await write(inference_pb2.GenerateResponse(queue_position=position))
            if self._thoughts:
                thoughts, self._thoughts = self._thoughts, []
                await write(inference_pb2.GenerateResponse(reasoning="".join(thoughts)))
            if self._interval > 0 and isinstance(self._end, Finished):
                return  # the last text goes with the end
            pieces, self._pieces = self._pieces, []
            for text, tokens in pieces if self._interval <= 0 else _joined(pieces):
                self._told += tokens
                await write(inference_pb2.GenerateResponse(text=text, token_count=tokens))
            self._sent_at = self._loop.time()
            if self._end is not None or self._pieces:
                self._wake.set()

    async def _send_end(self, prompt_tokens: int) -> None:
        end = self._end
        if isinstance(end, Exception):
            raise end
        assert end is not None
        text, tokens = _joined(self._pieces)[0] if self._pieces else ("", 0)
        self._told += tokens
        counted = end.usage if end is not _CANCELLED else Usage(output_tokens=self._told)
        if not counted.input_tokens:
            counted = msgspec.structs.replace(counted, input_tokens=prompt_tokens)
        await self._call.context.write(
            inference_pb2.GenerateResponse(
                text=text,
                token_count=tokens,
                finished=inference_pb2.GenerateFinished(
                    finish_reason=convert.finish_reason(end.finish_reason),
                    usage=convert.usage(counted),
                    model=f"models/{end.model or self._engine.id}",
                    tool_calls=[convert.tool_call(part) for part in end.attachments if isinstance(part, ToolCallPart)],
                    queue=convert.duration(end.queue),
                    first_token=convert.duration(end.first_token),
                    generation=convert.duration(end.generation),
                    trimmed_messages=self._trimmed,
                ),
            )
        )


_CANCELLED = Finished(finish_reason=FinishReason.CANCELLED, usage=Usage())


def _joined(pieces: list[tuple[str, int]]) -> list[tuple[str, int]]:
    if len(pieces) < 2:
        return pieces
    return [("".join(text for text, _ in pieces), sum(tokens for _, tokens in pieces))]
