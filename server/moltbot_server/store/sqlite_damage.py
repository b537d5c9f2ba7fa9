"""Which turns of a damaged database cannot be read: each is read by itself, from the index that names all of them."""

from __future__ import annotations

import itertools
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any

from moltbot_server.store.damage import Unreadable, has_bad_pages, is_damage
from moltbot_server.store.findings import Finding
from moltbot_server.store.sqlite_rows import TURN_COLUMNS, read_messages, turn_of

CHECKED = f"{TURN_COLUMNS}, question, answer, model, finish"
"""The columns of a turn that `problem_of` looks at."""
SESSION_TEXTS = "workspace, id, title, user, channel"
"""The texts of a session."""
REMEDY = "put a backup in its place (docs/operations.md): what is on damaged pages can be neither read nor deleted"
"""What to do about a database whose pages are damaged."""

_PATIENCE = 60.0
"""Seconds after which no more turns are looked at."""
_MOST = 20
"""Sessions that are named at most, and turns of each."""
_NAMES = "SELECT workspace, session, ordinal, rowid FROM turns INDEXED BY turns_by_session ORDER BY "
_ORDERS = ("workspace, session, ordinal", "workspace DESC, session DESC, ordinal DESC")

Named = tuple[str, str, int, int]


def problem_of(row: tuple[Any, ...]) -> str:
    """Return why a turn cannot be read; empty when it can, all of it."""
    workspace, session, ordinal, _, _, _, create, end, _, _, question, answer, model, finish = row
    try:
        turn_of(row[:10])
        read_messages(workspace, session, (ordinal, question, answer, model, create, end, finish))
    except Unreadable as problem:
        return str(problem)
    return "" if is_text(row) else str(Unreadable(workspace, session, ordinal))


def is_text(row: Sequence[Any]) -> bool:
    """Tell whether all texts of a row are such, where any was taken."""
    try:
        "".join(text for text in row if isinstance(text, str)).encode()
    except UnicodeEncodeError:
        return False
    return True


def remedy(error: sqlite3.Error) -> str:
    """Return what to do about a database that cannot be read whole."""
    return (
        REMEDY if has_bad_pages(error) else "delete that session (`moltbot session delete`), or put a backup in place"
    )


def take_any_text(connection: sqlite3.Connection) -> None:
    """Let text that is none keep no other row from being read."""
    connection.text_factory = lambda text: text.decode("utf-8", "surrogateescape")


def lost_sessions(connection: sqlite3.Connection, progress: Callable[[float], None]) -> Iterator[Finding]:
    """Yield the sessions of a damaged database that cannot be read, with their turns; `progress` hears its share."""
    take_any_text(connection)
    connection.execute("BEGIN")  # a turn that is deleted meanwhile is not lost
    until, named = time.monotonic() + _PATIENCE, 0
    for (workspace, session), turns in itertools.groupby(_lost(connection, until, progress), key=itemgetter(0, 1)):
        named += 1
        if named <= _MOST:
            text = _told(workspace, session, [turn[2] for turn in turns])
            yield Finding(text=text.encode("utf-8", "replace").decode())
    if named > _MOST:
        yield Finding(text=f"{named - _MOST} more sessions cannot be read")
    if time.monotonic() >= until:
        yield Finding(text=f"not all turns were looked at within {_PATIENCE:g} seconds")


def first_lost(connection: sqlite3.Connection) -> str:
    """Return what is said of the first turn of a damaged database that cannot be read; empty when none is found."""
    take_any_text(connection)
    lost = _lost(connection, time.monotonic() + _PATIENCE, lambda _: None)
    return next((str(Unreadable(*turn[:3])).encode("utf-8", "replace").decode() for turn in lost), "")


def _lost(connection: sqlite3.Connection, until: float, progress: Callable[[float], None]) -> Iterator[Named]:
    """Yield turns that cannot be read, those of a session together, unless the index itself is damaged there."""
    total = _counted(connection)
    for number, turn in enumerate(_named(connection)):
        if not number % 1000:
            progress(min(1.0, number / total))
            if time.monotonic() >= until:
                return
        if not _is_readable(connection, turn):
            yield turn


def _named(connection: sqlite3.Connection) -> Iterator[Named]:
    """Yield all turns that the index names: where it breaks off, it is read from its other end."""
    last: Named | None = None
    for order in _ORDERS:
        try:
            for turn in connection.execute(_NAMES + order):
                if order != _ORDERS[0] and last is not None and turn <= last:
                    return
                if order == _ORDERS[0]:
                    last = turn
                yield turn
            return
        except (sqlite3.Error, TypeError):  # names that are no text cannot be compared
            continue


def _is_readable(connection: sqlite3.Connection, turn: Named) -> bool:
    workspace, session, ordinal, rowid = turn
    try:
        row = connection.execute(f"SELECT {CHECKED} FROM turns WHERE rowid = ?", (rowid,)).fetchone()
        place = "WHERE workspace = ? AND id = ?"
        kept = connection.execute(f"SELECT {SESSION_TEXTS} FROM sessions {place}", (workspace, session)).fetchone()
    except (sqlite3.Error, UnicodeError):
        return False
    same = row is not None and row[:3] == (workspace, session, ordinal)
    return same and not problem_of(row) and is_text(kept or ())


def _counted(connection: sqlite3.Connection) -> int:
    try:
        return max(1, int(connection.execute("SELECT count(*) FROM turns INDEXED BY turns_by_session").fetchone()[0]))
    except sqlite3.Error as error:
        if not is_damage(error):
            raise
        return 1


def _told(workspace: str, session: str, ordinals: Sequence[int]) -> str:
    shown = ", ".join(map(str, ordinals[:_MOST]))
    more = f" and {len(ordinals) - _MOST} more" if len(ordinals) > _MOST else ""
    turns = "turn" if len(ordinals) == 1 else "turns"
    return f"{turns} {shown}{more} of session {session} in workspace {workspace} cannot be read"
