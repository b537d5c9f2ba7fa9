"""What another process of ours answered, back in the core's own errors."""

from __future__ import annotations

from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode, aio
from moltbot.v1 import inference_pb2

from moltbot_server.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidField,
    ModelUnavailable,
    MoltBotError,
    every_error,
)

_BY_REASON = {error.reason: error for error in every_error()}
_TRANSPORT = frozenset({StatusCode.UNAVAILABLE, StatusCode.INTERNAL, StatusCode.UNKNOWN})
_DETAILS = "grpc-status-details-bin"


def error_of(problem: aio.AioRpcError, who: str) -> MoltBotError:
    """Return the error that a call to `who` ended with; its class is the one that was raised over there."""
    error = _told(problem)
    if error is not None:
        return error
    if problem.code() is StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded("the deadline passed before the answer was complete")
    if problem.code() is StatusCode.UNAVAILABLE:
        return ModelUnavailable(f"{who} cannot be reached.", retry_after=1.0)
    code = problem.code()
    return InternalError(f"{who} answered {code.name if code else 'nothing'}")


def was_told(problem: aio.AioRpcError) -> bool:
    """Tell whether the other side ended the call with a word of its own, be it one that is not known here."""
    return any(key == _DETAILS for key, _ in problem.trailing_metadata() or ())


def was_lost(problem: aio.AioRpcError) -> bool:
    """Tell whether the connection broke, so that the other side did not end the call with a word of its own."""
    return _told(problem) is None and problem.code() in (
        StatusCode.UNAVAILABLE,
        StatusCode.INTERNAL,
        StatusCode.UNKNOWN,
    )


def _told(problem: aio.AioRpcError) -> MoltBotError | None:
    packed = next((value for key, value in problem.trailing_metadata() or () if key == _DETAILS), None)
    if not isinstance(packed, bytes):
        return None
    try:
        details = status_pb2.Status.FromString(packed).details
    except DecodeError:
        return None
    kind: type[MoltBotError] | None = None
    retry_after: float | None = None
    fields: dict[str, str] = {}
    for detail in details:
        info, retry, bad = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo(), error_details_pb2.BadRequest()
        if detail.Unpack(info):
            kind = _BY_REASON.get(info.reason)
        elif detail.Unpack(retry):
            retry_after = retry.retry_delay.ToNanoseconds() / 1e9
        elif detail.Unpack(bad):
            fields = {violation.field: violation.description for violation in bad.field_violations}
    if kind is None:
        return None
    text = problem.details() or kind.reason
    return _of(kind, *next(iter(fields.items()), ("request", text)), text, retry_after)


def error_in_band(failed: inference_pb2.GenerationFailed, who: str) -> MoltBotError:
    """Return the error with which `who` ended a generation of a stream of many."""
    kind = _BY_REASON.get(failed.reason)
    if kind is None:
        return InternalError(f"{who} answered {failed.reason or failed.code}")
    text = failed.message or kind.reason
    delay = failed.retry_delay.ToNanoseconds() / 1e9 if failed.HasField("retry_delay") else None
    return _of(kind, failed.field or "request", text, text, delay)


def _of(kind: type[MoltBotError], field: str, problem: str, text: str, retry_after: float | None) -> MoltBotError:
    if issubclass(kind, InvalidField):
        return kind(field, problem)
    return kind(text, retry_after=retry_after)
