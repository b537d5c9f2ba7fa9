"""The end of a turn, as it is stored: before anybody sees it."""

from __future__ import annotations

from moltbot_server.live_turn import LiveTurn
from moltbot_server.store import EndedTurn
from moltbot_server.store.outbox import delivery_of
from moltbot_server.turns import Completed, Failed, FinishReason, Part, TextPart, TurnState


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
