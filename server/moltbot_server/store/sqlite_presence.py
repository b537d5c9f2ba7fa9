"""Whether the database of a store takes writes, as its writer finds it."""

from __future__ import annotations

import logging
import sqlite3
import time
from pathlib import Path

from moltbot_server.store.protocol import Away

log = logging.getLogger(__name__)

PROBE_EVERY = 1.0
"""Seconds from one look at a database that takes no writes to the next."""
_PROBE_BYTES = 65536
_WHY = {
    "SQLITE_FULL": "the disk is full",
    "SQLITE_IOERR": "the disk fails, or a quota of it is used up",
    "SQLITE_READONLY": "it can be read alone",
    "SQLITE_BUSY": "another program writes to it and does not end",
    "SQLITE_LOCKED": "another program writes to it and does not end",
}


class WritePresence:
    """What the writer of a database tells of it: it is away once a write was refused, until a probe has been written.

    A refusal that is a write's own fault is none. A small write may fit onto a disk that is too full for others, and
    one that is not waited for says nothing of the disk: so a probe, which is both, has to be written. The log hears of
    each once. `refused` runs on the writer's thread, `found` on the event loop's, and `away` is read on any.
    """

    def __init__(self, path: Path) -> None:
        """`path` is for whoever runs the core."""
        self._path = path
        self.away: Away | None = None

    def refused(self, name: str) -> bool:
        """Take note of a refusal by its name in SQLite; return whether nothing can be written, which is logged once."""
        why = next((why for known, why in _WHY.items() if name.startswith(known)), "")
        if why and self.away is None:
            problem = f"{why} ({name})"
            self.away = Away(where=f"the database {self._path}", problem=problem, since=time.time())
            fields = {"at": str(self._path), "problem": problem}
            log.error("the database takes no writes; turns are refused until it does again", extra=fields)
        return bool(why)

    def found(self) -> None:
        """Take note that a probe is on the disk."""
        if self.away is not None:
            fields = {"at": str(self._path), "seconds": round(time.time() - self.away.since, 1)}
            self.away = None
            log.info("the database takes writes again", extra=fields)


def probe(connection: sqlite3.Connection) -> None:
    """Take room in the database as a turn would, and give it back; in a transaction, as a write by itself.

    Raises:
        sqlite3.Error: there is none, or nothing can be written.
    """
    place = ("", "", 0)  # which no turn has
    connection.execute("INSERT INTO journal VALUES (?, ?, ?, 0, zeroblob(?))", (*place, _PROBE_BYTES))
    connection.execute("DELETE FROM journal WHERE workspace = ? AND session = ? AND ordinal = ?", place)
