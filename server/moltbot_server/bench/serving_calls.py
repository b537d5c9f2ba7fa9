"""What became of one call of a benchmark: when, how it ended, and whether what was told fits together."""

from __future__ import annotations

import time

import grpc
from grpc import aio
from moltbot.v1 import chat_pb2, inference_pb2, message_pb2

from moltbot_server.rpc.remote_errors import error_of
from moltbot_server.turns import Value

_CODES = {code.value[0]: code.name for code in grpc.StatusCode}
_WHOLE = frozenset(
    {message_pb2.FINISH_REASON_STOP, message_pb2.FINISH_REASON_LENGTH, message_pb2.FINISH_REASON_STOP_TEXT}
)
_LONGEST = 120
EMPTY, CUT = "EMPTY", "CUT"
"""Stand for a status where a call ended well and its answer did not: without text, or without a good end."""


class Ended(Value, frozen=True, kw_only=True, array_like=True):
    """A call that has ended. Times are `perf_counter`'s, which all processes of a machine share.

    `due` is when it should have been sent, `first` when its first text was there, 0 for never. `status` is the name of
    a gRPC status, of the call or of its failed event, or one of ours. `advised` tells that a refusal said when to come
    back, in its details and to gRPC's own retries. `accepted`: it became a turn. `mixed`: more than one model or text
    was told of. `forgotten` counts messages of its session that the model should have read and did not. `text` is what
    was said of a failure.
    """

    due: float
    sent: float
    first: float
    ended: float
    status: str
    reason: str = ""
    advised: bool = False
    accepted: bool = False
    mixed: bool = False
    model: str = ""
    forgotten: int = 0
    text: str = ""


class Hearing:
    """Takes in what a call tells, up to its end."""

    def __init__(self, *, due: float, sent: float, history: int = 0) -> None:
        """`history` is how many messages of the session the model has to know of."""
        self._due, self._sent, self._history = due, sent, history
        self._first = 0.0
        self._pieces: list[str] = []
        self._models: set[str] = set()
        self._status, self._reason, self._said = CUT, "", ""
        self._accepted = self._mixed = self._advised = False
        self._forgotten = 0

    def event(self, event: chat_pb2.Event) -> None:
        """Take in an event of a turn."""
        kind = event.WhichOneof("kind")
        if kind == "text_delta":
            self._text(event.text_delta.text)
        elif kind == "accepted":
            self._accepted = True
        elif kind == "routed":
            self._models.add(event.routed.model)
        elif kind == "reset":
            self._pieces = [event.reset.text]
        elif kind == "completed":
            self._completed(event.completed)
        elif kind == "failed":
            self._status = _CODES.get(event.failed.code, "UNKNOWN")
            self._reason, self._said = event.failed.reason, event.failed.message
            self._advised = event.failed.HasField("retry_delay")

    def response(self, response: inference_pb2.GenerateResponse) -> None:
        """Take in a response of an engine."""
        if response.text:
            self._text(response.text)
        if response.HasField("finished"):
            self._models.add(response.finished.model)
            self._well(response.finished.finish_reason)

    def ended(self, status: str = "", reason: str = "", text: str = "", *, advised: bool = False) -> Ended:
        """Return what became of the call, which ends now; with a status of its own if it has one."""
        return Ended(
            due=self._due,
            sent=self._sent,
            first=self._first,
            ended=time.perf_counter(),
            status=status or self._status,
            reason=reason or self._reason,
            advised=advised or self._advised,
            accepted=self._accepted,
            mixed=self._mixed,
            model=next(iter(self._models), ""),
            forgotten=self._forgotten,
            text=(text or self._said)[:_LONGEST],
        )

    def _text(self, text: str) -> None:
        if not self._first:
            self._first = time.perf_counter()
        self._pieces.append(text)

    def _completed(self, completed: chat_pb2.Completed) -> None:
        self._models.add(completed.model)
        self._mixed = len(self._models) != 1 or "".join(self._pieces) != completed.text
        read = completed.timings.history_messages + completed.timings.trimmed_messages
        self._forgotten = max(0, self._history - read)
        self._well(completed.finish_reason)

    def _well(self, reason: message_pb2.FinishReason.ValueType) -> None:
        if reason not in _WHOLE:
            self._status = CUT
        else:
            self._status = "OK" if "".join(self._pieces).strip() else EMPTY


def failed(heard: Hearing, problem: aio.AioRpcError) -> Ended:
    """Return what became of a call that ended with an error status."""
    error = error_of(problem, "the server")
    pushback = any(key == "grpc-retry-pushback-ms" for key, _ in problem.trailing_metadata() or ())
    code = problem.code()
    status = code.name if code is not None else "UNKNOWN"
    said = problem.details() or problem.debug_error_string() or ""
    return heard.ended(status, error.reason, said, advised=pushback and error.retry_after is not None)
