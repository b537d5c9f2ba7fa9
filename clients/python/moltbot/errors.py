"""What a call that failed says: one exception, decoded from the `google.rpc` details of a status."""

from __future__ import annotations

import grpc
from google.rpc import error_details_pb2, status_pb2

from moltbot.v1 import chat_pb2, error_pb2

_DETAILS_KEY = "grpc-status-details-bin"
_PUSHBACK_KEY = "grpc-retry-pushback-ms"
_CODES = {code.value[0]: code for code in grpc.StatusCode}
# Without a reason these are the transport's words: a reset stream, a lost connection, a server that left.
_TRANSPORT = frozenset(
    {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED}
)
# What gRPC says when no connection came about at all: nobody listens there, or nothing leads there.
_NOBODY = "Failed to connect to remote host"
# Reasons whose wait is worth its while, for answers that do not say so themselves.
_RETRYABLE = frozenset(
    error_pb2.ErrorReason.Name(reason).removeprefix("ERROR_REASON_")
    for reason in (
        error_pb2.ERROR_REASON_SESSION_BUSY,
        error_pb2.ERROR_REASON_QUEUE_FULL,
        error_pb2.ERROR_REASON_STORAGE_FULL,
        error_pb2.ERROR_REASON_DEADLINE_EXCEEDED,
        error_pb2.ERROR_REASON_NOT_SERVING,
        error_pb2.ERROR_REASON_MODEL_UNAVAILABLE,
        error_pb2.ERROR_REASON_STORAGE_UNAVAILABLE,
        error_pb2.ERROR_REASON_TURN_INTERRUPTED,
        error_pb2.ERROR_REASON_SLOW_CONSUMER,
    )
)


class MoltBotClientError(Exception):
    """A call that failed.

    `code` is the gRPC status; `reason` a name of the contract's `ErrorReason` without its prefix, empty when the
    connection failed and not the core; `message` says what to do. `retryable` is true when the same call, with the
    same request id, may succeed while somebody waits; `retry_after` is in seconds, when known, and may also say when
    something ends that is not worth waiting for, such as the period of a budget. `fields` maps the path of a wrong
    field to what is wrong with it.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str = "",
        retryable: bool = False,
        retry_after: float | None = None,
        fields: dict[str, str] | None = None,
        never_reached: bool = False,
        is_final: bool = False,
    ) -> None:
        super().__init__(f"{code.name}{f' ({reason})' if reason else ''}: {message}")
        self.code = code
        self.message = message
        self.reason = reason
        self.retryable = retryable
        self.retry_after = retry_after
        self.fields = fields or {}
        self.never_reached = never_reached or reason == "NOT_SERVING"
        self.is_final = is_final

    @property
    def connection_broke(self) -> bool:
        """True when the core did not refuse: the way to it broke, or it is starting or leaving."""
        return self.reason == "NOT_SERVING" or (not self.reason and self.code in _TRANSPORT)


def from_status(error: grpc.aio.AioRpcError, address: str) -> MoltBotClientError:
    """Return the exception for a call to an address that ended with an error status.

    It says all that the status did, so that it need not be chained to the error of gRPC.
    """
    reason, told, retry_after, fields, is_final = "", "", None, {}, False
    for key, value in error.trailing_metadata() or ():
        if key == _PUSHBACK_KEY:
            text = value if isinstance(value, str) else value.decode("ascii", "replace")
            is_final = not (text.isascii() and text.isdigit())  # a negative number, or none: gRPC's "never"
            retry_after = None if is_final else int(text) / 1e3
        if key != _DETAILS_KEY or not isinstance(value, bytes):
            continue
        for detail in status_pb2.Status.FromString(value).details:
            if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                info = error_details_pb2.ErrorInfo.FromString(detail.value)
                reason, told = info.reason, info.metadata.get("retryable", "")
            elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
                retry_after = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay.ToNanoseconds() / 1e9
            elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
                violations = error_details_pb2.BadRequest.FromString(detail.value).field_violations
                fields = {violation.field: violation.description for violation in violations}
    likely = reason in _RETRYABLE or retry_after is not None or error.code() is grpc.StatusCode.UNAVAILABLE
    retryable = told == "true" if told else likely
    message = error.details() or "the core gave no reason"
    nobody = error.code() is grpc.StatusCode.UNAVAILABLE and not reason and _NOBODY in message
    if nobody:
        message = f"nobody answers at {address} ({_why(message)}): start MoltBot with `moltbot start`"
    return MoltBotClientError(
        error.code(),
        message,
        reason=reason,
        retryable=retryable and not is_final,
        retry_after=retry_after,
        fields=fields,
        never_reached=nobody,
        is_final=is_final,
    )


def _why(details: str) -> str:
    """Return the last cause that gRPC names, such as `Connection refused`."""
    return details.rpartition(_NOBODY)[2].strip(": ") or "no connection"


def from_event(failed: chat_pb2.Failed) -> MoltBotClientError:
    """Return the exception for a turn that ended with a `failed` event."""
    return MoltBotClientError(
        _CODES.get(failed.code, grpc.StatusCode.UNKNOWN),
        failed.message,
        reason=failed.reason,
        retryable=failed.retryable,
        retry_after=failed.retry_delay.ToNanoseconds() / 1e9 if failed.HasField("retry_delay") else None,
        fields={failed.field: failed.message.removeprefix(f"{failed.field}: ")} if failed.field else None,
    )
