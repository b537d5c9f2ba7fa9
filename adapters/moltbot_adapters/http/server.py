"""aiohttp's server, with broken HTTP answered in our own form and logged in one line."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from moltbot_adapters.http.context import RequestContext
from moltbot_adapters.http.errors import HttpError
from moltbot_adapters.http.guard import GUARD, Guard, decorate
from moltbot_adapters.http.settings import Settings
from moltbot_adapters.logs import fields

log = logging.getLogger("moltbot.http")

_Handle = Callable[[Any], Awaitable[web.StreamResponse]]


class _Protocol(web.RequestHandler):
    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answers what the parser could not read. Handlers' own errors never come here: the guard answers them."""
        if request.writer.output_size > 0:
            raise ConnectionResetError("the answer was broken off")
        request_id = RequestContext().request_id
        if status >= 500:
            log.error("the server failed", exc_info=exc, extra=fields(request_id=request_id))
            error = HttpError(status, "internal_error", "Something went wrong.", type="server_error")
        else:
            log.info("not HTTP", extra=fields(status=status, request_id=request_id))
            error = HttpError(status, "bad_request", "The request is not valid HTTP.")
        response = error.response()
        decorate(response, request_id)
        response.force_close()
        return response


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        return _Protocol(self, loop=self._loop, **self._kwargs)


def _expecting(handle: _Handle, guard: Guard) -> _Handle:
    """Has the guard answer a request that expects what nobody knows; aiohttp judges that before its middlewares."""

    async def judged(request: Any) -> web.StreamResponse:
        try:
            return await handle(request)
        except web.HTTPExpectationFailed:
            # Nobody can tell whether the body comes now, or another request in its place.
            headers = {"Connection": "close"}
            problem = "Nothing but 'Expect: 100-continue' is supported; leave it out."
            return await guard.refuse(request, HttpError(417, "expectation_failed", problem, headers=headers))

    return judged


class Runner(web.AppRunner):
    """Serves the application: a gone client cancels its handler, a leaving process lets handlers end."""

    def __init__(self, app: web.Application, settings: Settings) -> None:
        super().__init__(
            app,
            handler_cancellation=True,
            access_log=None,
            auto_decompress=False,  # bodies with a Content-Encoding are refused, so none can grow
            keepalive_timeout=75.0,
            lingering_time=2.0,
            max_line_size=8190,
            max_field_size=8190,
            # What is handled is ended before, so that it can say why.
            shutdown_timeout=settings.drain_s + 2.0,
        )

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        kwargs: dict[str, Any] = made._kwargs
        return _Server(
            _expecting(made.request_handler, self.app[GUARD]),
            request_factory=made.request_factory,
            handler_cancellation=made.handler_cancellation,
            **kwargs,
        )
