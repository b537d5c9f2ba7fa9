"""The end of a turn, as it is stored: before anybody sees it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from moltbot_server.errors import InvalidField, MoltBotError, StorageFull, StorageUnavailable
from moltbot_server.live_turn import LiveTurn
from moltbot_server.models.context import Fitted
from moltbot_server.models.engine import Finished
from moltbot_server.store import EndedTurn
from moltbot_server.store.outbox import delivery_of
from moltbot_server.turns import (
    Attempt,
    Completed,
    Failed,
    FinishReason,
    Message,
    Part,
    Role,
    TextPart,
    Timings,
    TurnState,
    Usage,
)


def end_of(live: LiveTurn, ending: Completed | Failed, model: str) -> EndedTurn:
    """Close a turn, and return its end with the answer that its session keeps and with what is to be delivered.

    `model` is who was asked, for a turn that failed.
    """
    events = live.close(ending)
    answer: tuple[Part, ...] = ()
    state = TurnState.FAILED
    if isinstance(ending, Completed):
        cancelled = ending.finish_reason is FinishReason.CANCELLED
        state = TurnState.CANCELLED if cancelled else TurnState.COMPLETED
        answer = (TextPart(text=ending.text), *ending.attachments) if ending.text else ending.attachments
    return EndedTurn(
        key=live.key,
        state=state,
        end_time=events[-1].at,
        events=events,
        answer=answer,
        model=ending.model if isinstance(ending, Completed) else model,
        finish_reason=ending.finish_reason if isinstance(ending, Completed) else None,
        epoch=live.epoch,
        delivery=delivery_of(live.key, live.input, ending),
    )


def timings(
    live: LiveTurn,
    started: float,
    first_text: float,
    *,
    fitted: Fitted,
    end: Finished | None,
    attempts: Sequence[Attempt],
) -> Timings:
    """Return where the time of a turn went, up to now.

    `started` is when its place in the session came, `first_text` when there was something to read; both are on
    `time.perf_counter`, 0 for not yet. `fitted` is what the model was given, `attempts` are those of a route.
    """
    now = time.perf_counter()
    waited, trimmed = (end.queue, end.trimmed_messages) if end else (0.0, 0)
    # A model was asked: not before the turn's place came, nor for an answer that was kept.
    asked = bool(started) and not (end is not None and end.cached)
    started, first = started or now, first_text or now
    return Timings(
        accept=live.accepted_after,
        queue=started - live.arrived + waited,
        first_token=max(0.0, first - started - waited),
        generation=now - first,
        total=now - live.arrived + live.age,
        trimmed_messages=fitted.trimmed_messages + trimmed,
        history_messages=fitted.history_messages - trimmed,
        attempts=len([1 for attempt in attempts if attempt.outcome != "SKIPPED"]) or int(asked),
        attempt_log=tuple(attempts),
    )


def failed(error: MoltBotError, timings: Timings) -> Failed:
    """Return the event of an answer that an error ended."""
    return Failed(
        status=error.status,
        reason=error.reason,
        message=error.message,
        retryable=error.retryable,
        retry_after=error.retry_after,
        timings=timings,
        field=error.field if isinstance(error, InvalidField) else "",
    )


def joined(timings: Timings, leader: int) -> Completed:
    """Return the end of a turn that a later one answers too."""
    return Completed(text="", finish_reason=FinishReason.JOINED, usage=Usage(), timings=timings, answered_by=leader)


def remembered(live: LiveTurn, end: EndedTurn) -> list[Message]:
    """Return what a session remembers of a turn that ended: nothing of one without an answer, unless it was joined."""
    if live.input.transcript is not None or not (end.answer or end.finish_reason is FinishReason.JOINED):
        return []
    ordinal = live.key.ordinal
    messages = [Message(role=Role.USER, parts=live.input.parts, turn=ordinal)]
    if end.answer:
        messages.append(Message(role=Role.ASSISTANT, parts=end.answer, turn=ordinal, model=end.model))
    return messages


def unkept(error: MoltBotError) -> MoltBotError:
    """Return what followers are told while a turn's end cannot be stored: the turn itself is, whatever is full."""
    if not isinstance(error, StorageFull):
        return error
    text = "the answer could not be kept yet, for the store is full; ask again with the same request_id"
    return StorageUnavailable(text, retry_after=1.0)
