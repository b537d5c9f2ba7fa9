"""A row that cannot be read: which one it is, for the log, and what callers are told."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from moltbot_server.errors import StorageDamaged
from moltbot_server.turns import SessionKey

log = logging.getLogger(__name__)

BROKEN = (msgspec.MsgspecError, ValueError, TypeError, AttributeError)
"""What it raises to make values of a row that is not as it was written."""
_NOT_TEXT = "Could not decode"
"""How `sqlite3.OperationalError` begins for a column of text that is none."""
_BAD_PAGES = ("SQLITE_CORRUPT", "SQLITE_NOTADB")


class Unreadable(Exception):
    """What is stored of a turn cannot be read."""

    def __init__(self, workspace: str, session: str, ordinal: int) -> None:
        super().__init__(f"turn {ordinal} of session {session} in workspace {workspace} cannot be read")
        self.workspace, self.session, self.ordinal = workspace, session, ordinal


def is_damage(error: sqlite3.Error) -> bool:
    """Tell whether a fault of a database is that it is not as it was written: no repeat mends that."""
    return has_bad_pages(error) or str(error).startswith(_NOT_TEXT)


def has_bad_pages(error: sqlite3.Error) -> bool:
    """Tell whether SQLite cannot follow the pages of a database: what is on them cannot be deleted either."""
    return error_name(error).startswith(_BAD_PAGES)


def error_name(error: sqlite3.Error) -> str:
    """Return how SQLite calls a fault, for whoever looks it up."""
    return getattr(error, "sqlite_errorname", "") or type(error).__name__


def damage(problem: Exception, session: SessionKey | None = None) -> StorageDamaged:
    """Return what a row that cannot be read means to a caller, and say in the log which one it is, or whose."""
    if isinstance(problem, Unreadable):
        place = {"workspace": problem.workspace, "session": problem.session, "ordinal": problem.ordinal}
        log.error("a stored turn cannot be read: it is damaged", extra={"problem": _cause(problem), **place})
        return StorageDamaged(f"what is stored of turn {problem.ordinal} of this session is damaged")
    cause = error_name(problem) if isinstance(problem, sqlite3.Error) else type(problem).__name__
    if session is None:
        log.error("what is stored cannot be read: it is damaged", extra={"problem": cause})
        return StorageDamaged("what is stored here is damaged")
    place = {"workspace": session.workspace, "session": session.session}
    log.error("a stored session cannot be read: it is damaged", extra={"problem": cause, **place})
    return StorageDamaged("what is stored of this session is damaged")


@contextmanager
def reading_turn(workspace: str, session: str, ordinal: int) -> Iterator[None]:
    """Name the turn that keeps a store from being read as a whole."""
    try:
        yield
    except BROKEN as problem:
        told = Unreadable(workspace, session, ordinal)
        raise StorageDamaged(f"{told}: it is damaged. Delete its session, or put a backup in place") from problem


@contextmanager
def reading_delivery(workspace: str, id: str) -> Iterator[None]:
    """Name the delivery that keeps a store from being read as a whole."""
    try:
        yield
    except BROKEN as problem:
        told = f"delivery {id} in workspace {workspace} cannot be read"
        raise StorageDamaged(f"{told}: it is damaged. Put a backup in place") from problem


def _cause(problem: Unreadable) -> str:
    """Return the kind of fault: its text may say what was written."""
    return type(problem.__cause__).__name__
