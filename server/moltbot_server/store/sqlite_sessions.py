"""Which node has a session, in SQLite.

A session in which turns run belongs to the node that runs them. One in which none runs belongs to nobody, and whoever
knows all that was said may go on with it: its version tells, a number of its row and the last ordinal together. The
row's number changes when another node than before accepts a turn, and with each reset and take-over, which both leave a
row that is nobody's; it begins anywhere, so that a session that is made again never has a version again.
"""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections.abc import Sequence
from typing import Any

from moltbot_server.store.protocol import GUESSED, KEEP_REQUESTS, Deleted, Elsewhere, Moved, NewTurn, StoredTurn, Taken
from moltbot_server.store.sqlite_rows import MARK, TURN_COLUMNS, turn_of
from moltbot_server.store.writer import Rows
from moltbot_server.turns import TurnState

SESSIONS_SCHEMA = """
ALTER TABLE sessions ADD COLUMN node TEXT NOT NULL DEFAULT '';
ALTER TABLE sessions ADD COLUMN version INTEGER NOT NULL DEFAULT 1;
ALTER TABLE turns ADD COLUMN node TEXT NOT NULL DEFAULT '';
UPDATE turns SET node = 'unknown' WHERE state = 'running';
DROP INDEX turns_running;
CREATE INDEX turns_running ON turns (workspace, session) WHERE state = 'running';
"""

CATCH_UP = """
UPDATE sessions SET update_time = recent.used FROM (
    SELECT workspace, session, max(max(create_time, end_time)) AS used
    FROM (SELECT * FROM turns ORDER BY rowid DESC LIMIT 1000) GROUP BY workspace, session
) AS recent
WHERE sessions.workspace = recent.workspace AND sessions.id = recent.session AND sessions.update_time < recent.used
"""
"""Tells what a crash kept from being written: at most a second of turns, which are the latest."""

_FIND = Rows(
    "SELECT s.workspace, s.id, s.node, s.version FROM (VALUES {rows}) AS asked "
    "CROSS JOIN sessions s ON s.workspace = asked.column1 AND s.id = asked.column2",
    row="(?, ?)",
)
_INSERT = Rows(
    "INSERT INTO sessions (workspace, id, title, user, channel, create_time, update_time, base_ordinal, ephemeral, "
    "node, version) VALUES {rows} "
    "ON CONFLICT (workspace, id) DO UPDATE SET title = excluded.title WHERE sessions.title = ''",
    row="(?, ?, ?, ?, ?, ?, ?, 0, ?, ?, ?)",
)
_LAST = """
SELECT max(base_ordinal, coalesce((SELECT max(ordinal) FROM turns WHERE workspace = ?1 AND session = ?2), 0))
FROM sessions WHERE workspace = ?1 AND id = ?2
"""
_DELETE = """
DELETE FROM turns WHERE workspace = ? AND session = ? AND (create_time < ? OR instr(request_id, char(31)) > 0)
"""
_BLANK = """
UPDATE turns SET session = char(31) || rowid, ordinal = 0, state = 'failed', digest = x'', end_time = 0, model = '',
    question = x'90', answer = NULL, events = NULL, finish = '', rest = NULL, deadline = 0
WHERE workspace = ? AND session = ?
"""
_RESET = """
UPDATE sessions SET title = '', node = '', version = version + 1, base_ordinal = max(base_ordinal, coalesce(
    (SELECT max(ordinal) FROM turns WHERE workspace = ?1 AND session = ?2), 0))
WHERE workspace = ?1 AND id = ?2
"""

SessionNames = tuple[str, str]
"""A session's workspace and name, as rows have them."""


class Places:
    """Decides, within a transaction, whether this node may change a session. `shared`: there are other nodes."""

    def __init__(self, node: str, *, shared: bool) -> None:
        self.node = node
        self.shared = shared

    def judge(
        self, connection: sqlite3.Connection, turns: Sequence[NewTurn]
    ) -> tuple[list[Elsewhere | Moved | None], set[SessionNames]]:
        """Return for each turn why it cannot be accepted, or None; and the sessions that change their node thereby."""
        names = [(turn.key.session.workspace, turn.key.session.session) for turn in turns]
        rows = _FIND.fetch(connection, list(dict.fromkeys(names)))
        known: dict[SessionNames, tuple[str, int]] = {
            (workspace, session): (node, version) for workspace, session, node, version in rows
        }
        verdicts: list[Elsewhere | Moved | None] = []
        changing: set[SessionNames] = set()
        for turn, name in zip(turns, names, strict=True):
            row = known.get(name)
            if row is None:
                verdict: Elsewhere | Moved | None = None if turn.version in (0, GUESSED) else Moved()
                if verdict is None:
                    known[name] = (self.node, 0)
            elif turn.version == GUESSED:
                verdict = self.elsewhere(connection, name) or Moved()
            elif row[0] == self.node:
                verdict = None
            else:
                verdict = self._judge_stranger(connection, name, turn, row[1])
                if verdict is None:
                    changing.add(name)
            verdicts.append(verdict)
        return verdicts, changing

    def answer(self, connection: sqlite3.Connection, turn: NewTurn, verdict: Elsewhere | Moved | None) -> Taken:
        """Return what is told of a turn that was judged, and stored if that was well and nothing stood in its way."""
        earlier, is_this = self._earlier(connection, turn)
        if earlier is not None or is_this:
            return earlier
        return verdict or Moved()  # its number is another turn's

    def keeps(self, connection: sqlite3.Connection, turn: NewTurn) -> Taken:
        """Return why a turn may not take the place of an earlier one with its request_id; None when it may."""
        earlier, _ = self._earlier(connection, turn)
        if isinstance(earlier, Deleted):
            return earlier
        if earlier is not None:
            runs_elsewhere = self.shared and earlier.node not in ("", self.node)
            if earlier.state in (TurnState.COMPLETED, TurnState.CANCELLED) or runs_elsewhere:
                return earlier
        return self.judge(connection, [turn])[0][0]

    def _earlier(self, connection: sqlite3.Connection, turn: NewTurn) -> tuple[StoredTurn | Deleted | None, bool]:
        """Return the turn that holds a request_id, unless it is this one, and whether it is this one.

        One that this node has taken over is not, nor one that it had before, though they may have this one's number.
        """
        query = f"SELECT epoch, {TURN_COLUMNS} FROM turns WHERE workspace = ? AND request_id = ?"
        row = connection.execute(query, (turn.key.session.workspace, turn.request_id)).fetchone()
        if row and row[2].startswith(MARK):
            return Deleted(), False
        found = turn_of(row[1:]) if row else None
        same = found is not None and (found.key, found.create_time) == (turn.key, turn.create_time)
        is_this = same and row[0] == 1 and row[-1] == self.node
        return (None if is_this else found), is_this

    def _judge_stranger(
        self, connection: sqlite3.Connection, names: SessionNames, turn: NewTurn, version: int
    ) -> Elsewhere | Moved | None:
        """Judge a turn of a session that is not this node's."""
        if elsewhere := self.elsewhere(connection, names):
            return elsewhere
        return None if turn.version == version + connection.execute(_LAST, names).fetchone()[0] else Moved()

    def elsewhere(self, connection: sqlite3.Connection, names: SessionNames) -> Elsewhere | None:
        """Return which other node runs turns of a session, if one does."""
        runs = self.runs(connection, names) if self.shared else ""
        return Elsewhere(node=runs) if runs not in ("", self.node) else None

    def runs(self, connection: sqlite3.Connection, names: SessionNames) -> str:
        """Return the node that runs turns of a session, empty for none."""
        query = "SELECT node FROM turns WHERE workspace = ? AND session = ? AND state = 'running' LIMIT 1"
        found = connection.execute(query, names).fetchone()
        return str(found[0]) if found else ""

    def take(self, connection: sqlite3.Connection, names: SessionNames) -> None:
        """Make a session this node's."""
        query = "UPDATE sessions SET node = ?, version = version + 1 WHERE workspace = ? AND id = ? AND node <> ?"
        connection.execute(query, (self.node, *names, self.node))

    def open(self, connection: sqlite3.Connection, turns: Sequence[NewTurn]) -> None:
        """Make the rows of the sessions of turns, or give them their titles."""
        _INSERT.execute(connection, [self._row(turn) for turn in turns])

    def _row(self, turn: NewTurn) -> tuple[Any, ...]:
        session, now = turn.key.session, turn.create_time
        told = (turn.title, turn.user, turn.channel, now, now, int(turn.ephemeral))
        return session.workspace, session.session, *told, self.node, secrets.randbits(61) + 1

    def reset(self, connection: sqlite3.Connection, names: SessionNames) -> Elsewhere | None:
        """Delete a session's turns, unless another node runs some; its ordinals go on."""
        if elsewhere := self.elsewhere(connection, names):
            return elsewhere
        connection.execute(_RESET, names)
        _delete_turns(connection, names)
        return None

    def delete(self, connection: sqlite3.Connection, names: SessionNames) -> Elsewhere | bool:
        """Delete a session and its turns, unless another node runs some; answer whether there was one."""
        if elsewhere := self.elsewhere(connection, names):
            return elsewhere
        _delete_turns(connection, names)
        return connection.execute("DELETE FROM sessions WHERE workspace = ? AND id = ?", names).rowcount > 0


def _delete_turns(connection: sqlite3.Connection, names: SessionNames) -> None:
    """Delete the turns of a session; of those of late the request_id is kept, in rows that belong to no session."""
    connection.execute(_DELETE, (*names, time.time() - KEEP_REQUESTS))
    connection.execute(_BLANK, names)
    connection.execute("DELETE FROM journal WHERE workspace = ? AND session = ?", names)
