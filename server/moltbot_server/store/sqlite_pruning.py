"""What is forgotten by and by in SQLite, in steps for which nobody has to wait: sessions that nobody has used for long,
and the request_ids of turns that were deleted.

What they took in the file is used again for what comes: the file grows to what is kept at most, and never shrinks.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

from moltbot_server.store.sqlite_rows import IS_DELETED

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


def prune_requests(connection: sqlite3.Connection, before: float) -> int:
    """Delete what is kept of deleted turns that were accepted before a time, and return how many in this step."""
    left = _TURNS
    for workspace in _workspaces(connection, "turns"):
        left -= connection.execute(
            "DELETE FROM turns WHERE rowid IN "
            f"(SELECT rowid FROM turns WHERE workspace = ? AND {IS_DELETED} AND create_time < ? LIMIT ?)",
            (workspace, before, left),
        ).rowcount
        if not left:
            break
    return _TURNS - left


def _old(connection: sqlite3.Connection, before: float, ephemeral: bool) -> Iterator[tuple[str, str]]:
    left = _SESSIONS
    for workspace in _workspaces(connection, "sessions"):
        sessions = connection.execute(
            "SELECT id FROM sessions WHERE workspace = ? AND ephemeral = ? AND update_time < ? LIMIT ?",
            (workspace, int(ephemeral), before, left),
        ).fetchall()
        left -= len(sessions)
        for (session,) in sessions:
            yield workspace, session
        if left <= 0:
            return


def _workspaces(connection: sqlite3.Connection, table: str) -> Iterator[str]:
    """Yield the workspaces of a table that has an index which begins with it."""
    workspace = ""
    while True:
        found = connection.execute(f"SELECT min(workspace) FROM {table} WHERE workspace > ?", (workspace,)).fetchone()
        if found[0] is None:
            return
        workspace = found[0]
        yield workspace


def _has_turns(connection: sqlite3.Connection, names: tuple[str, str]) -> bool:
    query = "SELECT 1 FROM turns WHERE workspace = ? AND session = ? LIMIT 1"
    return connection.execute(query, names).fetchone() is not None
