"""The OpenAI dialect: chat completions as JSON and as a stream, and errors with four keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moltbot_server.testing_provider.answers import Answer, Asked, Frames, arguments_in_two, compact

MODELS = ("mock-model",)
_TYPES = {400: "invalid_request_error", 401: "invalid_request_error", 403: "permission_error", 429: "requests"}
_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}


def key_of(headers: Mapping[str, str]) -> str:
    """Return the key that a request shows, or nothing."""
    scheme, _, key = headers.get("Authorization", "").partition(" ")
    # The second is Azure's way.
    return key.strip() if scheme.lower() == "bearer" else headers.get("api-key", "").strip()


def check(headers: Mapping[str, str], body: object) -> None:
    """Take every request that both dialects take."""


def error(status: int, message: str, *, reason: str = "", param: str | None = None) -> bytes:
    """Return the body of a refusal; `reason` is its code where the status alone does not say it."""
    kind = "insufficient_quota" if reason == "insufficient_quota" else _TYPES.get(status, "server_error")
    return compact({"error": {"message": message, "type": kind, "param": param, "code": reason or _CODES.get(status)}})


def models(context_length: int | None) -> bytes:
    """Return the list of models; requests may name any other."""
    told = {} if context_length is None else {"context_length": context_length}
    listed = [{"id": name, "object": "model", "created": 1_700_000_000, "owned_by": "mock", **told} for name in MODELS]
    return compact({"object": "list", "data": listed})


def whole(answer: Answer) -> bytes:
    """Return an answer as one JSON object."""
    message: dict[str, Any] = {"role": "assistant", "content": "".join(answer.text), "refusal": None}
    if answer.reasoning:
        message["reasoning_content"] = "".join(answer.reasoning)
    if answer.tool_calls:
        message["content"] = message["content"] or None
        message["tool_calls"] = [
            {
                "id": _call_id(answer, at),
                "type": "function",
                "function": {"name": each.name, "arguments": each.arguments},
            }
            for at, each in enumerate(answer.tool_calls)
        ]
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish(answer)}
    return compact({**_head(answer, "chat.completion"), "choices": [choice], "usage": _usage(answer)})


def frames(answer: Answer, asked: Asked) -> Frames:
    """Return an answer as a stream of events."""
    # What every chunk has in common is written once; a provider under load writes many.
    usage = ',"usage":null' if asked.include_usage else ""
    head = compact(_head(answer, "chat.completion.chunk"))[:-1] + b',"choices":[{"index":0,"delta":'
    rest = f',"logprobs":null,"finish_reason":null}}]{usage}}}\n\n'.encode()

    def chunk(delta: Mapping[str, Any]) -> bytes:
        return b"data: " + head + compact(delta) + rest

    chunks = [chunk({"reasoning_content": piece}) for piece in answer.reasoning]
    chunks += [chunk({"content": piece}) for piece in answer.text]
    for at, call in enumerate(answer.tool_calls):
        function = {"name": call.name, "arguments": ""}
        begun = {"index": at, "id": _call_id(answer, at), "type": "function", "function": function}
        chunks.append(chunk({"tool_calls": [begun]}))
        for piece in arguments_in_two(call):
            chunks.append(chunk({"tool_calls": [{"index": at, "function": {"arguments": piece}}]}))
    end = rest.replace(b'"finish_reason":null', f'"finish_reason":"{_finish(answer)}"'.encode())
    closing = b"data: " + head + b"{}" + end
    if asked.include_usage:
        last = {**_head(answer, "chat.completion.chunk"), "choices": [], "usage": _usage(answer)}
        closing += b"data: " + compact(last) + b"\n\n"
    opening = chunk({"role": "assistant", "content": "", "refusal": None})
    return Frames(opening=opening, chunks=chunks, closing=closing, done=b"data: [DONE]\n\n")


def broken(piece: str) -> bytes:
    """Return a line of a stream that is no JSON."""
    return f'data: {{"id": {piece}\n\n'.encode()


def _head(answer: Answer, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-mock-{answer.number}",
        "object": kind,
        "created": answer.created,
        "model": answer.model,
        "system_fingerprint": "mock",
    }


def _usage(answer: Answer) -> dict[str, Any]:
    used = answer.usage
    return {
        "prompt_tokens": used.input,
        "completion_tokens": used.output,
        "total_tokens": used.input + used.output,
        "prompt_tokens_details": {"cached_tokens": used.cached},
    }


def _finish(answer: Answer) -> str:
    return "tool_calls" if answer.tool_calls else "stop"


def _call_id(answer: Answer, at: int) -> str:
    return f"call_mock_{answer.number}_{at}"
