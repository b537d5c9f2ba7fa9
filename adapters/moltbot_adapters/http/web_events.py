"""Events and stored messages of the contract as the JSON that the chat page reads."""

import base64
import json
from collections.abc import Callable, Mapping
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from moltbot.v1 import chat_pb2, message_pb2, session_pb2

from moltbot_adapters.core_errors import code_of

_FINISH = {number: name.removeprefix("FINISH_REASON_").lower() for name, number in message_pb2.FinishReason.items()}


def frame(event: chat_pb2.Event) -> bytes:
    """Returns the SSE frame of an event; empty for a kind that this adapter does not know."""
    kind = event.WhichOneof("kind")
    sequence = event.sequence
    if kind == "text_delta":  # by far the most frequent
        text = quoted(event.text_delta.text)
        return f'id: {sequence}\nevent: text_delta\ndata: {{"sequence":{sequence},"text":{text}}}\n\n'.encode()
    if kind is None or kind not in _BODIES:
        return b""
    body = json.dumps({"sequence": sequence, **_BODIES[kind](getattr(event, kind))}, separators=(",", ":"))
    return f"id: {sequence}\nevent: {kind}\ndata: {body}\n\n".encode()


def refused(status: int, body: bytes) -> bytes:
    """Returns the SSE frame of a refusal that comes when the status of the answer has left; `body` is that of an error.

    It has no number: it is no event of the turn, and who comes back does so after the last one.
    """
    return b'event: refused\ndata: {"status":%d,%b\n\n' % (status, body.removeprefix(b"{"))


def ends(event: chat_pb2.Event) -> bool:
    """Tells whether an event is the last one of its turn."""
    return event.HasField("completed") or event.HasField("failed")


def last_of(name: str) -> str:
    """Returns the last id of a resource name: `b` for `sessions/a/turns/b`."""
    return name.rpartition("/")[2]


def model_id(name: str) -> str:
    """Returns the id of a model's resource name, which may have slashes of its own: `a/b` for `models/a/b`."""
    return name.removeprefix("models/")


def timings(value: chat_pb2.Timings) -> dict[str, Any]:
    """Returns where a turn's time went, in milliseconds, and which models were asked where it was not simply one."""
    shown: dict[str, Any] = {
        "accept_ms": _ms(value.accept),
        "queue_ms": _ms(value.queue),
        "first_token_ms": _ms(value.first_token),
        "generation_ms": _ms(value.generation),
        "total_ms": _ms(value.total),
        "trimmed_messages": value.trimmed_messages,
        "history_messages": value.history_messages,
        "attempts": value.attempts,
    }
    if value.attempt_log:
        shown["attempt_log"] = [_attempt(attempt) for attempt in value.attempt_log]
    return shown


def _attempt(value: chat_pb2.Attempt) -> dict[str, Any]:
    return {
        "model": model_id(value.model),
        "outcome": value.outcome,
        "reason": value.reason,
        "start_ms": _ms(value.start),
        "first_token_ms": _ms(value.first_token) if value.HasField("first_token") else None,
        "total_ms": _ms(value.total),
    }


def session(value: session_pb2.Session) -> dict[str, Any]:
    """Returns a session as the page lists it."""
    active = None
    if value.HasField("active_turn"):
        active = {"id": last_of(value.active_turn.name), "last_sequence": value.active_turn.last_sequence}
    return {
        "id": last_of(value.name),
        "title": value.title,
        "update_time": _time(value.update_time),
        "message_count": value.message_count,
        "active_turn": active,
    }


def message(value: message_pb2.Message) -> dict[str, Any]:
    """Returns a stored message of the user or the assistant."""
    shown: dict[str, Any] = {
        "id": last_of(value.name),
        "role": "user" if value.role == message_pb2.ROLE_USER else "assistant",
        "text": "\n\n".join(part.text for part in value.parts if part.HasField("text")),
        "create_time": _time(value.create_time),
        "turn": last_of(value.turn),
        "model": model_id(value.model),
    }
    if value.finish_reason:
        shown["finish_reason"] = _FINISH.get(value.finish_reason, "stop")
    if attachments := [part(piece) for piece in value.parts if not piece.HasField("text")]:
        shown["attachments"] = attachments
    return shown


def part(value: message_pb2.Part) -> dict[str, Any]:
    """Returns one part of a message."""
    kind = value.WhichOneof("content")
    if kind == "text":
        return {"kind": kind, "text": value.text}
    if kind == "tool_call":
        return {"kind": kind, "tool": value.tool_call.tool}
    if kind not in ("image", "audio", "file"):
        return {"kind": kind or "unknown"}
    media: message_pb2.Media = getattr(value, kind)
    shown: dict[str, Any] = {
        "kind": kind,
        "media_type": media.media_type,
        "filename": media.filename,
        "size_bytes": media.size_bytes or len(media.data),
        "alt_text": media.alt_text,
    }
    if media.HasField("uri"):
        shown["uri"] = media.uri
    else:
        shown["data"] = base64.b64encode(media.data).decode()
    return shown


def _accepted(value: chat_pb2.Accepted) -> dict[str, Any]:
    return {
        "turn": last_of(value.turn),
        "session": last_of(value.session),
        "message": last_of(value.message),
        "request_id": value.request_id,
    }


def _routed(value: chat_pb2.Routed) -> dict[str, Any]:
    target = value.WhichOneof("target")
    if target == "model":
        return {target: model_id(value.model), "reason": value.reason}
    return {**({target: last_of(getattr(value, target))} if target else {}), "reason": value.reason}


def _completed(value: chat_pb2.Completed) -> dict[str, Any]:
    return {
        "text": value.text,
        "finish_reason": _FINISH.get(value.finish_reason, "stop"),
        "usage": {
            "input_tokens": value.usage.input_tokens,
            "output_tokens": value.usage.output_tokens,
            "cached_input_tokens": value.usage.cached_input_tokens,
        },
        "timings": timings(value.timings),
        "model": model_id(value.model),
        "message": last_of(value.message),
        "attachments": [part(piece) for piece in value.attachments],
        "reasoning": value.reasoning,
        "cached": value.cached,
    }


def _failed(value: chat_pb2.Failed) -> dict[str, Any]:
    return {
        "code": code_of(value.code).name,
        "reason": value.reason,
        "message": value.message,
        "retryable": value.retryable,
        "retry_after_ms": _ms(value.retry_delay) if value.HasField("retry_delay") else None,
        "timings": timings(value.timings),
    }


def _tool_finished(value: chat_pb2.ToolFinished) -> dict[str, Any]:
    result = value.result
    return {
        "call_id": result.call_id,
        "tool": result.tool,
        "output": result.output,
        "is_error": result.is_error,
        "duration_ms": _ms(value.duration),
    }


_BODIES: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "accepted": _accepted,
    "queued": lambda value: {"position": value.position},
    "routed": _routed,
    "reset": lambda value: {"text": value.text, "reason": value.reason},
    "reasoning_delta": lambda value: {"text": value.text},
    "attachment": lambda value: {"part": part(value.part)},
    "tool_started": lambda value: {
        "call_id": value.call.call_id,
        "tool": value.call.tool,
        "arguments": value.call.arguments_json,
    },
    "tool_finished": _tool_finished,
    "notice": lambda value: {
        "code": value.code,
        "from": model_id(getattr(value, "from")),
        "to": model_id(value.to),
        "reason": value.reason,
    },
    "completed": _completed,
    "failed": _failed,
}


def _ms(value: Duration) -> float:
    return round(value.seconds * 1000 + value.nanos / 1e6, 3)


def _time(value: Timestamp) -> str:
    return value.ToJsonString()
