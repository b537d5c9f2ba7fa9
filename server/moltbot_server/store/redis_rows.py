"""Names in Redis, and the values that its fields stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import msgspec

from moltbot_server.store.damage import BROKEN, Unreadable
from moltbot_server.store.protocol import EndedTurn, NewTurn, Orphan, StoredSession, StoredTurn
from moltbot_server.store.redis_line import Argument
from moltbot_server.store.redis_outbox import posting_arguments
from moltbot_server.store.sealed import Sealed
from moltbot_server.store.sqlite_rows import end_columns, read_messages, session_of, turn_of
from moltbot_server.turns import Event, Message, Part, Session, SessionKey, TurnInput, TurnKey, TurnState, encode

EMPTY = encode(())
TURN_FIELDS = ("r", "d", "s", "c", "e", "v", "n")
ORPHAN_FIELDS = ("r", "d", "c", "q", "x", "l")
SESSION_FIELDS = ("title", "user", "channel", "create", "update", "messages", "ephemeral")

_events: Sealed[tuple[Event, ...]] = Sealed(tuple[Event, ...])
_parts: Sealed[tuple[Part, ...]] = Sealed(tuple[Part, ...])
_rest: Sealed[TurnInput] = Sealed(TurnInput)


def base_of(prefix: str, workspace: str) -> str:
    """Return how the keys of a workspace begin."""
    return f"{{{prefix}:{quote(workspace, safe='')}}}:"


def name_of(key: TurnKey) -> str:
    """Return a turn's name in its workspace."""
    return f"{key.ordinal}:{key.session.session}"


def key_of(workspace: str, name: bytes) -> TurnKey:
    """Return the key of a turn by its name."""
    ordinal, _, session = name.decode().partition(":")
    return TurnKey(session=SessionKey(workspace=workspace, session=session), ordinal=int(ordinal))


def accept_arguments(node: str, turn: NewTurn) -> tuple[Argument, ...]:
    """Return what the scripts that accept a turn are told."""
    rest = encode(msgspec.structs.replace(turn.rest, parts=())) if turn.rest is not None else b""
    return (
        node,
        turn.key.session.session,
        turn.key.ordinal,
        turn.request_id,
        turn.digest,
        turn.create_time,
        encode(turn.question),
        rest,
        turn.deadline,
        int(turn.opens_session),
        turn.title,
        turn.user,
        turn.channel,
        int(turn.ephemeral),
        turn.version,
    )


def finish_arguments(node: str, turn: EndedTurn) -> tuple[Argument, ...]:
    """Return what the script that ends a turn is told."""
    # Without checksums: cores of an earlier release, which may share this Redis, could not read them.
    state, end_time, model, answer, events, finish = end_columns(turn, encode)
    key = turn.key
    return (
        node, key.session.session, key.ordinal, turn.epoch, state, end_time, model, answer or b"", events, finish,
        *posting_arguments(turn.delivery),
    )  # fmt: skip


def turn_from(key: TurnKey, fields: Sequence[bytes | None]) -> StoredTurn | None:
    """Return a turn of `TURN_FIELDS`, None when there is none."""
    request, digest, state, create, end, events, node = fields
    if request is None or digest is None or state is None or create is None or end is None:
        return None
    names = (key.session.workspace, key.session.session, key.ordinal)
    try:
        row = (request.decode(), digest, state.decode(), float(create), float(end), events, (node or b"").decode())
    except BROKEN as problem:
        raise Unreadable(*names) from problem
    return turn_of((*names, *row))


def orphan_from(key: TurnKey, epoch: int, fields: Sequence[bytes], entries: Sequence[Any]) -> Orphan:
    """Return a turn that was taken over, of `ORPHAN_FIELDS` and what is in its journal."""
    request, digest, create, question, rest, deadline = fields
    # What was sent twice, because the first answer was lost, is there twice, the second time with what came after.
    events = {event.sequence: event for _, (_, events) in entries for event in _events.decode(events)}
    turn = StoredTurn(
        key=key,
        request_id=request.decode(),
        digest=digest,
        state=TurnState.RUNNING,
        create_time=float(create),
        events=tuple(events[sequence] for sequence in sorted(events)),
    )
    asked = msgspec.structs.replace(_rest.decode(rest), parts=_parts.decode(question))
    return Orphan(turn=turn, input=asked, epoch=epoch, deadline=float(deadline))


def loaded_from(key: SessionKey, found: Sequence[Any]) -> StoredSession | None:
    """Return what the script `load` found."""
    if not found:
        return None
    base, last, version, runs, *turns = found
    messages = [message for turn in reversed(turns) for message in messages_from(key, turn)]
    return StoredSession(
        last_ordinal=max(int(base), int(last)),
        messages=tuple(messages),
        version=int(version),
        running_on=runs.decode(),
    )


def messages_from(key: SessionKey, turn: Sequence[bytes | None]) -> list[Message]:
    """Return the messages of a turn: ordinal, question, answer, model, times of both, why it ended.

    Raises:
        Unreadable: the turn is damaged.
    """
    number, question, answer, model, create, end, finish = turn
    ordinal = int(number or 0)
    try:
        rest = ((model or b"").decode(), float(create or 0), float(end or 0), (finish or b"").decode())
    except BROKEN as problem:
        raise Unreadable(key.workspace, key.session, ordinal) from problem
    return read_messages(key.workspace, key.session, (ordinal, question or EMPTY, answer, *rest))


def session_from(key: SessionKey, fields: Sequence[bytes | None]) -> Session | None:
    """Return a session of `SESSION_FIELDS` as it is listed; None when there is none, or none that is listed."""
    title, user, channel, create, update, count, ephemeral = fields
    if title is None or ephemeral != b"0":
        return None
    return session_of(
        key.workspace,
        key.session,
        title.decode(),
        (user or b"").decode(),
        (channel or b"").decode(),
        float(create or 0),
        float(update or 0),
        int(count or 0),
    )
