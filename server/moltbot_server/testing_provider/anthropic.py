"""The Anthropic dialect: messages as JSON and as a stream of named events, and errors in its form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moltbot_server.testing_provider.answers import Answer, Asked, BadRequest, Frames, arguments_in_two, compact

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    529: "overloaded_error",
}
_SIGNATURE = "bW9jaw=="


def key_of(headers: Mapping[str, str]) -> str:
    """Return the key that a request shows, or nothing."""
    scheme, _, key = headers.get("Authorization", "").partition(" ")
    return headers.get("x-api-key", "").strip() or (key.strip() if scheme.lower() == "bearer" else "")


def check(headers: Mapping[str, str], body: object) -> None:
    """Refuse what this dialect alone asks for and a request lacks.

    Raises:
        BadRequest: the version, or the limit of tokens, is missing.
    """
    if not headers.get("anthropic-version"):
        raise BadRequest("anthropic-version: header is required")
    limit = body.get("max_tokens") if isinstance(body, dict) else None
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise BadRequest("max_tokens: a whole number from 1 is required", "max_tokens")


def error(status: int, message: str, *, reason: str = "", param: str | None = None) -> bytes:
    """Return the body of a refusal; its type says all that this dialect has for a reason."""
    return compact({"type": "error", "error": {"type": _TYPES.get(status, "api_error"), "message": message}})


def whole(answer: Answer) -> bytes:
    """Return an answer as one JSON object."""
    content: list[dict[str, Any]] = []
    if answer.reasoning:
        content.append({"type": "thinking", "thinking": "".join(answer.reasoning), "signature": _SIGNATURE})
    if answer.text:
        content.append({"type": "text", "text": "".join(answer.text)})
    blocks = b",".join(
        [compact(block) for block in content]
        # The arguments are JSON already: they go in as they are.
        + [
            compact(_tool_use(answer, at))[:-3] + each.arguments.encode("utf-8", "replace") + b"}"
            for at, each in enumerate(answer.tool_calls)
        ]
    )
    head = compact({**_head(answer), "stop_reason": _stop(answer), "stop_sequence": None, "usage": _usage(answer)})
    return head[:-1] + b',"content":[' + blocks + b"]}"


def frames(answer: Answer, asked: Asked) -> Frames:
    """Return an answer as a stream of events; a block's start and end travel with the chunks beside them."""
    used = {**_usage(answer), "output_tokens": 0}
    message = {**_head(answer), "content": [], "stop_reason": None, "stop_sequence": None, "usage": used}
    opening = _event("message_start", message=message) + _event("ping")
    blocks: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
    if answer.reasoning:
        thoughts = [{"type": "thinking_delta", "thinking": piece} for piece in answer.reasoning]
        signed = {"type": "signature_delta", "signature": _SIGNATURE}
        blocks.append(({"type": "thinking", "thinking": "", "signature": ""}, [*thoughts, signed]))
    if answer.text:
        blocks.append(({"type": "text", "text": ""}, [{"type": "text_delta", "text": piece} for piece in answer.text]))
    for at, call in enumerate(answer.tool_calls):
        parts = [{"type": "input_json_delta", "partial_json": piece} for piece in arguments_in_two(call)]
        blocks.append((_tool_use(answer, at), parts))
    chunks: list[bytes] = []
    for index, (block, deltas) in enumerate(blocks):
        begun = len(chunks)
        chunks += [_event("content_block_delta", index=index, delta=delta) for delta in deltas]
        chunks[begun] = _event("content_block_start", index=index, content_block=block) + chunks[begun]
        chunks[-1] += _event("content_block_stop", index=index)
    end = {"stop_reason": _stop(answer), "stop_sequence": None}
    closing = _event("message_delta", delta=end, usage={"output_tokens": answer.usage.output})
    return Frames(opening=opening, chunks=chunks, closing=closing, done=_event("message_stop"))


def broken(piece: str) -> bytes:
    """Return an event of a stream whose line is no JSON."""
    return f'event: content_block_delta\ndata: {{"type": {piece}\n\n'.encode()


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + compact({"type": kind, **fields}) + b"\n\n"


def _head(answer: Answer) -> dict[str, Any]:
    return {"id": f"msg_mock_{answer.number}", "type": "message", "role": "assistant", "model": answer.model}


def _tool_use(answer: Answer, at: int) -> dict[str, Any]:
    call = answer.tool_calls[at]
    return {"type": "tool_use", "id": f"toolu_mock_{answer.number}_{at}", "name": call.name, "input": {}}


def _usage(answer: Answer) -> dict[str, int]:
    used = answer.usage
    # In this dialect the tokens of the input are those that no cache served.
    fresh = {"input_tokens": used.input - used.cached, "output_tokens": used.output}
    return {**fresh, "cache_creation_input_tokens": 0, "cache_read_input_tokens": used.cached}


def _stop(answer: Answer) -> str:
    return "tool_use" if answer.tool_calls else "end_turn"
