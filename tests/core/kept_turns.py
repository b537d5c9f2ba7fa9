"""Turns to be kept: rows, their ends, and what a store says of them."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
from moltbot_server.store import EndedTurn, NewTurn, Store
from moltbot_server.turns import (
    Accepted,
    Completed,
    Event,
    Failed,
    FinishReason,
    Part,
    SessionKey,
    TextDelta,
    TextPart,
    Timings,
    TurnKey,
    TurnState,
    Usage,
)

Reopen = Callable[[], Awaitable[Store]]
"""Closes a store and opens it again."""

TIMES = itertools.count(1_000.0, 2.0)
"""Moments of use, each later than the one before."""


def said(text: str) -> tuple[Part, ...]:
    """Return what a message with one text holds."""
    return (TextPart(text=text),)


def key(session: str = "s", workspace: str = "w") -> SessionKey:
    """Return a session's name."""
    return SessionKey(workspace=workspace, session=session)


def new(ordinal: int = 1, session: str = "s", workspace: str = "w", text: str = "question", **fields: Any) -> NewTurn:
    """Return a turn to be accepted."""
    values: dict[str, Any] = {
        "request_id": f"{session}-{ordinal}",
        "digest": b"d",
        "create_time": next(TIMES),
        **fields,
    }
    return NewTurn(key=TurnKey(session=key(session, workspace), ordinal=ordinal), question=said(text), **values)


def ended(turn: NewTurn, answer: str = "answer", state: TurnState = TurnState.COMPLETED, **last: Any) -> EndedTurn:
    """Return how a turn ended."""
    accepted = Accepted(session=turn.key.session.session, ordinal=turn.key.ordinal, request_id=turn.request_id)
    kind: Completed | Failed
    finish = FinishReason.CANCELLED if state is TurnState.CANCELLED else FinishReason.STOP
    if state is TurnState.FAILED:
        kind = Failed(**{"status": 14, "reason": "MODEL_UNAVAILABLE", "message": "no", "retryable": True, **last})
    else:
        kind = Completed(
            text=answer,
            finish_reason=finish,
            usage=Usage(output_tokens=2),
            timings=Timings(total=0.5),
            model="m",
        )
    events = tuple(
        Event(sequence=number, at=turn.create_time + number, kind=kind)
        for number, kind in enumerate((accepted, TextDelta(text=answer), kind), start=1)
    )
    failed = state is TurnState.FAILED
    return EndedTurn(
        key=turn.key,
        state=state,
        end_time=next(TIMES),
        events=events,
        answer=() if failed or not answer else said(answer),
        model="m",
        finish_reason=None if failed else finish,
    )


async def known(store: Store, turn: NewTurn) -> NewTurn:
    """Return a turn as whoever has loaded its session accepts it."""
    loaded = await store.load_session(turn.key.session, 1)
    return msgspec.structs.replace(turn, version=loaded.version if loaded else 0)


async def keep(store: Store, turn: NewTurn, **end: Any) -> EndedTurn:
    """Store a turn with its end."""
    assert await store.accept(await known(store, turn)) is None
    end_of_it = ended(turn, **end)
    await store.finish(end_of_it)
    return end_of_it


async def texts(store: Store, session: str = "s") -> list[str]:
    """Return the texts of a session's messages."""
    return [message.text for message in await store.list_messages(key(session), after=(0, 0), limit=100)]


def tear(path: Path, text: str) -> bool:
    """Write over the page of a closed database that holds a text; return whether there is one."""
    whole = path.read_bytes()
    size, place = int.from_bytes(whole[16:18], "big"), whole.find(text.encode())
    if place >= 0:
        begin = place // size * size
        path.write_bytes(whole[:begin] + b"\xa5" * size + whole[begin + size :])
    return place >= 0


async def everything(store: Store) -> list[str]:
    """Return the names of all sessions that are listed."""
    found = await store.list_sessions("w", user="", channel="", before=None, limit=100)
    return [session.key.session for session in found]
