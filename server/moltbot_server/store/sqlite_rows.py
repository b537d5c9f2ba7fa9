"""Rows of the embedded store and the values that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

import msgspec

from moltbot_server.store.damage import BROKEN, Unreadable
from moltbot_server.store.protocol import EndedTurn, NewTurn, StoredTurn
from moltbot_server.store.sealed import Sealed, seal
from moltbot_server.turns import (
    Event,
    Failed,
    FinishReason,
    Message,
    Part,
    Role,
    Session,
    SessionKey,
    TurnKey,
    TurnState,
)

MARK = "\x1f"
"""What a request_id ends with that another turn took over, and the session of a deleted turn begins with."""
IS_DELETED = "session >= char(31) AND session < ' '"
"""Tells rows of deleted turns, of which nothing is kept but the request_id, from others."""

TURN_COLUMNS = "workspace, session, ordinal, request_id, digest, state, create_time, end_time, events, node"
"""What `turn_of` makes a turn of."""

_parts: Sealed[tuple[Part, ...]] = Sealed(tuple[Part, ...])
_events: Sealed[tuple[Event, ...]] = Sealed(tuple[Event, ...])


Names = tuple[str, str, int]


def names_of(key: TurnKey) -> Names:
    """Return a turn's name as rows have it."""
    return key.session.workspace, key.session.session, key.ordinal


def session_of(
    workspace: str,
    session: str,
    title: str,
    user: str,
    channel: str,
    create_time: float,
    update_time: float,
    message_count: int,
) -> Session:
    """Return a session as it is listed."""
    return Session(
        key=SessionKey(workspace=workspace, session=session),
        title=title,
        user=user,
        channel=channel,
        create_time=create_time,
        update_time=update_time,
        message_count=message_count,
    )


def end_columns(turn: EndedTurn | None, keep: Callable[[Any], bytes] = seal) -> tuple[Any, ...]:
    """Return the columns that say how a turn ended: state, end_time, model, answer, events, finish.

    `keep` makes values what is kept of them.
    """
    if turn is None:
        return TurnState.RUNNING.value, 0.0, "", None, None, ""
    answer = keep(turn.answer) if turn.answer else None
    finish = turn.finish_reason.value if turn.finish_reason else ""
    return turn.state.value, turn.end_time, turn.model, answer, keep(turn.events), finish


def rest_columns(turn: NewTurn, ended: Container[TurnKey]) -> tuple[bytes | None, float]:
    """Return what it takes to carry a turn on; nothing for one that has ended."""
    if turn.rest is None or turn.key in ended:
        return None, 0.0
    return seal(msgspec.structs.replace(turn.rest, parts=())), turn.deadline


def turn_of(row: tuple[Any, ...] | None) -> StoredTurn | None:
    """Return a turn of its row, None for no row.

    Raises:
        Unreadable: the row is damaged.
    """
    if row is None:
        return None
    try:
        return _turn_of(row)
    except BROKEN as problem:
        raise Unreadable(*row[:3]) from problem


def _turn_of(row: tuple[Any, ...]) -> StoredTurn:
    workspace, session, ordinal, request_id, digest, state, create_time, end_time, events, node = row
    recorded = _events.decode(events) if events else ()
    last = recorded[-1].kind if recorded else None
    return StoredTurn(
        key=TurnKey(session=SessionKey(workspace=workspace, session=session), ordinal=ordinal),
        request_id=request_id.partition(MARK)[0],
        digest=digest,
        state=TurnState(state),
        create_time=create_time,
        end_time=end_time,
        events=recorded,
        retryable=state == TurnState.FAILED and (last is None or (isinstance(last, Failed) and last.retryable)),
        node=node if state == TurnState.RUNNING else "",
    )


def read_messages(workspace: str, session: str, row: Sequence[Any]) -> list[Message]:
    """Return the messages of one turn's row, which is as `messages_of` takes it.

    Raises:
        Unreadable: the row is damaged.
    """
    try:
        return messages_of(*row)
    except BROKEN as problem:
        raise Unreadable(workspace, session, row[0]) from problem


def messages_of(
    ordinal: int, question: bytes, answer: bytes | None, model: str, create_time: float, end_time: float, finish: str
) -> list[Message]:
    """Return the messages of one turn's row: what was asked and, if it was answered, the answer."""
    asked = Message(
        role=Role.USER, parts=_parts.decode(question), id=f"{ordinal}.0", turn=ordinal, create_time=create_time
    )
    if answer is None:
        return [asked]
    answered = Message(
        role=Role.ASSISTANT,
        parts=_parts.decode(answer),
        id=f"{ordinal}.1",
        turn=ordinal,
        model=model,
        create_time=end_time,
        finish_reason=FinishReason(finish) if finish else None,
    )
    return [asked, answered]
