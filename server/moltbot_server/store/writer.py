"""One thread that writes: whatever waits goes to the disk in one transaction (group commit).

Rows of a group are written by few statements. SQLite gives up the interpreter's lock for each one
that it runs, so a statement for each row would make the writer and the event loop take turns all the time.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import Any

from moltbot_server.errors import MoltBotError, StorageFull, StorageUnavailable
from moltbot_server.store.damage import Unreadable, damage, error_name, is_damage
from moltbot_server.store.groups import GroupThread
from moltbot_server.store.pending import Pending
from moltbot_server.store.sqlite_presence import PROBE_EVERY, WritePresence, probe

log = logging.getLogger(__name__)

Write = Callable[[sqlite3.Connection], Any]
"""A write by itself; it returns what is answered."""

WriteRows = Callable[[sqlite3.Connection, Sequence[Any]], Sequence[Any]]
"""Writes many rows together; it returns what is answered for each, in the same order."""

_DISTANCE = 0.001
"""Seconds from one group to the next while many write."""
_NOBODYS_FAULT = ("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_CORRUPT", "SQLITE_NOTADB")
_FULL = ("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE")
_WAITS, _WAITS_BRIEFLY = 5000, 250
"""Milliseconds that a write waits for another program's: longer, unless that has held the database already."""
_COUNTS = (64, 32, 16, 12, 8, 7, 6, 5, 4, 3, 2, 1)


class Rows:
    """A statement over many rows at once, written for several numbers of them: up to eight take one execution."""

    def __init__(self, statement: str, *, row: str) -> None:
        """`statement` has `{rows}` where the values go; `row` is the place-holder of one row."""
        self._by_count = {count: statement.format(rows=", ".join([row] * count)) for count in _COUNTS}

    def execute(self, connection: sqlite3.Connection, rows: Sequence[Sequence[Any]]) -> int:
        """Run the statement over all rows; return how many the database changed."""
        changed = start = 0
        for count in _COUNTS:
            while len(rows) - start >= count:
                chunk = rows[start : start + count]
                changed += connection.execute(self._by_count[count], list(chain.from_iterable(chunk))).rowcount
                start += count
        return changed

    def fetch(self, connection: sqlite3.Connection, rows: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
        """Run the statement over all rows; return what it finds."""
        found: list[tuple[Any, ...]] = []
        start = 0
        for count in _COUNTS:
            while len(rows) - start >= count:
                chunk = rows[start : start + count]
                found += connection.execute(self._by_count[count], list(chain.from_iterable(chunk)))
                start += count
        return found


class _Job(Pending[Any]):
    """A write that waits or is under way, and whoever wants to hear of it."""

    __slots__ = ("row", "write")

    def __init__(self, write: Write | None, row: Any) -> None:
        super().__init__()
        self.write = write
        self.row = row


def storage_error(error: sqlite3.Error) -> MoltBotError:
    """Return what a fault of the database means to a caller; the text holds no content and no path."""
    name = error_name(error)
    if name.startswith(_FULL):
        return StorageFull("the disk is full: nothing was stored", retry_after=5.0)
    if name.startswith("SQLITE_IOERR"):
        text = f"the disk fails, or a quota of it is used up ({name}): nothing was stored"
        return StorageUnavailable(text, retry_after=5.0)
    if is_damage(error):
        text = f"the database is damaged ({name}): `moltbot store check` tells what cannot be read"
        return StorageUnavailable(text, retry_after=1.0)
    return StorageUnavailable(f"the database cannot be used now ({name})", retry_after=1.0)


def unusable(path: Path, error: sqlite3.Error) -> MoltBotError:
    """Return why the store cannot be opened, for whoever starts the core: with the file and what to do about it."""
    name = error_name(error)
    if name.startswith(_FULL):
        return StorageFull(f"the disk is full: {path} cannot be opened", retry_after=5.0)
    if name in ("SQLITE_NOTADB", "SQLITE_CORRUPT"):
        advice = "put a backup in its place, or move it away to begin with an empty one"
        return StorageUnavailable(f"{path} is damaged, or no database ({name}): {advice}")
    return StorageUnavailable(f"the database {path} cannot be opened ({name})")


class GroupWriter(GroupThread[_Job]):
    """Runs writes on a thread of its own and answers each when the transaction that holds it is on the disk.

    When a write raises, its group is undone and each of it is tried by itself, so a bad write hurts no other. The rows
    of a group are written together; a write by itself comes after all that were queued before it.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        write_rows: WriteRows,
        *,
        answered: Callable[[Any, Any], None] = lambda row, outcome: None,
        over: Callable[[bool], None] = lambda _: None,
        at_once: Callable[[sqlite3.Connection, Sequence[Any]], bool] = lambda connection, rows: False,
        pen: AbstractContextManager[None] | None = None,
        presence: WritePresence,
    ) -> None:
        """Take a connection over, which waits for the disk; it is closed with the writer.

        `answered` hears of each row with its outcome, on the loop's thread and before whoever waits for it. `over`
        hears on this thread whether a transaction stands, or was undone. `at_once` writes rows by a single statement,
        which needs no transaction around it, and answers whether it did; what it leaves is written as any other. The
        `pen` is held while the database is written: other processes wait for it then. `presence` hears when nothing can
        be written, and when it can again.
        """
        super().__init__(connection, name="moltbot-writer", distance=_DISTANCE)
        self._write_rows = write_rows
        self._row_answered = answered
        self._transaction_over = over
        self._at_once = at_once
        self._pen = pen or contextlib.nullcontext()
        self._presence = presence
        self._looks = False
        self._waits = _WAITS  # as it is connected

    def submit(self, write: Write, *, row: Any = None) -> Pending[Any]:
        """Queue a write, of a `row` if it is of one; it is answered with what it returned once that is on the disk."""
        return self.put(_Job(write, row))

    def submit_row(self, row: Any, *, patience: float = 0.0) -> Pending[Any]:
        """Queue a row to be written with others, for which it may wait so many seconds."""
        return self.put(_Job(None, row), patience=patience)

    def carry_out(self, connection: sqlite3.Connection, group: list[_Job]) -> list[tuple[_Job, Any]]:
        """Write a group in one transaction."""
        with self._pen:
            return self._write(connection, group)

    def _answer(self, outcomes: Sequence[tuple[_Job, Any]]) -> None:
        for job, outcome in outcomes:
            if job.row is not None:
                self._row_answered(job.row, outcome)
        super()._answer(outcomes)
        if self._presence.away is not None and not self._looks and not self._closed:
            # Nobody may have anything to write when there is room again.
            self._looks = True
            self._loop.call_later(PROBE_EVERY, self._look)

    def _look(self) -> None:
        """Write a probe: where that succeeds, the database is there again, and else it is looked at once more."""
        self._looks = False
        self.submit(probe).then(lambda outcome: None if isinstance(outcome, MoltBotError) else self._presence.found())

    def _write(self, connection: sqlite3.Connection, group: list[_Job]) -> list[tuple[_Job, Any]]:
        rows = [job.row for job in group if job.write is None]
        try:
            self._wait_as_is_due(connection)
            if len(rows) == len(group) and self._at_once(connection, rows):
                outcomes: list[tuple[_Job, Any]] = [(job, None) for job in group]
            else:
                connection.execute("BEGIN IMMEDIATE")
                outcomes = self._write_all(connection, group)
                connection.execute("COMMIT")
        except Exception as error:
            if connection.in_transaction:
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
            self._transaction_over(False)
            if isinstance(error, sqlite3.Error) and error_name(error).startswith(_NOBODYS_FAULT):
                # Each alone would wait as long, or write after a failed write and take it for done.
                if not self._presence.refused(error_name(error)):
                    log.error("the database refused all writes", extra={"error": str(error), "writes": len(group)})
                return [(job, storage_error(error)) for job in group]
            if len(group) > 1:
                # One of them is at fault: give each a transaction of its own, so that the others are stored.
                return [pair for job in group for pair in self._write(connection, [job])]
            if isinstance(error, Unreadable):
                return [(group[0], damage(error))]
            if not isinstance(error, sqlite3.Error):
                log.exception("a write failed")
                return [(group[0], StorageUnavailable("the store refused a write; the log says why"))]
            if not self._presence.refused(error_name(error)):
                log.error("the database refused a write", extra={"error": str(error)})
            return [(group[0], storage_error(error))]
        self._transaction_over(True)
        return outcomes

    def _wait_as_is_due(self, connection: sqlite3.Connection) -> None:
        waits = _WAITS if self._presence.away is None else _WAITS_BRIEFLY
        if waits != self._waits:
            connection.execute(f"PRAGMA busy_timeout = {waits}")
            self._waits = waits

    def _write_all(self, connection: sqlite3.Connection, group: list[_Job]) -> list[tuple[_Job, Any]]:
        outcomes: list[tuple[_Job, Any]] = []
        rows: list[_Job] = []

        def write_rows() -> None:
            if rows:
                answers = self._write_rows(connection, [job.row for job in rows])
                outcomes.extend(zip(rows, answers, strict=True))
                rows.clear()

        for job in group:
            if job.write is None:
                rows.append(job)
            else:
                write_rows()
                outcomes.append((job, job.write(connection)))
        write_rows()
        return outcomes
