"""What a caller is told when no model of a route could answer: the one error that is of most use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moltbot_server.errors import (
    BudgetExceeded,
    InvalidField,
    ModelCredential,
    ModelUnavailable,
    MoltBotError,
    QueueFull,
)

_LONGEST = 160


class Refusal(NamedTuple):
    """Why one model did not answer; `asked` where it was asked, and not passed over."""

    model: str
    error: Exception
    asked: bool


def final_error(refusals: Sequence[Refusal]) -> MoltBotError:
    """Return the error that a turn ends with; a retryable one where a repetition may find any model well."""
    hopeful = [refusal for refusal in refusals if not isinstance(refusal.error, InvalidField | ModelCredential)]
    if refusals and not hopeful:
        return _mendable(refusals)
    only = refusals[0].error if len(refusals) == 1 else None
    if isinstance(only, MoltBotError) and only.retryable:
        return only
    waits = [wait for refusal in hopeful if (wait := getattr(refusal.error, "retry_after", None)) is not None]
    last = {refusal.model: refusal for refusal in refusals}  # one that was asked twice is named once
    told = f"{_count(refusals)} could answer: {'; '.join(map(_line, last.values()))}"
    kind: type[MoltBotError] = ModelUnavailable
    if hopeful and all(isinstance(refusal.error, BudgetExceeded) for refusal in hopeful):
        kind = BudgetExceeded
    elif hopeful and all(isinstance(refusal.error, QueueFull | BudgetExceeded) for refusal in hopeful):
        kind = QueueFull
    return kind(told, retry_after=min(waits, default=None))


def message_of(error: Exception) -> str:
    """Return what may be told of an error: nothing of one that nobody expected."""
    return error.message if isinstance(error, MoltBotError) else "it failed in an unexpected way; the log says how"


def _mendable(refusals: Sequence[Refusal]) -> MoltBotError:
    """Return the error whose cause somebody can mend: the caller what a model objected to, else the operator a key."""
    objections = [refusal.error for refusal in refusals if refusal.asked and isinstance(refusal.error, InvalidField)]
    credentials = [refusal.error for refusal in refusals if isinstance(refusal.error, ModelCredential)]
    unsuited = [refusal.error for refusal in refusals if isinstance(refusal.error, InvalidField)]
    return (*objections, *credentials, *unsuited)[0]


def _count(refusals: Sequence[Refusal]) -> str:
    models = len({refusal.model for refusal in refusals})
    asked = len({refusal.model for refusal in refusals if refusal.asked})
    return f"None of the route's {models} models ({asked} asked)" if models != 1 else "Not even the route's only model"


def _line(refusal: Refusal) -> str:
    text = message_of(refusal.error).strip().rstrip(".")
    return f"{refusal.model}: {text if len(text) <= _LONGEST else text[: _LONGEST - 1] + '…'}"
