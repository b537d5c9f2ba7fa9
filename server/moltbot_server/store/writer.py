"""One thread that writes: whatever waits goes to the disk in one transaction (group commit)."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from moltbot_server.errors import MoltBotError, StorageFull, StorageUnavailable

log = logging.getLogger(__name__)

Write = Callable[[sqlite3.Connection], Any]
_Job = tuple[Write, "asyncio.Future[Any]"]

_LARGEST_GROUP = 512


def storage_error(error: sqlite3.Error) -> MoltBotError:
    """Return what a fault of the database means to a caller; the text holds no content and no path."""
    name = getattr(error, "sqlite_errorname", "") or type(error).__name__
    if name.startswith(("SQLITE_FULL", "SQLITE_IOERR_WRITE")):
        return StorageFull("the disk is full: nothing was stored", retry_after=5.0)
    return StorageUnavailable(f"the database cannot be used now ({name})", retry_after=1.0)


class GroupWriter:
    """Runs writes on a thread of its own and answers each when the transaction that holds it is on the disk.

    When a write raises, its group is undone and each of it is tried by itself, so a bad write hurts no other.
    """

    def __init__(self, connect: Callable[[], sqlite3.Connection]) -> None:
        self._connect = connect
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="moltbot-writer", daemon=True)
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._thread.start()

    def submit(self, write: Write) -> asyncio.Future[Any]:
        """Queue a write; the future answers with what it returned once that is on the disk."""
        future: asyncio.Future[Any] = self._loop.create_future()
        if self._closed:
            future.set_exception(StorageUnavailable("the store is closed"))
        else:
            self._jobs.put((write, future))
        return future

    async def close(self) -> None:
        """Write what waits, then end the thread."""
        if not self._closed:
            self._closed = True
            self._jobs.put(None)
            await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        connection = self._connect()
        try:
            while (group := self._next_group()) is not None:
                outcomes = self._write(connection, group)
                self._loop.call_soon_threadsafe(_answer, outcomes)
        finally:
            connection.close()

    def _next_group(self) -> list[_Job] | None:
        """Return the jobs that wait, at least one, or None when the writer is to end."""
        job = self._jobs.get()
        if job is None:
            return None
        group = [job]
        while len(group) < _LARGEST_GROUP and not self._jobs.empty():
            job = self._jobs.get()
            if job is None:
                self._jobs.put(None)
                break
            group.append(job)
        return group

    def _write(self, connection: sqlite3.Connection, group: list[_Job]) -> list[tuple[asyncio.Future[Any], Any]]:
        outcomes: list[tuple[asyncio.Future[Any], Any]] = []
        try:
            connection.execute("BEGIN IMMEDIATE")
            for write, future in group:
                outcomes.append((future, write(connection)))
            connection.execute("COMMIT")
        except Exception as error:
            _undo(connection)
            if len(group) > 1:
                # One of them is at fault: give each a transaction of its own, so that the others are stored.
                return [pair for job in group for pair in self._write(connection, [job])]
            if not isinstance(error, sqlite3.Error):
                log.exception("a write failed")
                return [(group[0][1], StorageUnavailable("the store refused a write; the log says why"))]
            log.error("the database refused a write", extra={"error": str(error)})
            return [(group[0][1], storage_error(error))]
        return outcomes


def _undo(connection: sqlite3.Connection) -> None:
    if connection.in_transaction:
        connection.execute("ROLLBACK")


def _answer(outcomes: list[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, outcome in outcomes:
        if future.done():
            continue
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
