"""The OpenAI-compatible API: chat completions and models."""

import asyncio
import re
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from grpc import StatusCode
from moltbot import MoltBotClientError
from moltbot.errors import from_event
from moltbot.v1 import chat_pb2, message_pb2, model_pb2

from moltbot_adapters.core_client import CoreClient
from moltbot_adapters.http import web_events
from moltbot_adapters.http.body import MODEL, NAME, read_json, text_field, wrong_type
from moltbot_adapters.http.context import CONTEXT, RequestContext
from moltbot_adapters.http.errors import HttpError, from_core, shutting_down
from moltbot_adapters.http.metrics import Metrics
from moltbot_adapters.http.openai_chunks import id_of, whole_answer
from moltbot_adapters.http.openai_messages import conversation_of
from moltbot_adapters.http.openai_options import flag, options_of
from moltbot_adapters.http.openai_progress import Progress
from moltbot_adapters.http.openai_tools import calls_of
from moltbot_adapters.http.settings import Settings
from moltbot_adapters.http.sse import EventStream, Streams

DEFAULT_MODELS = frozenset(("", "moltbot", "default"))
"""Names for the workspace's own choice of model."""

_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A chat completion that is asked for."""

    turn: chat_pb2.TurnInput
    model: str
    streamed: bool
    with_usage: bool
    one_call: bool
    kept: bool
    """Somebody may come back for the answer: the turn goes on when its reader leaves."""
    limit_s: float
    headers: dict[str, str]


class OpenAiApi:
    """Handles `/v1`. The caller's own key goes along with every call: this process has no say in it."""

    def __init__(self, core: CoreClient, streams: Streams, metrics: Metrics, settings: Settings) -> None:
        self._core = core
        self._streams = streams
        self._metrics = metrics
        self._settings = settings

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/chat/completions`."""
        ask = read_ask(await read_json(request, self._settings), request, self._settings)
        context = request[CONTEXT]
        if ask.streamed:
            return await self._stream(request, context, ask)
        try:
            answer = (await self._core.run_turn(ask.turn, context.caller, ask.limit_s)).completed
        except asyncio.CancelledError:
            self._leave(ask, "", context)
            raise
        if answer.finish_reason == message_pb2.FINISH_REASON_CANCELLED:
            raise _cancelled()
        self._count(answer)
        body = whole_answer(
            answer, ask.model, calls_of(answer.attachments, one=ask.one_call), id=id_of(ask.turn.request_id)
        )
        cached = {"X-MoltBot-Cached": "true"} if answer.cached else {}
        return web.json_response(body, headers=ask.headers | cached)

    async def _stream(self, request: web.Request, context: RequestContext, ask: Ask) -> web.StreamResponse:
        events = self._core.stream_turn(ask.turn, context.caller, ask.limit_s)
        progress = Progress(ask.model, id=id_of(ask.turn.request_id), with_usage=ask.with_usage)
        async with self._streams.stream(request, ask.headers) as out, aclosing(events):
            try:
                return await self._answer(out, events, context, ask, progress)
            except asyncio.CancelledError:
                if not context.out_of_time:
                    raise
                error = shutting_down()
            except MoltBotClientError as failure:
                progress.over = progress.over or bool(failure.reason)
                error = from_core(failure)
            except HttpError as refusal:
                error = refusal
            finally:
                if not progress.over:
                    self._leave(ask, progress.turn, context)
            context.fail(error)
            if not out.opened:
                raise error
            await out.write(b"data: " + error.body() + b"\n\n")
            return await out.end()

    async def _answer(
        self,
        out: EventStream,
        events: AsyncGenerator[chat_pb2.Event, None],
        context: RequestContext,
        ask: Ask,
        progress: Progress,
    ) -> web.StreamResponse:
        async for event in events:
            match event.WhichOneof("kind"):
                case "text_delta":
                    self._begins(progress, context)
                    await _tell(out, progress.add(event.text_delta.text))
                case "reasoning_delta":
                    self._begins(progress, context)
                    await _tell(out, progress.think(event.reasoning_delta.text))
                case "accepted":
                    progress.turn = event.accepted.turn
                case "routed":
                    progress.rename(web_events.model_id(event.routed.model))
                case "reset":
                    await _tell(out, progress.replace(event.reset.text))
                case "completed":
                    progress.over = True
                    if event.completed.finish_reason == message_pb2.FINISH_REASON_CANCELLED:
                        raise _cancelled()
                    self._count(event.completed)
                    calls = calls_of(event.completed.attachments, one=ask.one_call)
                    await _tell(out, progress.end(event.completed, calls))
                    return await out.end()
                case "failed":
                    progress.over = True
                    raise from_event(event.failed)
        raise MoltBotClientError(StatusCode.INTERNAL, "")  # the contract knows no stream without a last event

    def _leave(self, ask: Ask, turn: str, context: RequestContext) -> None:
        if not ask.kept:
            self._core.leave(ask.turn, turn, context.caller)

    def _begins(self, progress: Progress, context: RequestContext) -> None:
        if not progress.begun:
            self._metrics.first_token(context.route, context.seconds())

    def _count(self, answer: chat_pb2.Completed) -> None:
        usage = answer.usage
        self._metrics.tokens(usage.input_tokens, usage.output_tokens, usage.cached_input_tokens)

    async def list_models(self, request: web.Request) -> web.Response:
        """`GET /v1/models`: the models that can answer now."""
        models = await self._core.list_models(request[CONTEXT].caller)
        ready = [_model(model) for model in models if model.state == model_pb2.MODEL_STATE_READY]
        return web.json_response({"object": "list", "data": ready})

    async def get_model(self, request: web.Request) -> web.Response:
        """`GET /v1/models/{model}`; `moltbot` and `default` stand for the model that answers by default."""
        wanted = request.match_info["model"]
        caller = request[CONTEXT].caller
        if wanted in DEFAULT_MODELS:
            models = await self._core.list_models(caller)
            default = next((model for model in models if model.is_default), None)
            if default is None:
                raise _no_model(wanted)
            return web.json_response({**_model(default), "id": wanted})
        if not MODEL.fullmatch(wanted):
            raise _no_model(wanted)
        return web.json_response(_model(await self._core.get_model(f"models/{wanted}", caller)))


def read_ask(body: dict[str, Any], request: web.Request, settings: Settings) -> Ask:
    """Reads a request for a chat completion. Raises `HttpError` 400 or 404."""
    streamed = flag(body, "stream")
    model = text_field(body, "model", default="").removeprefix("models/")
    if model not in DEFAULT_MODELS and not MODEL.fullmatch(model):
        raise _no_model(model)
    options = options_of(body)
    repeat_key = _header(request, "Idempotency-Key", _IDEMPOTENCY_KEY)
    session = _header(request, "X-Session-Id", NAME)
    said = conversation_of(body.get("messages"), closed=not session)
    turn = chat_pb2.TurnInput(
        parts=said.parts,
        request_id=repeat_key or uuid.uuid4().hex,
        model="" if model in DEFAULT_MODELS else f"models/{model}",
        options=options,
        system_prompt=said.system_prompt,
        user=text_field(body, "user", default="", longest=128),
        channel="api",
    )
    if session:
        turn.session = f"sessions/{session}"
    else:
        turn.transcript.messages.extend(said.history)
        turn.transcript.SetInParent()  # a transcript, even an empty one, keeps the turn out of the list of sessions
    return Ask(
        turn=turn,
        model=model or "moltbot",
        streamed=streamed,
        with_usage=streamed and _with_usage(body.get("stream_options")),
        one_call=_one_call(body, options, session),
        kept=bool(repeat_key),
        limit_s=_limit_s(request, settings),
        headers={"X-Session-Id": session} if session else {},
    )


async def _tell(out: EventStream, data: bytes | None) -> None:
    """Writes what is to be shown next; None stands for words that would have to be unsaid."""
    if data is None:
        raise _replaced()
    if data:
        await out.write(data)


def _with_usage(options: Any) -> bool:
    if options is None:
        return False
    if not isinstance(options, dict):
        raise wrong_type("stream_options", "an object")
    return flag(options, "include_usage", within="stream_options")


def _one_call(body: dict[str, Any], options: message_pb2.GenerationOptions, session: str) -> bool:
    """Tells whether an answer may ask for one tool at most."""
    several = flag(body, "parallel_tool_calls", default=True)
    if several or not options.tools:
        return False
    if session:
        # The session keeps the calls that the caller would not be told of, and waits for their results.
        raise HttpError(
            400,
            "unsupported_value",
            "'parallel_tool_calls' cannot be false together with the header X-Session-Id.",
            param="parallel_tool_calls",
        )
    return True


def _header(request: web.Request, name: str, form: re.Pattern[str]) -> str:
    value = request.headers.get(name)
    if value is None:
        return ""
    if not form.fullmatch(value):
        raise HttpError(400, "invalid_value", f"The header {name} does not have the form {form.pattern}.", param=name)
    return value


def _limit_s(request: web.Request, settings: Settings) -> float:
    text = request.headers.get("X-Request-Timeout")
    if text is None:
        return settings.turn_limit_s
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text) or float(text) <= 0:
        problem = "The header X-Request-Timeout must be a number of seconds above 0."
        raise HttpError(400, "invalid_value", problem, param="X-Request-Timeout")
    return min(float(text), settings.turn_limit_s)


def _model(model: model_pb2.Model) -> dict[str, Any]:
    return {
        "id": web_events.model_id(model.name),
        "object": "model",
        "created": model.load_time.seconds,
        "owned_by": "moltbot",
    }


def _no_model(name: str) -> HttpError:
    return HttpError(404, "model_not_found", f"The model '{name[:128]}' does not exist.", param="model")


def _replaced() -> HttpError:
    problem = (
        "The answer begins anew, because its model or its core failed in the middle of it, and what was sent cannot be "
        "taken back: ask again. Where a model fails, a route with `on_failure: continue` goes on with another one."
    )
    return HttpError(503, "answer_replaced", problem, type="server_error")


def _cancelled() -> HttpError:
    return HttpError(409, "turn_cancelled", "The turn was cancelled.", headers={"x-should-retry": "false"})
