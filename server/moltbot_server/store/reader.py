"""One thread that reads: whatever was asked for while it was at work is read and answered together."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from moltbot_server.errors import StorageUnavailable
from moltbot_server.store.damage import Unreadable, damage, is_damage
from moltbot_server.store.groups import GroupThread
from moltbot_server.store.pending import Pending
from moltbot_server.store.writer import storage_error
from moltbot_server.turns import SessionKey

log = logging.getLogger(__name__)

T = TypeVar("T")

Query = Callable[[sqlite3.Connection], T]


class _Question(Pending[Any]):
    """A query that waits or is under way, and whoever asked."""

    __slots__ = ("query", "session")

    def __init__(self, query: Query[Any], session: SessionKey | None) -> None:
        super().__init__()
        self.query = query
        self.session = session


class GroupReader(GroupThread[_Question]):
    """Runs queries on a thread of its own, in the order in which they were asked."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        """Take a connection over; it is closed with the reader."""
        super().__init__(connection, name="moltbot-reader")

    def read(self, query: Query[T], *, of: SessionKey | None = None) -> Pending[T]:
        """Queue a query, `of` a session if it is about one; it is answered with what it returns."""
        return self.put(_Question(query, of))

    def carry_out(self, connection: sqlite3.Connection, group: list[_Question]) -> list[tuple[_Question, Any]]:
        """Run the queries; each has an outcome of its own."""
        return [(question, _answer(connection, question)) for question in group]


def _answer(connection: sqlite3.Connection, question: _Question) -> Any:
    """Return what a query finds, or the error that tells why it cannot."""
    try:
        return question.query(connection)
    except sqlite3.Error as error:
        return damage(error, question.session) if is_damage(error) else storage_error(error)
    except (Unreadable, msgspec.MsgspecError, UnicodeDecodeError) as problem:
        return damage(problem, question.session)
    except Exception:
        log.exception("a read failed")
        return StorageUnavailable("the store could not read; the log says why")
