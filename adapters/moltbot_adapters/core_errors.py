"""What the core answers when it refuses: a gRPC status decoded into one exception."""

import grpc
from google.rpc import error_details_pb2, status_pb2
from moltbot.v1 import error_pb2

_DETAILS_KEY = "grpc-status-details-bin"
_PREFIX = "ERROR_REASON_"

REASONS = frozenset(name.removeprefix(_PREFIX) for name in error_pb2.ErrorReason.keys())  # noqa: SIM118 (an enum, no mapping)
"""Every reason that the contract knows, without its prefix."""


class CoreError(Exception):
    """A refusal or a failure of the core, or of the way to it.

    `reason` is a name of the contract's `ErrorReason` without its prefix, or empty when the status did not come from
    the core itself (a broken connection, say). `retry_after` is in seconds. `field` is the field that was wrong.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        *,
        reason: str = "",
        message: str = "",
        retry_after: float | None = None,
        field: str = "",
    ) -> None:
        super().__init__(code.name, reason, message)
        self.code = code
        self.reason = reason
        self.message = message
        self.retry_after = retry_after
        self.field = field

    @property
    def never_reached(self) -> bool:
        """True when the core cannot have begun the call, or refused it because it was starting or leaving."""
        return self.code is grpc.StatusCode.UNAVAILABLE and self.reason in ("", "NOT_SERVING")

    @property
    def connection_broke(self) -> bool:
        """True when following the same turn again may go on where the stream broke."""
        if self.never_reached or self.reason == "SLOW_CONSUMER":
            return True
        # Without a reason these are the transport's words: a reset stream, a lost connection, a server that left.
        broken = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED)
        return not self.reason and self.code in broken


def decode(error: grpc.aio.AioRpcError) -> CoreError:
    """Returns the exception for a failed call, with what `google.rpc` details tell."""
    reason, field, retry_after = "", "", None
    for key, value in error.trailing_metadata() or ():
        if key != _DETAILS_KEY or not isinstance(value, bytes):
            continue
        for detail in status_pb2.Status.FromString(value).details:
            if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                reason = error_details_pb2.ErrorInfo.FromString(detail.value).reason
            elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
                delay = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay
                retry_after = delay.seconds + delay.nanos / 1e9
            elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
                violations = error_details_pb2.BadRequest.FromString(detail.value).field_violations
                field = violations[0].field if violations else ""
    # Only the core's own words are passed on: the transport's name addresses and files.
    message = (error.details() or "") if reason else ""
    reason = reason.removeprefix(_PREFIX)
    return CoreError(error.code(), reason=reason, message=message, retry_after=retry_after, field=field)


def code_of(number: int) -> grpc.StatusCode:
    """Returns the status for a `google.rpc.Code`; UNKNOWN for a number that is none."""
    return _BY_NUMBER.get(number, grpc.StatusCode.UNKNOWN)


_BY_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
