"""What a store has in the end, read by the core's own code when no core runs any more."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path

from fault_history import Entry, Kept, KeptEvent, Listed, Told, name_of, ordinal_of
from moltbot_server.store import Store
from moltbot_server.store.sqlite_journal_files import folder_of, recorded
from moltbot_server.turns import Completed, Reset, SessionKey, TextDelta, TurnKey

_WORKSPACE = "default"
_PAGE = 500


async def kept_in(store: Store, history: Iterable[Entry]) -> list[Entry]:
    """Return what a store has of all that a history names; it is opened and closed here."""
    turns = {entry.turn for entry in history if isinstance(entry, Told) and entry.turn}
    sessions = {turn.split("/")[1] for turn in turns}
    await store.open()
    try:
        listed = [await _listed(store, session) for session in sorted(sessions)]
        for session, _, numbers in listed:
            turns |= {name_of(session, number) for number in numbers}
        kept = [entry for turn in sorted(turns) if (entry := await _kept(store, turn)) is not None]
    finally:
        await store.close()
    last: dict[str, int] = {}
    for entry in kept:
        last[entry.request] = max(last.get(entry.request, 0), ordinal_of(entry.turn))
    standing = [_giving_way(entry, last[entry.request]) for entry in kept]
    return [*standing, *(Listed(session=session, texts=texts) for session, texts, _ in listed)]


def _giving_way(entry: Kept, last: int) -> Kept:
    """A later turn of the same request_id stands in the place of those before it."""
    return Kept(
        turn=entry.turn,
        request=entry.request,
        state=entry.state,
        events=entry.events,
        gave_way=ordinal_of(entry.turn) < last and entry.state == "failed",
    )


async def _listed(store: Store, session: str) -> tuple[str, tuple[str, ...], set[int]]:
    key = SessionKey(workspace=_WORKSPACE, session=session)
    texts: list[str] = []
    numbers: set[int] = set()
    after = (0, 0)
    while page := await store.list_messages(key, after=after, limit=_PAGE):
        texts += [message.text for message in page]
        numbers |= {message.turn for message in page}
        ordinal, index = page[-1].id.split(".")
        after = (int(ordinal), int(index))
    return session, tuple(texts), numbers


async def _kept(store: Store, turn: str) -> Kept | None:
    session = SessionKey(workspace=_WORKSPACE, session=turn.split("/")[1])
    found = await store.find_turn(TurnKey(session=session, ordinal=ordinal_of(turn)))
    if found is None:
        return None
    events = tuple(
        KeptEvent(
            sequence=event.sequence,
            at=event.at,
            kind=str(type(event.kind).__struct_config__.tag),
            text=event.kind.text if isinstance(event.kind, TextDelta | Reset | Completed) else "",
        )
        for event in found.events
    )
    return Kept(turn=turn, request=found.request_id, state=found.state.value, events=events)


def journal_entries(database: Path) -> int:
    """Return how many entries of journals there still are, in a database and in the files beside it."""
    connection = sqlite3.connect(database)
    try:
        rows = int(connection.execute("SELECT count(*) FROM journal").fetchone()[0])
    finally:
        connection.close()
    return rows + sum(1 for _ in recorded(folder_of(database)))
