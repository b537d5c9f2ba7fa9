"""What happened in turns that were taken over, in SQLite: gone when the turn has ended.

What a core records by itself is in files beside the database, from which whoever takes its turns over brings it here.
Without its files, as on a disk that is full for them, a core keeps it here as well.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import msgspec

from moltbot_server.store.protocol import JournalEntry, Orphan, StoredTurn
from moltbot_server.store.sealed import Sealed, seal
from moltbot_server.store.sqlite_journal_files import JournalFiles
from moltbot_server.store.sqlite_rows import Names, names_of
from moltbot_server.store.writer import Rows
from moltbot_server.turns import Event, Part, SessionKey, TurnInput, TurnKey, TurnState

JOURNAL_SCHEMA = """
ALTER TABLE turns ADD COLUMN rest BLOB;
ALTER TABLE turns ADD COLUMN deadline REAL NOT NULL DEFAULT 0;
ALTER TABLE turns ADD COLUMN epoch INTEGER NOT NULL DEFAULT 1;
CREATE TABLE journal (
    workspace TEXT NOT NULL, session TEXT NOT NULL, ordinal INTEGER NOT NULL, sequence INTEGER NOT NULL,
    events BLOB NOT NULL, PRIMARY KEY (workspace, session, ordinal, sequence)
) WITHOUT ROWID;
"""

log = logging.getLogger(__name__)

_APPEND = Rows(
    "INSERT INTO journal (workspace, session, ordinal, sequence, events) "
    "SELECT column1, column2, column3, column4, column5 FROM (VALUES {rows}) AS new WHERE EXISTS ("
    "SELECT 1 FROM turns WHERE workspace = column1 AND session = column2 AND ordinal = column3 "
    "AND epoch = column6 AND node = column7 AND state = 'running') "
    "ON CONFLICT (workspace, session, ordinal, sequence) DO UPDATE SET events = excluded.events",
    row="(?, ?, ?, ?, ?, ?, ?)",
)
_RUNS = """
SELECT 1 FROM turns
WHERE workspace = ? AND session = ? AND ordinal = ? AND epoch = ? AND node = ? AND state = 'running'
"""
_FORGET = Rows(
    "DELETE FROM journal WHERE (workspace, session, ordinal) IN (VALUES {rows})",
    row="(?, ?, ?)",
)
_NODES = "SELECT DISTINCT node FROM turns WHERE state = 'running'"
# A turn of an earlier release, of which too little was kept to carry it on.
_UNFINISHABLE = "UPDATE turns SET state = 'failed', events = NULL WHERE state = 'running' AND rest IS NULL AND node = ?"
_DAMAGED = "UPDATE turns SET state = 'failed', events = NULL WHERE rowid = ?"
_ORPHANS = "SELECT rowid, workspace, session FROM turns WHERE state = 'running' AND node = ?"
# What others remember of the session is old from now on; so is what this node does.
_LET_GO = "UPDATE sessions SET node = '', version = version + 1 WHERE workspace = ? AND id = ?"
_TAKE = "UPDATE turns SET epoch = epoch + 1, node = ? WHERE rowid = ?"
_TAKEN = """
SELECT workspace, session, ordinal, request_id, digest, create_time, question, rest, deadline, epoch
FROM turns WHERE rowid = ?
"""

_events: Sealed[tuple[Event, ...]] = Sealed(tuple[Event, ...])
_parts: Sealed[tuple[Part, ...]] = Sealed(tuple[Part, ...])
_rest: Sealed[TurnInput] = Sealed(TurnInput)


def append_entries(connection: sqlite3.Connection, node: str, entries: Sequence[JournalEntry]) -> Collection[TurnKey]:
    """Keep entries, and return the turns of those left out: they do not run, or another core has taken them over."""
    rows = [_row(entry, node) for entry in entries]
    if _APPEND.execute(connection, rows) == len(rows):
        return ()
    return {
        entry.key
        for entry in entries
        if connection.execute(_RUNS, (*names_of(entry.key), entry.epoch, node)).fetchone() is None
    }


def _row(entry: JournalEntry, node: str) -> tuple[Any, ...]:
    return *names_of(entry.key), entry.events[0].sequence, seal(entry.events), entry.epoch, node


def forget_entries(connection: sqlite3.Connection, names: Iterable[Names]) -> None:
    """Delete what was kept of turns that have ended."""
    _FORGET.execute(connection, tuple(names))


def take_over(
    connection: sqlite3.Connection, node: str, gone: Callable[[Collection[str]], Collection[str]], files: JournalFiles
) -> tuple[list[Orphan], Collection[str]]:
    """Make the turns of other nodes this one's; return them with what was kept of them, and whose `files` were read.

    `gone` tells which of some nodes are.
    """
    others = {name for (name,) in connection.execute(_NODES)}.union(files.others()) - {node}
    taken = sorted(gone(others))
    found: list[tuple[int, str, str]] = []
    for name in taken:
        _APPEND.execute(connection, [_row(entry, name) for entry in files.take(name)])
        connection.execute(_UNFINISHABLE, (name,))
        found += connection.execute(_ORPHANS, (name,)).fetchall()
    for names in sorted({(workspace, session) for _, workspace, session in found}):
        connection.execute(_LET_GO, names)
    orphans = []
    for rowid, *_ in sorted(found):
        connection.execute(_TAKE, (node, rowid))
        try:
            orphans.append(_orphan(connection, *connection.execute(_TAKEN, (rowid,)).fetchone()))
        except (msgspec.MsgspecError, ValueError, TypeError):
            # It keeps no other one waiting, and no core from starting.
            log.exception("a turn of a core that is gone cannot be read and is not carried on", extra={"row": rowid})
            connection.execute(_DAMAGED, (rowid,))
    # A turn that ended while its entries were being written leaves none; this is for what nobody foresaw.
    connection.execute(
        "DELETE FROM journal WHERE NOT EXISTS (SELECT 1 FROM turns t WHERE t.workspace = journal.workspace "
        "AND t.session = journal.session AND t.ordinal = journal.ordinal AND t.state = 'running')"
    )
    return orphans, taken


def _orphan(
    connection: sqlite3.Connection,
    workspace: str,
    session: str,
    ordinal: int,
    request_id: str,
    digest: bytes,
    create_time: float,
    question: bytes,
    rest: bytes,
    deadline: float,
    epoch: int,
) -> Orphan:
    kept: list[tuple[Any, ...]] = connection.execute(
        "SELECT events FROM journal WHERE workspace = ? AND session = ? AND ordinal = ? ORDER BY sequence",
        (workspace, session, ordinal),
    ).fetchall()
    turn = StoredTurn(
        key=TurnKey(session=SessionKey(workspace=workspace, session=session), ordinal=ordinal),
        request_id=request_id,
        digest=digest,
        state=TurnState.RUNNING,
        create_time=create_time,
        events=tuple(event for (events,) in kept for event in _events.decode(events)),
    )
    asked = msgspec.structs.replace(_rest.decode(rest), parts=_parts.decode(question))
    return Orphan(turn=turn, input=asked, epoch=epoch, deadline=deadline)
