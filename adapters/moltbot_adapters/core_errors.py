"""What the contract knows of errors, as adapters need it."""

import grpc
from moltbot.v1 import error_pb2

REASONS = frozenset(name.removeprefix("ERROR_REASON_") for name in error_pb2.ErrorReason.keys())  # noqa: SIM118 (an enum, no mapping)
"""Every reason that the contract knows, without its prefix."""


def code_of(number: int) -> grpc.StatusCode:
    """Returns the status for a `google.rpc.Code`; UNKNOWN for a number that is none."""
    return _BY_NUMBER.get(number, grpc.StatusCode.UNKNOWN)


_BY_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
