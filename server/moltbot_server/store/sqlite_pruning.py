"""Sessions that nobody has used for long, deleted from SQLite in steps for which nobody has to wait.

What they took in the file is used again for what comes: the file grows to what is kept at most, and never shrinks.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

_SESSIONS = 1000
_TURNS = 2000
"""Turns that one step deletes at most: some 20 ms."""


def prune_sessions(connection: sqlite3.Connection, before: float, *, ephemeral: bool) -> int:
    """Delete sessions last used before a time, and return how many; a long one counts in each step that it takes."""
    left, pruned = _TURNS, 0
    for workspace, session in _old(connection, before, ephemeral):
        names = (workspace, session)
        left -= connection.execute(
            "DELETE FROM turns WHERE rowid IN "
            "(SELECT rowid FROM turns WHERE workspace = ? AND session = ? ORDER BY ordinal LIMIT ?)",
            (*names, left),
        ).rowcount
        pruned += 1
        if left > 0 or not _has_turns(connection, names):
            connection.execute("DELETE FROM journal WHERE workspace = ? AND session = ?", names)
            connection.execute("DELETE FROM sessions WHERE workspace = ? AND id = ?", names)
        if left <= 0:
            break
    return pruned


def _old(connection: sqlite3.Connection, before: float, ephemeral: bool) -> Iterator[tuple[str, str]]:
    """Yield the sessions, from one workspace to the next: the index of sessions begins with it."""
    workspace, left = "", _SESSIONS
    while left > 0:
        found = connection.execute("SELECT min(workspace) FROM sessions WHERE workspace > ?", (workspace,)).fetchone()
        if found[0] is None:
            return
        workspace = found[0]
        sessions = connection.execute(
            "SELECT id FROM sessions WHERE workspace = ? AND ephemeral = ? AND update_time < ? LIMIT ?",
            (workspace, int(ephemeral), before, left),
        ).fetchall()
        left -= len(sessions)
        for (session,) in sessions:
            yield workspace, session


def _has_turns(connection: sqlite3.Connection, names: tuple[str, str]) -> bool:
    query = "SELECT 1 FROM turns WHERE workspace = ? AND session = ? LIMIT 1"
    return connection.execute(query, names).fetchone() is not None
