"""Errors as HTTP answers: the four-key form of the OpenAI API, for every route."""

import json
from collections.abc import Mapping

from aiohttp import web
from grpc import StatusCode
from moltbot import MoltBotClientError

from moltbot_adapters.core_errors import REASONS

INVALID = "invalid_request_error"
SERVER = "server_error"


class HttpError(Exception):
    """An answer that is no success: status, message, and the `type`, `param` and `code` of the four-key form."""

    def __init__(
        self,
        status: int,
        code: str | None,
        message: str,
        *,
        type: str = INVALID,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, code, message)
        self.status = status
        self.code = code
        self.message = message
        self.type = type
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """Returns the JSON body."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()

    def response(self) -> web.Response:
        """Returns the HTTP response."""
        return web.Response(
            status=self.status,
            body=self.body(),
            content_type="application/json",
            charset="utf-8",
            headers=self.headers,
        )


# What the transport's statuses mean when the core gave no reason of its own.
_BY_STATUS: dict[StatusCode, tuple[int, str, str, str]] = {
    StatusCode.INVALID_ARGUMENT: (400, INVALID, "invalid_value", "The request was refused."),
    StatusCode.OUT_OF_RANGE: (400, INVALID, "invalid_value", "The request was refused."),
    StatusCode.UNAUTHENTICATED: (401, INVALID, "invalid_api_key", "The API key is missing or not known."),
    StatusCode.PERMISSION_DENIED: (403, INVALID, "permission_denied", "The key may not do this."),
    StatusCode.NOT_FOUND: (404, INVALID, "not_found", "There is no such thing."),
    StatusCode.ALREADY_EXISTS: (409, INVALID, "already_exists", "It exists already."),
    StatusCode.ABORTED: (409, INVALID, "conflict", "Another request came in between."),
    StatusCode.FAILED_PRECONDITION: (409, INVALID, "conflict", "The request does not fit the present state."),
    StatusCode.CANCELLED: (409, INVALID, "turn_cancelled", "The turn was cancelled."),
    StatusCode.RESOURCE_EXHAUSTED: (429, "rate_limit_exceeded", "rate_limit_exceeded", "Too much at once; wait a bit."),
    StatusCode.UNIMPLEMENTED: (501, SERVER, "unimplemented", "The core cannot do that."),
    StatusCode.UNAVAILABLE: (503, SERVER, "core_unavailable", "The core cannot be reached now; try again soon."),
    StatusCode.DEADLINE_EXCEEDED: (504, SERVER, "deadline_exceeded", "The answer was not complete in time."),
}
_UNKNOWN = (500, SERVER, "internal_error", "Something went wrong; the log tells more under the request id.")

# Reasons whose HTTP code or status is not simply the reason in lower case under the status above.
_CODES = {
    "INVALID_FIELD": "invalid_value",
    "UNAUTHENTICATED": "invalid_api_key",
    "UNSUPPORTED_OPTION": "unsupported_value",
    "UNSUPPORTED_CONTENT": "unsupported_value",
    "QUEUE_FULL": "rate_limit_exceeded",
    "INTERNAL": "internal_error",
    "BUDGET_EXCEEDED": "insufficient_quota",
}
# A provider that refuses the core's key is no fault of the caller, whose own key is good: no 401, and no 4xx at all.
_STATUSES = {"STORAGE_FULL": 507, "MODEL_CREDENTIAL": 503}
_KINDS = {"BUDGET_EXCEEDED": "insufficient_quota"}
# The openai clients repeat 409, 429 and 5xx by themselves; where that cannot help they are told.
_IN_VAIN = {
    "BUDGET_EXCEEDED",
    "INVALID_CONFIGURATION",
    "MODEL_CREDENTIAL",
    "REQUEST_ID_REUSED",
    "STORAGE_DAMAGED",
    "STORAGE_FULL",
    "TURN_CANCELLED",
    "TURN_DELETED",
    "UNIMPLEMENTED",
}
_PARAMS = {
    "model": "model",
    "parts": "messages",
    "transcript": "messages",
    "system_prompt": "messages",
    "session": "session",
    "request_id": "request_id",
    "user": "user",
    "max_output_tokens": "max_tokens",
    "tools": "tools",
    "tool_choice": "tool_choice",
    "page_token": "page_token",
}


def shutting_down() -> HttpError:
    """Returns what callers are told whose answer a leaving process cannot wait for."""
    text = "This server is stopping, or starts again; ask again in a moment."
    return HttpError(503, "shutting_down", text, type="server_error", headers={"Retry-After": "1"})


def from_core(error: MoltBotClientError) -> HttpError:
    """Returns the HTTP answer for a refusal of the core, or a failure of the way to it."""
    status, kind, code, message = _BY_STATUS.get(error.code, _UNKNOWN)
    if error.reason in REASONS:
        code = _CODES.get(error.reason, error.reason.lower())
        status = _STATUSES.get(error.reason, status)
        kind = _KINDS.get(error.reason, SERVER if status >= 500 else kind)
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    if status in (429, 503) and (error.reason not in _IN_VAIN or error.retry_after is not None):
        wait_s = 1.0 if error.retry_after is None else error.retry_after
        headers["Retry-After"] = str(max(1, -int(-wait_s // 1)))
        headers["retry-after-ms"] = str(max(1, round(wait_s * 1000)))
    if error.reason in _IN_VAIN:
        headers["x-should-retry"] = "false"
    field = next(iter(error.fields), "")
    param = "model" if error.reason == "MODEL_NOT_FOUND" else _param(field)
    # Only the core's own words are passed on: the transport's name addresses and files.
    told = (error.message if error.reason else "") or message
    if field and told.startswith(f"{field}: "):
        # The core names a field of its own call; whoever called here sent another one.
        told = f"{param or 'request'}: {told.removeprefix(f'{field}: ')}"
    return HttpError(status, code, told, type=kind, param=param, headers=headers)


def _param(field: str) -> str | None:
    for name in reversed(field.replace("[", ".").split(".")):
        if name in _PARAMS:
            return _PARAMS[name]
    return field.rpartition(".")[2] or None
