"""Reading a request's JSON body, within limits of size, time and kind."""

import asyncio
import json
import re
from typing import Any, NoReturn

from aiohttp import web

from moltbot_adapters.http.errors import HttpError
from moltbot_adapters.http.settings import Settings

NAME = re.compile(r"[A-Za-z0-9._~-]{1,128}")
"""The form of ids in resource names."""

MODEL = re.compile(r"[A-Za-z0-9._~:/-]{1,128}")
"""The form of a model's id, which may name its provider too: `openrouter/meta-llama/llama-3:free`."""


async def read_json(request: web.Request, settings: Settings) -> dict[str, Any]:
    """Returns the body as a JSON object. Raises `HttpError` 400, 408, 413 or 415."""
    if request.content_type != "application/json":
        raise HttpError(415, "unsupported_media_type", "The body must be JSON, sent as Content-Type: application/json.")
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise HttpError(415, "unsupported_media_type", "The body must be sent without a Content-Encoding.")
    try:
        async with asyncio.timeout(settings.body_limit_s):
            raw = await _read(request, settings.max_body_bytes)
    except TimeoutError:
        raise HttpError(408, "request_timeout", "The body did not arrive in time.", headers=_CLOSE) from None
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise HttpError(400, "invalid_json", "The body is not valid JSON in UTF-8.") from None
    if not isinstance(value, dict):
        raise HttpError(400, "invalid_json", "The body must be a JSON object.")
    return value


async def _read(request: web.Request, limit: int) -> bytes:
    announced = request.content_length
    if announced is not None and announced > limit:
        raise _too_large(limit)
    pieces: list[bytes] = []
    size = 0
    try:
        async for piece in request.content.iter_any():
            size += len(piece)
            if size > limit:
                raise _too_large(limit)
            pieces.append(piece)
    except (web.RequestPayloadError, ValueError):
        raise HttpError(400, "invalid_body", "The body could not be read.", headers=_CLOSE) from None
    return b"".join(pieces)


_CLOSE = {"Connection": "close"}


def _too_large(limit: int) -> HttpError:
    return HttpError(413, "request_too_large", f"The body is larger than {limit} bytes.", headers=_CLOSE)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)  # NaN and Infinity are Python's own, not JSON's


def text_field(body: dict[str, Any], name: str, *, default: str | None = None, longest: int | None = None) -> str:
    """Returns a text of the body. Null counts as absent. Raises `HttpError` 400, naming the field."""
    value = body.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise wrong_type(name, "a string")
    if longest is not None and len(value) > longest:
        raise HttpError(400, "invalid_value", f"'{name}' is longer than {longest} characters.", param=name)
    return whole(value, name)


def whole(value: str, name: str) -> str:
    """Returns a text that can be written as UTF-8. Raises `HttpError` 400 for one with half a character in it."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise HttpError(400, "invalid_value", f"'{name}' holds half a surrogate pair.", param=name) from None
    return value


def wrong_type(name: str, wanted: str) -> HttpError:
    """Returns the answer to a field of the wrong type."""
    return HttpError(400, "invalid_type", f"'{name}' must be {wanted}.", param=name)
