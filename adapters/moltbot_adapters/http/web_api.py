"""The browser's API: sign-in, past chats, and turns as event streams that can be resumed."""

import asyncio
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing

import grpc
from aiohttp import web
from moltbot import MoltBotClientError
from moltbot.v1 import chat_pb2, message_pb2, model_pb2

from moltbot_adapters.core_client import CoreClient
from moltbot_adapters.http import web_events
from moltbot_adapters.http.body import MODEL, NAME, read_json, text_field
from moltbot_adapters.http.context import CONTEXT
from moltbot_adapters.http.core_watch import CoreWatch
from moltbot_adapters.http.errors import HttpError, from_core
from moltbot_adapters.http.metrics import Metrics
from moltbot_adapters.http.settings import Settings
from moltbot_adapters.http.sse import Streams

CHANNEL = "web"
_COME_BACK = b"retry: 500\n"  # milliseconds after which an EventSource does; without a word it may wait for seconds
_SILENT_S = 2.0  # longer than a core needs to accept a turn, or most models for a word
_PROMPT_S = 0.2  # a refusal to resume comes sooner than that; after it, silence means that the turn has no news yet


class WebApi:
    """Handles `/api` for a signed-in browser. Turns go on when the browser leaves."""

    def __init__(
        self, core: CoreClient, watch: CoreWatch, streams: Streams, metrics: Metrics, settings: Settings, version: str
    ) -> None:
        self._core = core
        self._watch = watch
        self._streams = streams
        self._metrics = metrics
        self._settings = settings
        self._version = version

    async def me(self, request: web.Request) -> web.Response:
        """`GET /api/me`: who is signed in, which models answer, and whether the store that they need is away."""
        context = request[CONTEXT]
        models = await self._core.list_models(context.caller)
        shown = [_model(model) for model in models if model.state == model_pb2.MODEL_STATE_READY]
        default = next((_model(model) for model in models if model.is_default), {"id": "", "display_name": ""})
        await self._watch.look()
        return web.json_response(
            {
                "user": context.user,
                "version": self._version,
                "default_model": default,
                "models": shown,
                "store_away": self._watch.store == "away",
            }
        )

    async def list_sessions(self, request: web.Request) -> web.Response:
        """`GET /api/sessions`: a page of this user's chats, the last used first."""
        context = request[CONTEXT]
        page = await self._core.list_sessions(context.user, CHANNEL, _page_token(request), context.caller)
        return web.json_response(
            {
                "sessions": [web_events.session(session) for session in page.sessions],
                "next_page_token": page.next_page_token,
            }
        )

    async def list_messages(self, request: web.Request) -> web.Response:
        """`GET /api/sessions/{session}/messages`: a page of a chat, oldest first."""
        page = await self._core.list_messages(_session(request), _page_token(request), request[CONTEXT].caller)
        shown = (message_pb2.ROLE_USER, message_pb2.ROLE_ASSISTANT)
        return web.json_response(
            {
                "messages": [web_events.message(message) for message in page.messages if message.role in shown],
                "next_page_token": page.next_page_token,
            }
        )

    async def delete_session(self, request: web.Request) -> web.Response:
        """`DELETE /api/sessions/{session}`."""
        await self._core.delete_session(_session(request), request[CONTEXT].caller)
        return web.Response(status=204)

    async def start_turn(self, request: web.Request) -> web.StreamResponse:
        """`POST /api/turns`: starts a turn, or follows the one with the same request id, as an event stream.

        Who lost the stream may repeat the call with the `Last-Event-ID` that it had, and gets what came after it.
        """
        context = request[CONTEXT]
        body = await read_json(request, self._settings)
        session = text_field(body, "session", default="")
        if session and not NAME.fullmatch(session):
            raise HttpError(400, "invalid_value", "'session' is not a session's id.", param="session")
        model = text_field(body, "model", default="")
        if model and not MODEL.fullmatch(model):
            raise HttpError(404, "model_not_found", "There is no such model.", param="model")
        request_id = text_field(body, "request_id", default="", longest=128)
        after = _sequence(request.headers.get("Last-Event-ID"))
        if after and not request_id:
            raise HttpError(400, "invalid_value", "'request_id' must be that of the turn.", param="request_id")
        turn = chat_pb2.TurnInput(
            session=f"sessions/{session}" if session else "",
            parts=[message_pb2.Part(text=text_field(body, "text"))],
            request_id=request_id or str(uuid.uuid4()),
            model=f"models/{model}" if model else "",
            user=context.user,
            channel=CHANNEL,
        )
        limit_s = self._settings.turn_limit_s
        if after:
            # Not by leaving out what has been seen: text that waited comes as one event, under its last number.
            name = await self._core.accepted(turn, context.caller, limit_s)
            events = self._core.resume_turn(name, after, context.caller, limit_s)
        else:
            events = self._core.stream_turn(turn, context.caller, limit_s)
        return await self._send(request, events, after)

    async def turn_events(self, request: web.Request) -> web.StreamResponse:
        """`GET /api/sessions/{session}/turns/{turn}/events`: what comes after a sequence number, then live.

        204 when nothing comes any more, which tells an `EventSource` not to come back.
        """
        after = max(_sequence(request.query.get("after")), _sequence(request.headers.get("Last-Event-ID")))
        caller = request[CONTEXT].caller
        await self._look_for_store()  # else the page would take the stream, which tells nothing yet, for a good sign
        events = self._core.resume_turn(_turn(request), after, caller, self._settings.turn_limit_s)
        return await self._send(request, events, after, open_after_s=_PROMPT_S)

    async def cancel_turn(self, request: web.Request) -> web.Response:
        """`POST /api/sessions/{session}/turns/{turn}/cancel`."""
        cancelled = await self._core.cancel_turn(_turn(request), request[CONTEXT].caller)
        return web.json_response({"cancelled": cancelled})

    async def _heard(self, events: AsyncGenerator[chat_pb2.Event, None]) -> AsyncGenerator[chat_pb2.Event, None]:
        """Yields events of a turn. Who waits for one while the store is away is told so, and comes back.

        From outside it looks like a model that thinks: the core is asked again and again, or holds back what it cannot
        keep.
        """
        async with aclosing(events):
            while True:
                coming = asyncio.ensure_future(anext(events, None))
                try:
                    while not (await asyncio.wait((coming,), timeout=_SILENT_S))[0]:
                        await self._look_for_store()
                finally:
                    if not coming.done():
                        coming.cancel()
                        await asyncio.wait((coming,))
                if (event := coming.result()) is None:
                    return
                yield event

    async def _look_for_store(self) -> None:
        await self._watch.look()
        if self._watch.store == "away":
            raise MoltBotClientError(
                grpc.StatusCode.UNAVAILABLE,
                "the core cannot reach its store now",
                reason="STORAGE_UNAVAILABLE",
                retryable=True,
                retry_after=1.0,
            )

    async def _send(
        self,
        request: web.Request,
        events: AsyncGenerator[chat_pb2.Event, None],
        after: int,
        *,
        open_after_s: float | None = None,
    ) -> web.StreamResponse:
        context = request[CONTEXT]
        waiting, head = True, _COME_BACK
        streams = self._streams.stream(request, open_after_s=open_after_s)
        async with streams as out, aclosing(self._heard(events)) as heard:
            try:
                async for event in heard:
                    if waiting and (event.HasField("text_delta") or event.HasField("reasoning_delta")):
                        waiting = False
                        self._metrics.first_token(context.route, context.seconds())
                    elif event.HasField("completed"):
                        usage = event.completed.usage
                        self._metrics.tokens(usage.input_tokens, usage.output_tokens, usage.cached_input_tokens)
                    elif event.HasField("failed"):
                        context.reason = "turn_failed"
                    if frame := web_events.frame(event):
                        await out.write(head + frame)
                        head = b""
            except MoltBotClientError as error:
                refusal = from_core(error)
                context.fail(refusal)
                if not out.opened:
                    raise
                # The page resumes after the last event it saw; a lasting fault is told by that call's status. What may
                # pass is waited for in that call too, and its status has left by then: it is told here, if anywhere.
                if refusal.status >= 500:
                    await out.write(web_events.refused(refusal.status, refusal.body()))
            if after and not out.opened:
                return web.Response(status=204)
            return await out.end()


def _model(model: model_pb2.Model) -> dict[str, str]:
    name = web_events.model_id(model.name)
    return {"id": name, "display_name": model.display_name or name}


def _session(request: web.Request) -> str:
    session = request.match_info["session"]
    if not NAME.fullmatch(session):
        raise HttpError(404, "session_not_found", "There is no such chat.")
    return f"sessions/{session}"


def _turn(request: web.Request) -> str:
    turn = request.match_info["turn"]
    if not NAME.fullmatch(turn):
        raise HttpError(404, "turn_not_found", "There is no such turn.")
    return f"{_session(request)}/turns/{turn}"


def _page_token(request: web.Request) -> str:
    token = request.query.get("page_token", "")
    if len(token) > 1024 or not token.isascii() or not token.isprintable():
        raise HttpError(400, "invalid_page_token", "The page token was not given by this server.", param="page_token")
    return token


def _sequence(text: str | None) -> int:
    if not text:
        return 0
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise HttpError(400, "invalid_value", "A sequence number is a whole number.", param="after")
    return int(text)
