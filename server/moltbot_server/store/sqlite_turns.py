"""Turns of the embedded store as they are written: many together, on the writer's thread, within a transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Container, Sequence
from typing import Any

from moltbot_server.errors import TurnInterrupted
from moltbot_server.store.protocol import EndedTurn, NewTurn, Taken
from moltbot_server.store.sealed import seal
from moltbot_server.store.sqlite_at_once import Row, write_at_once
from moltbot_server.store.sqlite_journal import append_entries, forget_entries
from moltbot_server.store.sqlite_outbox import post_ends, withdraw
from moltbot_server.store.sqlite_rows import end_columns, names_of, rest_columns
from moltbot_server.store.sqlite_sessions import Places
from moltbot_server.store.sqlite_use import LastUse
from moltbot_server.store.writer import Rows
from moltbot_server.turns import TurnKey

_INSERT_TURN = Rows(
    "INSERT INTO turns (workspace, session, ordinal, request_id, digest, create_time, question, "
    "node, rest, deadline, state, end_time, model, answer, events, finish) VALUES {rows} "
    "ON CONFLICT DO NOTHING",
    row="(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
)
_FINISH_TURN = Rows(
    "UPDATE turns SET state = column4, end_time = column5, model = column6, answer = column7, events = column8, "
    "finish = column9, rest = NULL FROM (VALUES {rows}) WHERE workspace = column1 AND session = column2 "
    "AND ordinal = column3 AND epoch = column10 AND node = column11",
    row="(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
)

# A turn whose request_id another turn took over: that one says its question now. The mark cannot be in a request_id.
_SUPERSEDE = """
UPDATE turns SET request_id = request_id || char(31) || rowid, question = x'90', rest = NULL,
    state = iif(state = 'running', 'failed', state)
WHERE workspace = ? AND request_id = ? AND state <> 'completed' AND state <> 'cancelled'
"""
# What was kept of one whose end could not be stored.
_FORGET_SUPERSEDED = """
DELETE FROM journal WHERE (workspace, session, ordinal) IN (
    SELECT workspace, session, ordinal FROM turns
    WHERE workspace = ? AND request_id = ? AND state <> 'completed' AND state <> 'cancelled'
)
"""
TAKEN_OVER = TurnInterrupted("another core has taken this turn over; follow it there")


class TurnWriter:
    """Writes turns of a node, and knows which of them have something in the journal's table."""

    def __init__(self, node: str, places: Places, used: LastUse) -> None:
        """`places` decides whether the node may change a session; `used` is told which ones it does."""
        self._node = node
        self._places = places
        self._used = used
        self._journaled: set[TurnKey] = set()
        self._forgotten: list[TurnKey] = []

    def kept_in_table(self, key: TurnKey) -> None:
        """Take note that what happened in a turn may be in the journal's table."""
        self._journaled.add(key)

    def at_once(self, connection: sqlite3.Connection, rows: Sequence[Row]) -> bool:
        """Write rows by a single statement if that can be; answer whether they are written."""
        if self._used.is_due or not write_at_once(connection, self._node, rows, self._journaled):
            return False
        for row in rows:
            if not isinstance(row, tuple):
                self._used.note(names_of(row.key)[:2], row.create_time if isinstance(row, NewTurn) else row.end_time)
        return True

    def write(self, connection: sqlite3.Connection, turns: Sequence[Row]) -> list[Any]:
        """Write rows, and answer what became of each; a turn that ended before it was stored is one row."""
        new = [turn for turn in turns if isinstance(turn, NewTurn)]
        ended = {turn.key: turn for turn in turns if isinstance(turn, EndedTurn)}
        entries = [entry for turn in turns if isinstance(turn, tuple) for entry in turn if entry.key not in ended]
        earlier = iter(self._insert(connection, new, ended) if new else ())
        left_out: Collection[TurnKey] = ()
        if entries:
            left_out = append_entries(connection, self._node, entries)
            self._journaled.update(entry.key for entry in entries)
        lost = self._update(connection, list(ended.values())) if ended else ()
        post_ends(connection, turns, self._node)
        if self._used.is_due:
            self._used.write(connection)

        def answer(turn: Row) -> Any:
            if isinstance(turn, NewTurn):
                return next(earlier)
            if isinstance(turn, EndedTurn):
                return TAKEN_OVER if turn.key in lost else None
            return [entry.key for entry in turn if entry.key in left_out]

        return [answer(turn) for turn in turns]

    def rewrite(self, connection: sqlite3.Connection, turn: NewTurn) -> Taken:
        """Write a turn in the place of a failed one with its request_id; one that another node runs stays."""
        if (refusal := self._places.keeps(connection, turn)) is not None:
            return refusal
        names = turn.key.session.workspace, turn.request_id
        withdraw(connection, *names, turn.create_time)
        connection.execute(_FORGET_SUPERSEDED, names)
        connection.execute(_SUPERSEDE, names)
        return self._insert(connection, [turn], {})[0]

    def over(self, stands: bool) -> None:
        """Take note that a transaction is over: an end that was undone comes again."""
        if stands:
            self._journaled.difference_update(self._forgotten)
        self._forgotten.clear()

    def _insert(
        self, connection: sqlite3.Connection, turns: Sequence[NewTurn], ended: dict[TurnKey, EndedTurn]
    ) -> list[Taken]:
        """Store new turns, taking from `ended` those that have ended; answer for each what became of it."""
        verdicts, changing = self._places.judge(connection, turns)
        # An end of a turn that is not stored must not be taken for that of another one with its number.
        ends = {turn.key: ended.pop(turn.key) for turn in turns if turn.key in ended}
        rows = [
            (
                turn.key.session.workspace,
                turn.key.session.session,
                turn.key.ordinal,
                turn.request_id,
                turn.digest,
                turn.create_time,
                seal(turn.question),
                self._node,
                *rest_columns(turn, ends),
                *end_columns(ends.get(turn.key)),
            )
            for turn, verdict in zip(turns, verdicts, strict=True)
            if verdict is None
        ]
        fresh = _INSERT_TURN.execute(connection, rows) == len(turns)
        answers: list[Taken] = [None] * len(turns)
        if not fresh:
            answers = [self._places.answer(connection, *judged) for judged in zip(turns, verdicts, strict=True)]
        stored = [turn for turn, answer in zip(turns, answers, strict=True) if answer is None]
        self._places.open(connection, [turn for turn in stored if turn.opens_session])
        for turn in stored:
            names = (turn.key.session.workspace, turn.key.session.session)
            if names in changing:
                self._places.take(connection, names)
            self._used.note(names, turn.create_time)
        return answers

    def _update(self, connection: sqlite3.Connection, turns: Sequence[EndedTurn]) -> Container[TurnKey]:
        """Store ends; return the turns that were not this core's any more."""
        rows = [(*names_of(turn.key), *end_columns(turn), turn.epoch, self._node) for turn in turns]
        whole = _FINISH_TURN.execute(connection, rows) == len(rows)
        lost = () if whole else {turn.key for turn in turns if self._was_taken(connection, turn)}
        kept = [turn.key for turn in turns if turn.key in self._journaled and turn.key not in lost]
        if kept:
            forget_entries(connection, map(names_of, kept))
            self._forgotten += kept
        for workspace, session, *_ in rows:
            self._used.note((workspace, session), turns[0].end_time)
        return lost

    def _was_taken(self, connection: sqlite3.Connection, turn: EndedTurn) -> bool:
        query = "SELECT epoch, node FROM turns WHERE workspace = ? AND session = ? AND ordinal = ?"
        found = connection.execute(query, names_of(turn.key)).fetchone()
        return found is not None and found != (turn.epoch, self._node)
