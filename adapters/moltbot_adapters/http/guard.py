"""What every request passes: admission by the policy, one form for errors, headers, metrics and the log."""

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from functools import partial

from aiohttp import web
from grpc import StatusCode
from moltbot import MoltBotClientError

from moltbot_adapters.http.context import CONTEXT, RequestContext
from moltbot_adapters.http.errors import HttpError, from_core, shutting_down
from moltbot_adapters.http.leaving import Leaving
from moltbot_adapters.http.lost import page_for
from moltbot_adapters.http.metrics import Metrics
from moltbot_adapters.http.origin import Origin
from moltbot_adapters.http.policy import Access, rule_for
from moltbot_adapters.http.settings import Settings
from moltbot_adapters.http.signin import COOKIE, KeyFile, SignIn
from moltbot_adapters.logs import fields

log = logging.getLogger("moltbot.http")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_BEARER = re.compile(r"bearer +([\x21-\x7e]{1,4096}) *", re.IGNORECASE)
_PAGE_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Server": "moltbot",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


def decorate(response: web.StreamResponse, request_id: str, *, page: bool = False) -> None:
    """Sets the headers that every answer carries."""
    headers = response.headers
    headers.update(_HEADERS)
    headers["Content-Security-Policy"] = _PAGE_CSP if page else "default-src 'none'; frame-ancestors 'none'"
    headers["X-Request-Id"] = request_id
    headers.setdefault("Cache-Control", "no-store")


class Guard:
    """Stands in front of every handler."""

    def __init__(
        self,
        signin: SignIn,
        key_file: KeyFile,
        origin: Origin,
        metrics: Metrics,
        leaving: Leaving,
        settings: Settings,
    ) -> None:
        self._signin = signin
        self._key_file = key_file
        self._origin = origin
        self._metrics = metrics
        self._leaving = leaving
        self._settings = settings

    async def prepare(self, request: web.Request, response: web.StreamResponse) -> None:
        """Decorates a response that is about to leave."""
        html = response.content_type == "text/html"
        page = html or request.path == "/" or request.path.startswith("/static/")
        decorate(response, request[CONTEXT].request_id, page=page)
        if self._leaving.begun:
            response.force_close()

    @web.middleware
    async def check(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        return await self._watch(request, partial(self._answer, request, handler))

    async def refuse(self, request: web.Request, error: HttpError) -> web.StreamResponse:
        """Answers a request that aiohttp refuses before it asks its middlewares."""

        async def refused(context: RequestContext) -> web.StreamResponse:
            return context.fail(error).response()

        return await self._watch(request, refused)

    async def _watch(
        self, request: web.Request, answer: Callable[[RequestContext], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        context = request[CONTEXT] = RequestContext()
        status = 499  # the code that proxies log when the client left first
        try:
            with self._leaving.handling() as context.handling:
                response = await answer(context)
            status = response.status
            return response
        finally:
            if status == 499:
                context.reason = context.reason or "disconnected"
            seconds = context.seconds()
            self._metrics.request(context.route, request.method, status, context.reason, seconds)
            log.log(
                _level(request.method, status),
                "request",
                extra=fields(
                    route=context.route,
                    method=request.method,
                    status=status,
                    reason=context.reason,
                    ms=round(seconds * 1000, 1),
                    request_id=context.request_id,
                ),
            )

    async def _answer(self, request: web.Request, handler: Handler, context: RequestContext) -> web.StreamResponse:
        try:
            self._admit(request, context)
            return await handler(request)
        except HttpError as refusal:
            error = refusal
        except MoltBotClientError as failure:
            error = self._from_core(failure, context)
        except web.HTTPException as refusal:
            error = _from_aiohttp(refusal)
        except asyncio.CancelledError:
            if not context.out_of_time or request.writer.output_size > 0:
                raise
            error = shutting_down()
        except ConnectionError:
            raise
        except Exception:
            log.exception("a handler failed", extra=fields(route=context.route, request_id=context.request_id))
            error = from_core(MoltBotClientError(StatusCode.INTERNAL, ""))
            if request.writer.output_size > 0:  # part of an answer is out: all that is left is to break it off
                raise ConnectionResetError("the answer was broken off") from None
        context.fail(error)
        return page_for(request, error) or error.response()

    def _admit(self, request: web.Request, context: RequestContext) -> None:
        self._origin.check_host(request)
        match = request.match_info
        resource = match.route.resource
        if match.http_exception is not None or resource is None:
            return  # the handler answers 404 or 405
        rule = rule_for(request.method, resource.canonical)
        if rule is None:
            raise HttpError(403, "permission_denied", "Nobody may use this route.")
        context.route = resource.canonical
        if rule.same_origin:
            self._origin.check_same_origin(request)
        match rule.access:
            case Access.PUBLIC:
                pass
            case Access.LOCAL:
                if not (self._settings.public_metrics or self._origin.is_local(request)):
                    raise HttpError(403, "local_only", "This is answered to programs on the same machine only.")
            case Access.BEARER:
                context.key = _bearer(request)
            case Access.COOKIE:
                user = self._signin.user(request.cookies.get(COOKIE))
                if user is None:
                    raise HttpError(401, "signed_out", "Sign in first.")
                context.user, context.key = user, self._key_file.key()

    def _from_core(self, error: MoltBotClientError, context: RequestContext) -> HttpError:
        if context.user and error.code is StatusCode.UNAUTHENTICATED:
            # The browser's sign-in is good; it is this process whose key the core does not know.
            return HttpError(
                503, "workspace_key_refused", "The core does not accept the workspace key.", type="server_error"
            )
        return from_core(error)


GUARD = web.AppKey("guard", Guard)


def _level(method: str, status: int) -> int:
    if status >= 500:
        return logging.WARNING
    return logging.DEBUG if method in ("GET", "HEAD") and status < 400 else logging.INFO


def _bearer(request: web.Request) -> str:
    given = _BEARER.fullmatch(request.headers.get("Authorization", ""))
    if given is None:
        raise HttpError(
            401,
            "invalid_api_key",
            "Send the API key as Authorization: Bearer KEY.",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return given[1]


def _from_aiohttp(error: web.HTTPException) -> HttpError:
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return HttpError(405, "method_not_allowed", f"Use {allowed}.", headers={"Allow": allowed})
    if error.status == 404:
        return HttpError(404, "not_found", "There is no such route.")
    return HttpError(error.status, "invalid_request", error.reason)
