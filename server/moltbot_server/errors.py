"""The one tree of errors: what went wrong, whose fault it is, and whether trying again makes sense.

The core raises these; only `rpc` turns them into a gRPC status. `docs/errors.md` is generated from this tree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import IntEnum
from typing import Any, ClassVar


class Status(IntEnum):
    """The canonical codes of `google.rpc.Code`, without importing gRPC."""

    CANCELLED = 1
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class MoltBotError(Exception):
    """A failure with a meaning: `status`, `reason` and `retryable` are fixed by the class, the text by the raiser.

    `message` is shown to callers: plain English that says what to do next, without secrets or user text.
    `retry_after` is in seconds. `fields` maps a request field's path to what is wrong with it. `attempts` are what
    `turns.Attempt` says of the models that were asked before this became the outcome of a turn.
    """

    status: ClassVar[Status] = Status.INTERNAL
    reason: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False
    advice: ClassVar[str] = "Report it with the id from the message; the log has the details."

    def __init__(
        self, message: str, *, retry_after: float | None = None, fields: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after
        self.fields = dict(fields or {})
        self.attempts: tuple[Any, ...] = ()


class InvalidField(MoltBotError):
    """A field of the request is missing or wrong; `fields` names it."""

    status, reason = Status.INVALID_ARGUMENT, "INVALID_FIELD"
    advice = "Correct the field that BadRequest names."

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}", fields={field: problem})
        self.field, self._problem = field, problem

    def under(self, parent: str) -> InvalidField:
        """Return the same refusal, of a field inside `parent`."""
        return self.at(f"{parent}.{self.field}")

    def at(self, field: str) -> InvalidField:
        """Return the same refusal, of the field in which the caller sent what is refused."""
        moved = type(self)(field, self._problem)
        moved.retry_after = self.retry_after
        return moved


class EmptyMessage(InvalidField):
    """The message has no part, or only blank text."""

    reason = "EMPTY_MESSAGE"
    advice = "Send at least one part that is not blank."


class ContentTooLarge(InvalidField):
    """A part of the message is over its limit."""

    reason = "CONTENT_TOO_LARGE"
    advice = "Send less, or send it by reference."


class UnsupportedContent(InvalidField):
    """The model cannot read this kind of part."""

    reason = "UNSUPPORTED_CONTENT"
    advice = "Leave the part out, or choose a model whose capabilities name it."


class UnsupportedOption(InvalidField):
    """The model cannot honour a generation option; it is refused rather than ignored."""

    reason = "UNSUPPORTED_OPTION"
    advice = "Leave the option out, or choose a model whose capabilities name it."


class ContextLengthExceeded(InvalidField):
    """One message alone is longer than the model's context window."""

    reason = "CONTEXT_LENGTH_EXCEEDED"
    advice = "Shorten the message, or choose a model with a longer context."


class InvalidPageToken(InvalidField):
    """The page token was not given by this method."""

    reason = "INVALID_PAGE_TOKEN"
    advice = "Start again without a page token."


class Unauthenticated(MoltBotError):
    """The call has no credential, or one that is not known."""

    status, reason = Status.UNAUTHENTICATED, "UNAUTHENTICATED"
    advice = "Send the metadata `authorization: Bearer <key>` with a key of the workspace."


class PermissionDenied(MoltBotError):
    """The credential is known but may not do this."""

    status, reason = Status.PERMISSION_DENIED, "PERMISSION_DENIED"
    advice = "Use a credential whose role allows the call."


class SessionNotFound(MoltBotError):
    """The workspace has no such session."""

    status, reason = Status.NOT_FOUND, "SESSION_NOT_FOUND"
    advice = "List the sessions, or start a turn, which makes the session."


class TurnNotFound(MoltBotError):
    """The workspace has no such turn."""

    status, reason = Status.NOT_FOUND, "TURN_NOT_FOUND"
    advice = "Use the name from the `accepted` event."


class ModelNotFound(MoltBotError):
    """There is no such model."""

    status, reason = Status.NOT_FOUND, "MODEL_NOT_FOUND"
    advice = "List the models; leave the model empty for the default."


class PluginNotFound(MoltBotError):
    """There is no such plugin."""

    status, reason = Status.NOT_FOUND, "PLUGIN_NOT_FOUND"
    advice = "List the plugins."


class RequestIdReused(MoltBotError):
    """The request_id was used before with other content."""

    status, reason = Status.ALREADY_EXISTS, "REQUEST_ID_REUSED"
    advice = "Make a new request_id for new content."


class SessionBusy(MoltBotError):
    """A turn runs in the session, so the session cannot be changed now."""

    status, reason, retryable = Status.FAILED_PRECONDITION, "SESSION_BUSY", True
    advice = "Wait for the turn to end, or cancel it."


class QueueFull(MoltBotError):
    """Too much waits already; `retry_after` says when to come back."""

    status, reason, retryable = Status.RESOURCE_EXHAUSTED, "QUEUE_FULL", True
    advice = "Wait as long as RetryInfo says, then repeat with the same request_id."


class StorageFull(MoltBotError):
    """The disk or the database is full."""

    status, reason, retryable = Status.RESOURCE_EXHAUSTED, "STORAGE_FULL", True
    advice = "Free disk space; the core goes on by itself."


class DeadlineExceeded(MoltBotError):
    """The caller's deadline passed before the answer was complete."""

    status, reason, retryable = Status.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", True
    advice = "Allow more time, or ask for fewer tokens."


class NotServing(MoltBotError):
    """The core is starting or leaving, or another one carries the turn on."""

    status, reason, retryable = Status.UNAVAILABLE, "NOT_SERVING", True
    advice = "Repeat with the same request_id, on another node if there is one."

    def __init__(
        self, message: str, *, retry_after: float | None = None, node: str = "", handed_over: bool = False
    ) -> None:
        """`node` is the one that has the turn, if that is known; `handed_over`: it goes on somewhere."""
        super().__init__(message, retry_after=retry_after)
        self.node = node
        self.handed_over = handed_over or bool(node)

    @classmethod
    def elsewhere(cls, node: str = "") -> NotServing:
        """Return the refusal of what is another core's, or may be."""
        text = "another core has this turn: follow it there, or repeat the call"
        return cls(text, retry_after=1.0, node=node, handed_over=True)


class ModelUnavailable(MoltBotError):
    """The model cannot answer now."""

    status, reason, retryable = Status.UNAVAILABLE, "MODEL_UNAVAILABLE", True
    advice = "Repeat later; `GetModel` says what is wrong."


class StorageUnavailable(MoltBotError):
    """The store cannot be reached or written."""

    status, reason, retryable = Status.UNAVAILABLE, "STORAGE_UNAVAILABLE", True
    advice = "Repeat later; the core's log says what is wrong."


class TurnInterrupted(MoltBotError):
    """The core, or the engine that wrote the answer, stopped while the turn ran."""

    status, reason, retryable = Status.UNAVAILABLE, "TURN_INTERRUPTED", True
    advice = "Repeat with the same request_id: it starts the turn again."


class Unimplemented(MoltBotError):
    """This core cannot do that."""

    status, reason = Status.UNIMPLEMENTED, "UNIMPLEMENTED"
    advice = "Use a release that can; docs/architecture.md lists what this one does."


class InternalError(MoltBotError):
    """A fault of the core. The text holds an id and nothing else; the log holds the rest."""

    reason = "INTERNAL"


class ModelExists(MoltBotError):
    """Another model has this name."""

    status, reason = Status.ALREADY_EXISTS, "MODEL_EXISTS"
    advice = "Choose another name, or unload the model that has it."


class ModelNotLoadable(MoltBotError):
    """The model cannot be loaded: its folder is not right, its probe failed, or memory would not suffice."""

    status, reason = Status.FAILED_PRECONDITION, "MODEL_NOT_LOADABLE"
    advice = "The message says what was found and what was expected; nothing was changed."


class ModelInUse(MoltBotError):
    """The model answers by default and cannot be taken away."""

    status, reason = Status.FAILED_PRECONDITION, "MODEL_IN_USE"
    advice = "Switch to another model first."


class BudgetExceeded(MoltBotError):
    """The workspace, the user or the model has used up its budget; `retry_after` says when the next period begins."""

    status, reason = Status.RESOURCE_EXHAUSTED, "BUDGET_EXCEEDED"
    advice = "Wait for the next period, or raise the budget; `moltbot usage` says what was used."


class ModelCredential(MoltBotError):
    """The model's provider has no key here, or refuses the ones that it was given."""

    status, reason = Status.FAILED_PRECONDITION, "MODEL_CREDENTIAL"
    advice = "Give the provider a key that works, in the workspace of this MoltBot: `moltbot key add PROVIDER`."


class InvalidConfiguration(MoltBotError):
    """The new configuration is wrong; the old one holds."""

    status, reason = Status.FAILED_PRECONDITION, "INVALID_CONFIGURATION"
    advice = "The message says what is wrong and where; nothing was changed."


class DeliveryNotFound(MoltBotError):
    """The workspace has no such delivery, or no such dead letter."""

    status, reason = Status.NOT_FOUND, "DELIVERY_NOT_FOUND"
    advice = "Forget it: it was delivered long ago, retried, or dropped."


class LeaseLost(MoltBotError):
    """The delivery is leased to somebody else by now, or to nobody."""

    status, reason = Status.FAILED_PRECONDITION, "LEASE_LOST"
    advice = "Leave the delivery to whoever has it, and receive the next one."


class StorageDamaged(MoltBotError):
    """What is stored of a turn is damaged and cannot be read; the core's log names it."""

    status, reason = Status.DATA_LOSS, "STORAGE_DAMAGED"
    advice = "`moltbot store check` lists what is damaged: restore a backup, or reset the session."


class TurnDeleted(MoltBotError):
    """The request_id started a turn that was deleted with its session within the last day."""

    status, reason = Status.ALREADY_EXISTS, "TURN_DELETED"
    advice = "Leave it: its turn was carried out. Make a new request_id to ask again."


class SlowConsumer(MoltBotError):
    """Nothing was taken from the stream for a minute; the turn goes on and is stored."""

    status, reason, retryable = Status.RESOURCE_EXHAUSTED, "SLOW_CONSUMER", True
    advice = "Resume the turn after the last event that you saw, and read it as it comes."


class AddressTaken(OSError):
    """Another program listens where this process is to listen."""


class TurnFailed(Exception):
    """A turn that ended badly, told to a caller who waits for its outcome; what it says was counted when it ended."""

    def __init__(
        self,
        status: Status,
        reason: str,
        message: str,
        retryable: bool,
        retry_after: float | None = None,
        field: str = "",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message
        self.retryable = retryable
        self.retry_after = retry_after
        self.fields = {field: message.removeprefix(f"{field}: ")} if field else {}


def every_error() -> Iterator[type[MoltBotError]]:
    """Yield each error class that callers can meet, in the order of the contract's enum."""
    pending: list[type[MoltBotError]] = list(MoltBotError.__subclasses__())
    while pending:
        error = pending.pop(0)
        yield error
        pending[:0] = error.__subclasses__()


def markdown() -> str:
    """Return docs/errors.md: the table of status, reason and retryable, generated from the tree."""
    lines = [
        "# Errors",
        "",
        "Generated from `server/moltbot_server/errors.py` by `make docs`; do not edit.",
        "",
        "Every error status carries `google.rpc.ErrorInfo` with the domain `moltbot` and a reason of this table;",
        "`google.rpc.RetryInfo` where it is known when things change; `google.rpc.BadRequest` where a field is wrong.",
        "*Retry* is what the metadata of `ErrorInfo` have as `retryable`: whether the same call may succeed while",
        "somebody waits.",
        "",
        "| Reason | Status | Retry | What happened | What to do |",
        "| --- | --- | --- | --- | --- |",
    ]
    for error in every_error():
        what = (error.__doc__ or "").split("\n")[0]
        retry = "yes" if error.retryable else "no"
        lines.append(f"| `{error.reason}` | `{error.status.name}` | {retry} | {what} | {error.advice} |")
    return "\n".join(lines) + "\n"
