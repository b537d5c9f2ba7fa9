"""The outbox in SQLite: a row for each delivery. Of the open ones of a place the first alone has a time when it is due.

What is posted keeps its row for a while, without its text, so that a late or repeated confirmation finds it.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from moltbot_server.errors import MoltBotError
from moltbot_server.store.outbox import (
    UNSAID,
    UNWANTED,
    Channel,
    DeadLetter,
    Delivery,
    Held,
    Leased,
    NewDelivery,
    lease_lost,
    never_leased,
    not_found,
)
from moltbot_server.store.protocol import EndedTurn
from moltbot_server.store.sealed import Sealed, seal
from moltbot_server.turns import Completed, Failed, Place, SessionKey, TurnKey

OUTBOX_SCHEMA = """
CREATE TABLE outbox (
    number INTEGER PRIMARY KEY, workspace TEXT NOT NULL, id TEXT NOT NULL, channel TEXT NOT NULL,
    address TEXT NOT NULL, session TEXT NOT NULL, ordinal INTEGER NOT NULL, request_id TEXT NOT NULL,
    ending BLOB NOT NULL, create_time REAL NOT NULL, state TEXT NOT NULL DEFAULT 'open', due REAL,
    leased INTEGER NOT NULL DEFAULT 0, attempt INTEGER NOT NULL DEFAULT 0, spared INTEGER NOT NULL DEFAULT 0,
    over_time REAL NOT NULL DEFAULT 0, note TEXT NOT NULL DEFAULT ''
);
CREATE UNIQUE INDEX outbox_by_id ON outbox (workspace, id);
CREATE INDEX outbox_due ON outbox (workspace, channel, due) WHERE state = 'open' AND due IS NOT NULL;
CREATE INDEX outbox_by_request ON outbox (workspace, request_id) WHERE state = 'open' AND attempt = 0;
CREATE INDEX outbox_places ON outbox (workspace, channel, address, number) WHERE state = 'open';
CREATE INDEX outbox_over ON outbox (state, over_time) WHERE state <> 'open';
"""

_POST = """
INSERT INTO outbox (workspace, id, channel, address, session, ordinal, request_id, ending, create_time, due)
SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, iif(EXISTS (SELECT 1 FROM outbox
    WHERE workspace = ?1 AND channel = ?3 AND address = ?4 AND state = 'open'), NULL, ?9)
WHERE {stored} ON CONFLICT (workspace, id) DO NOTHING
"""
# Whose end was stored has a delivery: in the same transaction, and once.
_POST_STORED = _POST.format(
    stored="EXISTS (SELECT 1 FROM turns WHERE workspace = ?1 AND session = ?5 AND ordinal = ?6 AND request_id = ?7 "
    "AND epoch = ?10 AND node = ?11 AND state <> 'running')"
)
_POST_ANY = _POST.format(stored="?10")
_NEXT = """
UPDATE outbox SET due = ?4 WHERE due IS NULL AND number = (SELECT min(number) FROM outbox
    WHERE workspace = ?1 AND channel = ?2 AND address = ?3 AND state = 'open')
"""
_DUE = """
SELECT 1 FROM outbox WHERE workspace = ? AND channel = ? AND state = 'open' AND due <= ? LIMIT 1
"""
_COLUMNS = "workspace, id, channel, address, session, ordinal, request_id, ending, attempt, create_time"
_READY = f"""
SELECT number, spared, {_COLUMNS} FROM outbox
WHERE workspace = ? AND channel = ? AND state = 'open' AND due <= ? ORDER BY due, number LIMIT ?
"""
_LEASE = "UPDATE outbox SET leased = 1, attempt = attempt + 1, due = ? WHERE number = ?"
_RENEW = """
UPDATE outbox SET due = ? WHERE workspace = ? AND id = ? AND attempt = ? AND leased AND state = 'open'
"""
_BURY = "UPDATE outbox SET state = 'dead', leased = 0, due = NULL, over_time = ?, note = ? WHERE number = ?"
_ROW = """
SELECT number, channel, address, state, leased, attempt, spared, note FROM outbox WHERE workspace = ? AND id = ?
"""
_EMPTY = b""
_TOGETHER = 500

_ending: Sealed[Completed | Failed] = Sealed(Completed | Failed)
T = TypeVar("T")

Run = Callable[[Callable[[sqlite3.Connection], Any]], Awaitable[Any]]
"""Runs something with a connection, and returns what that returns."""


def post_ends(connection: sqlite3.Connection, rows: Iterable[object], node: str) -> None:
    """Put the deliveries of ends of a node into the outbox, if they were stored; part of that transaction."""
    for turn in rows:
        if isinstance(turn, EndedTurn) and turn.delivery is not None:
            connection.execute(_POST_STORED, (*_columns(turn, turn.delivery), turn.epoch, node))


def post(connection: sqlite3.Connection, turn: EndedTurn) -> None:
    """Put the delivery of an end that is stored elsewhere into the outbox."""
    if turn.delivery is not None:
        connection.execute(_POST_ANY, (*_columns(turn, turn.delivery), True))


def _columns(turn: EndedTurn, delivery: NewDelivery) -> tuple[Any, ...]:
    session, place = turn.key.session, delivery.place
    names = session.workspace, delivery.id, place.channel, place.address
    return *names, session.session, turn.key.ordinal, delivery.request_id, seal(delivery.ending), turn.end_time


def withdraw(connection: sqlite3.Connection, workspace: str, request_id: str, now: float) -> None:
    """Take back what nobody was given of the earlier turn of a request_id, whose place another turn takes."""
    found = connection.execute(
        "SELECT number, channel, address FROM outbox "
        "WHERE workspace = ? AND request_id = ? AND state = 'open' AND attempt = 0",
        (workspace, request_id),
    ).fetchall()
    for number, channel, address in found:
        connection.execute("DELETE FROM outbox WHERE number = ?", (number,))
        connection.execute(_NEXT, (workspace, channel, address, now))


class SqliteOutbox:
    """An `Outbox` in a SQLite database."""

    def __init__(self, read: Run, write: Run) -> None:
        """`read` and `write` run something with a connection: what is written is on the disk when that is answered."""
        self._run_read, self._run_write = read, write

    async def due(self, channels: Collection[Channel]) -> Collection[Channel]:
        """Return the channels in which something can be leased now."""
        now = time.time()

        def read(connection: sqlite3.Connection) -> list[Channel]:
            return [channel for channel in channels if connection.execute(_DUE, (*channel, now)).fetchone()]

        return await self._read(read)

    async def lease(self, channel: Channel, *, limit: int, seconds: float, most_attempts: int) -> Leased:
        """Lease what can be leased, the longest due first."""

        def write(connection: sqlite3.Connection) -> Leased:
            now = time.time()
            found, dead = [], 0
            for number, spared, *row in connection.execute(_READY, (*channel, now, limit)).fetchall():
                delivery = _delivery(row, attempt=row[8] + 1)
                if delivery.attempt - spared > most_attempts:
                    _bury(connection, number, (*channel, delivery.place.address), now, UNSAID)
                    dead += 1
                else:
                    connection.execute(_LEASE, (now + seconds, number))
                    found.append(delivery)
            return Leased(deliveries=tuple(found), dead=dead)

        return await self._write(write)

    async def renew(self, leases: Sequence[Held], seconds: float) -> Collection[Held]:
        """Let leases end later, and return those that have ended."""

        def write(connection: sqlite3.Connection) -> list[Held]:
            until = time.time() + seconds
            return [
                lease
                for lease in leases
                if not connection.execute(_RENEW, (until, lease.workspace, lease.id, lease.attempt)).rowcount
            ]

        return await self._write(write)

    async def confirm(self, workspace: str, id: str, message: str) -> tuple[str, Place | None]:
        """Take note that a delivery was posted."""

        def write(connection: sqlite3.Connection) -> tuple[str, Place | None] | MoltBotError:
            row = connection.execute(_ROW, (workspace, id)).fetchone()
            if row is None:
                return not_found()
            number, channel, address, state, _, attempt, _, note = row
            if state == "delivered":
                return note, None
            if not attempt:
                return never_leased()
            now = time.time()
            connection.execute(
                "UPDATE outbox SET state = 'delivered', leased = 0, due = NULL, over_time = ?, note = ?, ending = ? "
                "WHERE number = ?",
                (now, message, _EMPTY, number),
            )
            connection.execute(_NEXT, (workspace, channel, address, now))
            return message, Place(channel=channel, address=address)

        return _or_raise(await self._write(write))

    async def reject(
        self, lease: Held, *, reason: str, delay: float, permanent: bool, most_attempts: int
    ) -> tuple[bool, Place | None]:
        """Give a lease back, or the delivery up."""

        def write(connection: sqlite3.Connection) -> tuple[bool, Place | None] | MoltBotError:
            row = connection.execute(_ROW, (lease.workspace, lease.id)).fetchone()
            if row is None:
                return not_found()
            number, channel, address, state, leased, attempt, spared, _ = row
            if attempt != lease.attempt or state == "delivered":
                return lease_lost()
            if not leased:
                return state == "dead", None  # the same call came twice
            place, now = Place(channel=channel, address=address), time.time()
            if permanent or attempt - spared >= most_attempts:
                _bury(connection, number, (lease.workspace, channel, address), now, reason)
                return True, place
            connection.execute(
                "UPDATE outbox SET leased = 0, due = ?, note = ? WHERE number = ?", (now + delay, reason, number)
            )
            return False, place

        return _or_raise(await self._write(write))

    async def list_dead(
        self, workspace: str, *, channel: str, before: tuple[float, str] | None, limit: int
    ) -> Sequence[DeadLetter]:
        """Return what was given up, the latest first."""
        where, values = ["workspace = ?", "state = 'dead'"], [workspace]
        if channel:
            where.append("channel = ?")
            values.append(channel)
        place: tuple[Any, ...] = ()
        if before is not None:
            where.append("(over_time < ? OR (over_time = ? AND id > ?))")
            place = (before[0], before[0], before[1])
        query = (
            f"SELECT over_time, note, {_COLUMNS} FROM outbox WHERE {' AND '.join(where)} "
            "ORDER BY over_time DESC, id LIMIT ?"
        )

        def read(connection: sqlite3.Connection) -> list[DeadLetter]:
            rows = connection.execute(query, (*values, *place, limit)).fetchall()
            return [
                DeadLetter(delivery=_delivery(row, attempt=row[8]), reason=note, dead_time=at)
                for at, note, *row in rows
            ]

        return await self._read(read)

    async def revive(self, workspace: str, id: str) -> Place | None:
        """Have a dead letter delivered after all, behind what waits for its place."""

        def write(connection: sqlite3.Connection) -> Place | None:
            row = connection.execute(_ROW, (workspace, id)).fetchone()
            if row is None or row[3] != "dead":
                return None
            number, channel, address, *_ = row
            connection.execute(
                "UPDATE outbox SET number = (SELECT max(number) + 1 FROM outbox), state = 'open', due = NULL, "
                "over_time = 0, spared = attempt WHERE number = ?",
                (number,),
            )
            connection.execute(_NEXT, (workspace, channel, address, time.time()))
            return Place(channel=channel, address=address)

        return await self._write(write)

    async def drop(self, workspace: str, id: str) -> bool:
        """Delete a dead letter."""
        statement = "DELETE FROM outbox WHERE workspace = ? AND id = ? AND state = 'dead'"
        return await self._write(lambda connection: connection.execute(statement, (workspace, id)).rowcount > 0)

    async def count(self) -> Mapping[tuple[str, str], int]:
        """Return how many are open and dead, by channel and state."""

        def read(connection: sqlite3.Connection) -> dict[tuple[str, str], int]:
            found: dict[tuple[str, str], int] = {}
            for state in ("open", "dead"):
                query = f"SELECT channel, count(*) FROM outbox WHERE state = '{state}' GROUP BY channel"
                found |= {(channel, state): count for channel, count in connection.execute(query)}
            return found

        return await self._read(read)

    async def prune(self, *, keep: float, delivered: float) -> int:
        """Delete what is old, and give up what nobody took for long."""

        def write(connection: sqlite3.Connection) -> int:
            now = time.time()
            pruned = 0
            for state, age in (("delivered", delivered), ("dead", keep)):
                pruned += connection.execute(
                    "DELETE FROM outbox WHERE number IN "
                    f"(SELECT number FROM outbox WHERE state = '{state}' AND over_time < ? LIMIT ?)",
                    (now - age, _TOGETHER),
                ).rowcount
            old = connection.execute(
                "SELECT number, workspace, channel, address FROM outbox "
                "WHERE state = 'open' AND NOT leased AND create_time < ? LIMIT ?",
                (now - keep, _TOGETHER),
            ).fetchall()
            for number, *place in old:
                _bury(connection, number, place, now, UNWANTED)
            return pruned + len(old)

        return await self._write(write)

    async def _read(self, read: Callable[[sqlite3.Connection], T]) -> T:
        answer: T = await self._run_read(read)
        return answer

    async def _write(self, write: Callable[[sqlite3.Connection], T]) -> T:
        answer: T = await self._run_write(write)
        return answer


def _or_raise(answer: T | MoltBotError) -> T:
    if isinstance(answer, MoltBotError):
        raise answer
    return answer


def _bury(connection: sqlite3.Connection, number: int, place: Iterable[str], now: float, reason: str) -> None:
    """Give a delivery up, and let the next one of its place go."""
    connection.execute(_BURY, (now, reason, number))
    connection.execute(_NEXT, (*place, now))


def _delivery(row: Sequence[Any], *, attempt: int) -> Delivery:
    workspace, id, channel, address, session, ordinal, request, ending, _, create = row
    return Delivery(
        id=id,
        turn=TurnKey(session=SessionKey(workspace=workspace, session=session), ordinal=ordinal),
        place=Place(channel=channel, address=address),
        request_id=request,
        ending=_ending.decode(ending),
        attempt=attempt,
        create_time=create,
    )
