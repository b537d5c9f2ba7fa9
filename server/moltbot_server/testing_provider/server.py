"""The mock provider itself: its addresses on the loopback, its faults, and the control over it."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from math import ceil
from typing import Protocol

from aiohttp import web

from moltbot_server.testing_provider import anthropic, openai
from moltbot_server.testing_provider.answers import Answer, Asked, BadRequest, Frames, answer_of, compact, read_request
from moltbot_server.testing_provider.calls import Calls, Draw
from moltbot_server.testing_provider.playing import Playing
from moltbot_server.testing_provider.script import Fault, Script, ScriptError

_LARGEST_REQUEST = 32 << 20
_PAGE = b"<!doctype html><title>Sign in</title><p>Please sign in to use this network.</p>\n"


class Dialect(Protocol):
    """How one kind of provider reads requests and words its answers."""

    def key_of(self, headers: Mapping[str, str], /) -> str:
        """Return the key that a request shows, or nothing."""

    def check(self, headers: Mapping[str, str], body: object, /) -> None:
        """Raise BadRequest for what this dialect alone refuses."""

    def error(self, status: int, message: str, *, reason: str = "", param: str | None = None) -> bytes:
        """Return the body of a refusal."""

    def whole(self, answer: Answer, /) -> bytes:
        """Return an answer as one JSON object."""

    def frames(self, answer: Answer, asked: Asked, /) -> Frames:
        """Return an answer as a stream."""

    def broken(self, piece: str, /) -> bytes:
        """Return an event that is no JSON."""


class MockProvider:
    """A provider that answers as its script says. `address` is there while it runs."""

    def __init__(self, script: Script | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` tells faults that last some seconds how much of them has passed."""
        self.address = ""
        self.calls = Calls()
        self._clock = clock
        self._open: set[asyncio.BaseTransport] = set()
        self.follow(script or Script())

    @property
    def script(self) -> Script:
        """What it follows now."""
        return self._draw.script

    def follow(self, script: Script) -> None:
        """Follow a script from its beginning; calls under way go on as they began."""
        self._draw = Draw(script, self._clock)

    @asynccontextmanager
    async def running(self, port: int = 0, host: str = "127.0.0.1") -> AsyncGenerator[MockProvider, None]:
        """Serve on a port of the loopback, any free one by default; at the end of the body all streams are cut.

        Raises:
            ValueError: the host is not of the loopback. OSError: the port is taken.
        """
        host = loopback(host)
        application = web.Application(client_max_size=_LARGEST_REQUEST)
        # Some providers have more of a path before it than /v1.
        application.router.add_post("/{before:.+}/chat/completions", self._chat)
        application.router.add_post("/{before:.+}/messages", self._message)
        application.router.add_get("/v1/models", self._models)
        application.router.add_get("/control/script", self._show_script)
        application.router.add_put("/control/script", self._put_script)
        application.router.add_get("/control/calls", self._show_calls)
        application.router.add_delete("/control/calls", self._clear_calls)
        # A client that leaves ends its call, a hanging one too.
        runner = web.AppRunner(application, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port, backlog=4096).start()
            self.address = f"http://{f'[{host}]' if ':' in host else host}:{runner.addresses[0][1]}"
            yield self
        finally:
            for transport in self._open:
                if isinstance(transport, asyncio.Transport):
                    transport.abort()
            await runner.cleanup()

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, openai)

    async def _message(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, anthropic)

    async def _answer(self, request: web.Request, dialect: Dialect) -> web.StreamResponse:
        key = dialect.key_of(request.headers)
        try:
            body = json.loads(await request.read())
        except ValueError:
            body = None
        model = body.get("model") if isinstance(body, dict) else None
        model = model[:200] if isinstance(model, str) else ""
        refused = self._refused(key, dialect)
        try:
            if refused is None:
                dialect.check(request.headers, body)
                asked = read_request(body)
        except BadRequest as error:
            refused = "bad_request", _refusal(dialect, 400, str(error), param=error.param)
        if refused is not None:
            self.calls.add(model=model, key=key, outcome=refused[0])
            return refused[1]
        lot = self._draw.next()
        kind = "" if lot.fault is None else lot.fault.kind
        self.calls.add(model=model, key=key, outcome=kind or "answered", pictures=asked.pictures)
        if lot.fault is not None and (refusal := _of_fault(lot.fault, dialect)) is not None:
            return refusal
        script = self.script
        answer = answer_of(script, asked, lot.number, int(time.time()), empty=kind == "empty")
        if lot.fault is not None and kind == "huge":
            answer = replace(answer, text=("x" * lot.fault.size, *answer.text))
        playing = Playing(request=request, fault=lot.fault, wait=lot.wait, pace=script.pace, broken=dialect.broken)
        transport = request.transport
        if transport is not None:
            self._open.add(transport)
        try:
            if asked.stream:
                return await playing.stream(dialect.frames(answer, asked))
            return await playing.whole(dialect.whole(answer), steps=len(answer.text))
        finally:
            if transport is not None:
                self._open.discard(transport)

    def _refused(self, key: str, dialect: Dialect) -> tuple[str, web.Response] | None:
        """Return the outcome and the refusal of a key that does not open, or None."""
        script = self.script
        if key and key in script.out_of_quota:
            text = "You exceeded your current quota, please check your plan and billing details."
            return "out_of_quota", _refusal(dialect, 429, text, reason="insufficient_quota")
        if not key or (script.keys and key not in script.keys):
            return "wrong_key", _refusal(dialect, 401, "Incorrect API key provided." if key else "No API key provided.")
        return None

    async def _models(self, request: web.Request) -> web.Response:
        # A call for the list is no call for an answer: it is not counted and meets no fault.
        refused = self._refused(anthropic.key_of(request.headers), openai)
        return refused[1] if refused else _json(200, openai.models(self.script.context_length))

    async def _show_script(self, request: web.Request) -> web.Response:
        return _json(200, compact(self.script.shown()))

    async def _put_script(self, request: web.Request) -> web.Response:
        try:
            self.follow(Script.read(json.loads(await request.read())))
        except ScriptError as error:
            return _json(400, openai.error(400, str(error), param=str(error).partition(":")[0]))
        except ValueError:
            return _json(400, openai.error(400, "the script must be JSON"))
        return await self._show_script(request)

    async def _show_calls(self, request: web.Request) -> web.Response:
        return _json(200, compact(self.calls.shown()))

    async def _clear_calls(self, request: web.Request) -> web.Response:
        self.calls.clear()
        return web.Response(status=204)


def loopback(host: str) -> str:
    """Return the address of a host of the loopback.

    Raises:
        ValueError: it is not one; whoever reaches this server controls it without a key.
    """
    host = "127.0.0.1" if host == "localhost" else host
    try:
        if ipaddress.ip_address(host).is_loopback:
            return host
    except ValueError:
        pass  # a name: it may lead anywhere
    raise ValueError(f"a mock provider listens on the loopback alone (127.0.0.1, ::1 or localhost), not on {host!r}")


def _of_fault(fault: Fault, dialect: Dialect) -> web.Response | None:
    """Return what a fault answers instead of an answer, or None for those that spoil one."""
    if fault.kind == "error":
        texts = {502: "Bad gateway.", 503: "The service is unavailable.", 529: "Overloaded."}
        return _refusal(dialect, fault.status, texts.get(fault.status, "The server had an error."))
    if fault.kind == "rate_limit":
        response = _refusal(dialect, 429, "Rate limit reached. Please try again later.")
        response.headers["Retry-After"] = str(ceil(fault.retry_after))  # HTTP knows whole seconds alone
        return response
    if fault.kind == "unauthorized":
        told = "Incorrect API key provided." if fault.status == 401 else "The key has no permission for this model."
        return _refusal(dialect, fault.status, told)
    if fault.kind == "wrong_content_type":
        return web.Response(body=_PAGE, content_type="text/html", charset="utf-8")
    return None


def _refusal(
    dialect: Dialect, status: int, message: str, *, reason: str = "", param: str | None = None
) -> web.Response:
    return _json(status, dialect.error(status, message, reason=reason, param=param))


def _json(status: int, body: bytes) -> web.Response:
    return web.Response(status=status, body=body, content_type="application/json")
