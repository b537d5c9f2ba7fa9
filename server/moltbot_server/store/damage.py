"""A row that cannot be read: which one it is, for the log, and what callers are told."""

from __future__ import annotations

import logging

import msgspec

from moltbot_server.errors import StorageDamaged

log = logging.getLogger(__name__)

BROKEN = (msgspec.MsgspecError, ValueError, TypeError, AttributeError)
"""What it raises to make values of a row that is not as it was written."""
NOT_TEXT = "Could not decode"
"""How `sqlite3.OperationalError` begins for a column of text that is none."""


class Unreadable(Exception):
    """What is stored of a turn cannot be read."""

    def __init__(self, workspace: str, session: str, ordinal: int) -> None:
        super().__init__(f"turn {ordinal} of session {session} in workspace {workspace} cannot be read")
        self.workspace, self.session, self.ordinal = workspace, session, ordinal


def damage(problem: Exception) -> StorageDamaged:
    """Return what a row that cannot be read means to a caller, and say in the log which one it is."""
    if isinstance(problem, Unreadable):
        place = {"workspace": problem.workspace, "session": problem.session, "ordinal": problem.ordinal}
        log.error("a stored turn cannot be read: it is damaged", extra={"problem": _cause(problem), **place})
        return StorageDamaged(f"what is stored of turn {problem.ordinal} of this session is damaged")
    log.error("what is stored cannot be read: it is damaged", extra={"problem": type(problem).__name__})
    return StorageDamaged("what is stored here is damaged")


def unmovable(problem: Unreadable) -> StorageDamaged:
    """Return why a store cannot be read as a whole."""
    return StorageDamaged(f"{problem}: it is damaged. Delete its session, or put a backup in place, and try again")


def _cause(problem: Unreadable) -> str:
    """Return the kind of fault: its text may say what was written."""
    return type(problem.__cause__).__name__
