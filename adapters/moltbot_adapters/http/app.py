"""Puts the HTTP adapter together."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from importlib.metadata import version

from aiohttp import web

from moltbot_adapters.core_client import CoreClient
from moltbot_adapters.http.core_watch import CoreWatch
from moltbot_adapters.http.guard import GUARD, Guard
from moltbot_adapters.http.leaving import Leaving
from moltbot_adapters.http.metrics import Metrics
from moltbot_adapters.http.openai_api import OpenAiApi
from moltbot_adapters.http.origin import Origin
from moltbot_adapters.http.pages import Assets, Pages
from moltbot_adapters.http.settings import Settings
from moltbot_adapters.http.signin import KeyFile, SignIn
from moltbot_adapters.http.sse import Streams
from moltbot_adapters.http.status import Status
from moltbot_adapters.http.web_api import WebApi


def build_app(settings: Settings) -> web.Application:
    """Returns the application. Called in the event loop that will serve it, for the channels belong to that loop.

    Raises `OSError` or `ValueError` when the key file or the state folder cannot be used.
    """
    metrics = Metrics()
    origin = Origin(settings)
    key_file = KeyFile(settings.key_file)
    signin = SignIn(settings.state, key_file)
    streams = Streams(settings, metrics.stream)
    leaving = Leaving(settings.drain_s)
    core = CoreClient(settings.core, on_retry=metrics.retry)
    watch = CoreWatch(core)
    guard = Guard(signin, key_file, origin, metrics, leaving, settings)
    release = version("moltbot")

    app = web.Application(middlewares=[guard.check])
    app[GUARD] = guard
    app.on_response_prepare.append(guard.prepare)
    _route(
        app,
        Pages(Assets(), signin, key_file, origin, settings),
        WebApi(core, watch, streams, metrics, settings, release),
        OpenAiApi(core, streams, metrics, settings),
        Status(watch, metrics, streams, origin, release),
    )

    async def running(app: web.Application) -> AsyncIterator[None]:
        ticking = asyncio.create_task(streams.look_after())
        yield
        ticking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await ticking
        await leaving.ended()
        await core.close()

    async def leave(app: web.Application) -> None:
        leaving.begin()

    app.cleanup_ctx.append(running)
    app.on_shutdown.append(leave)
    return app


def _route(app: web.Application, pages: Pages, chat: WebApi, openai: OpenAiApi, status: Status) -> None:
    get, post = "GET", "POST"
    turn = "/api/sessions/{session}/turns/{turn}"
    routes = [
        (get, "/", pages.index),
        (get, "/login", pages.login_link),
        (get, "/static/{name:.+}", pages.asset),
        (get, "/health", status.health),
        (get, "/metrics", status.metrics),
        (post, "/api/login", pages.login),
        (post, "/api/logout", pages.logout),
        (get, "/api/me", chat.me),
        (get, "/api/sessions", chat.list_sessions),
        ("DELETE", "/api/sessions/{session}", chat.delete_session),
        (get, "/api/sessions/{session}/messages", chat.list_messages),
        (post, "/api/turns", chat.start_turn),
        (get, turn + "/events", chat.turn_events),
        (post, turn + "/cancel", chat.cancel_turn),
        (post, "/v1/chat/completions", openai.chat_completions),
        (get, "/v1/models", openai.list_models),
        (get, "/v1/models/{model:.+}", openai.get_model),
    ]
    for method, path, handler in routes:
        app.router.add_route(method, path, handler)
    for path, handler in (("/", pages.index), ("/static/{name:.+}", pages.asset), ("/health", status.health)):
        app.router.add_route("HEAD", path, handler)  # what monitors and caches ask; nothing with an effect
