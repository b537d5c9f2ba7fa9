"""When sessions were last used, in SQLite: written at most once a second, since it can be told again from the turns."""

from __future__ import annotations

import sqlite3
import time

from moltbot_server.store.sqlite_sessions import SessionNames
from moltbot_server.store.writer import Rows

_UPDATE = Rows(
    "UPDATE sessions SET update_time = max(update_time, column1) FROM (VALUES {rows}) "
    "WHERE workspace = column2 AND id = column3",
    row="(?, ?, ?)",
)
_EVERY = 1.0
_LATE = 2.0
"""Seconds after which others are told when sessions were used, if no later turn has done that."""


class LastUse:
    """The sessions that were used and whose rows do not say so yet. Whatever takes a connection is the writer's."""

    def __init__(self) -> None:
        self._used: dict[SessionNames, float] = {}
        self._written_at = 0.0

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._used)

    @property
    def is_late(self) -> bool:
        """Whether some have waited for too long, because no turn came."""
        return bool(self._used) and time.time() - self._written_at >= _LATE

    def of(self, names: SessionNames) -> float:
        """Return when a session was used, 0 when its row says so."""
        return self._used.get(names, 0.0)

    def forget(self, names: SessionNames) -> None:
        """Let a session go that is deleted."""
        self._used.pop(names, None)

    @property
    def is_due(self) -> bool:
        """Whether there are some and it is time to write them."""
        return bool(self._used) and time.time() - self._written_at >= _EVERY

    def note(self, names: SessionNames, now: float) -> None:
        """Take note that a session is used."""
        self._used[names] = now

    def write(self, connection: sqlite3.Connection) -> None:
        """Write what there is."""
        self._written_at = time.time()
        rows = [(now, *names) for names, now in self._used.items()]
        self._used.clear()
        _UPDATE.execute(connection, rows)
