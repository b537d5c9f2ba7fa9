"""Whether a SQLite store is whole, and whether what is in it belongs together."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

from moltbot_server.store.damage import is_damage
from moltbot_server.store.findings import Finding, dead_letters
from moltbot_server.store.sqlite_damage import (
    CHECKED,
    REMEDY,
    SESSION_TEXTS,
    is_text,
    lost_sessions,
    problem_of,
    take_any_text,
)
from moltbot_server.store.sqlite_journal_files import broken, folder_of
from moltbot_server.store.sqlite_rows import IS_DELETED
from moltbot_server.store.sqlite_schema import SCHEMA_VERSION, unknown_schema

_TELL_FREE = 0.25
_LEAST_ROOM = 1 << 20  # bytes of the disk without which nothing new is stored
_QUESTIONS = (
    (
        f"SELECT count(*) FROM turns t WHERE NOT ({IS_DELETED}) AND NOT EXISTS "
        "(SELECT 1 FROM sessions s WHERE s.workspace = t.workspace AND s.id = t.session)",
        "{} turns belong to no session",
    ),
    (
        "SELECT count(*) FROM journal j WHERE NOT EXISTS (SELECT 1 FROM turns t WHERE t.workspace = j.workspace "
        "AND t.session = j.session AND t.ordinal = j.ordinal AND t.state = 'running')",
        "{} entries of the journal belong to no turn that runs; the next start takes them away",
    ),
    (
        "SELECT count(*) FROM (SELECT 1 FROM outbox WHERE state = 'open' "
        "GROUP BY workspace, channel, address HAVING count(due) <> 1)",
        "{} places have deliveries, and not just the first of them can be given out",
    ),
)


def check_database(path: Path, *, in_use: bool, progress: Callable[[float, str], None]) -> Iterator[Finding]:
    """Yield what is wrong with a database; nothing is changed. `progress` hears how far it is, from 0 to 1.

    Raises:
        sqlite3.Error: it cannot be read at all.
    """
    yield from _unwritable(path)
    uri = f"{path.absolute().as_uri()}?mode=ro"
    with contextlib.closing(sqlite3.connect(uri, uri=True, isolation_level=None, timeout=5.0)) as connection:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version < 0:
            yield Finding(text=f"{unknown_schema(version)}: put a backup in its place")
            return
        if not version and not connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
            text = "it is empty, and the next start takes it for a new one"
            yield Finding(text=f"{text}: if it ever held anything, put a backup in its place", weight="warning")
            return
        if version != SCHEMA_VERSION:
            newer = version > SCHEMA_VERSION
            text = f"its schema is {version}, and this release writes {SCHEMA_VERSION}"
            after = "a newer release has written it" if newer else "the next start brings it up to date"
            yield Finding(text=f"{text}: {after}", weight="grave" if newer else "note")
            return
        progress(0.0, "pages")
        if damage := _damaged_pages(connection):
            yield from (Finding(text=f"damaged: {line}") for line in damage)
            yield from lost_sessions(connection, lambda share: progress(0.3 + 0.7 * share, "turns"))
            yield Finding(text=REMEDY, weight="note")
            return
        progress(0.3, "rows")
        for question, text in _QUESTIONS:
            if number := connection.execute(question).fetchone()[0]:
                yield Finding(text=text.format(number), weight="warning")
        if not in_use:  # what is being written is not there yet, and needs no word
            yield from _broken_files(path)
        yield from _unreadable(connection, progress)
        yield from _notes(connection, in_use)


def _unwritable(path: Path) -> Iterator[Finding]:
    """Yield why a core could store nothing new there."""
    for place in (path.parent, path):
        if not os.access(place, os.W_OK):
            text = "is on a read-only disk" if os.statvfs(place).f_flag & os.ST_RDONLY else "may not be written by us"
            yield Finding(text=f"{place} {text}, so nothing new can be stored: let MoltBot write there")
            return
    if (room := shutil.disk_usage(path.parent).free) < _LEAST_ROOM:
        text = f"its disk has {room >> 10} KiB of room, so nothing new can be stored"
        yield Finding(text=f"{text}: make room on the disk of {path.parent}")


def _damaged_pages(connection: sqlite3.Connection) -> list[str]:
    """Return what is wrong with the pages, as SQLite tells it; nothing when they are whole."""
    try:
        found = [row[0] for row in connection.execute("PRAGMA integrity_check(10)")]
    except sqlite3.DatabaseError as error:
        if not is_damage(error):
            raise
        return [str(error)]
    return [] if found == ["ok"] else found


def _broken_files(path: Path) -> Iterator[Finding]:
    """Yield the files beside the database of which something cannot be read."""
    for file, count in broken(folder_of(path)):
        text = f"{count} bytes at the end of {file.relative_to(path.parent)} cannot be read, as after a power failure"
        yield Finding(text=f"{text}: what they said of turns is told anew, by the next start", weight="warning")


def _unreadable(connection: sqlite3.Connection, progress: Callable[[float, str], None]) -> Iterator[Finding]:
    """Yield the sessions and turns of which something cannot be read."""
    total = connection.execute("SELECT count(*) FROM turns").fetchone()[0]
    take_any_text(connection)
    for row in connection.execute(f"SELECT {SESSION_TEXTS} FROM sessions"):
        if not is_text(row):
            text = f"session {row[1]} in workspace {row[0]} cannot be read"
            yield Finding(text=text.encode("utf-8", "replace").decode())
    for number, row in enumerate(connection.execute(f"SELECT {CHECKED} FROM turns")):
        if not number % 1000:
            progress(0.4 + 0.6 * number / total, "turns")
        if problem := problem_of(row):
            yield Finding(text=problem.encode("utf-8", "replace").decode())


def _notes(connection: sqlite3.Connection, in_use: bool) -> Iterator[Finding]:
    running = connection.execute("SELECT count(*) FROM turns WHERE state = 'running'").fetchone()[0]
    if running and not in_use:
        turns = "1 turn waits" if running == 1 else f"{running} turns wait"
        yield Finding(text=f"{turns} to be carried on by the next start", weight="note")
    if dead := connection.execute("SELECT count(*) FROM outbox WHERE state = 'dead'").fetchone()[0]:
        yield Finding(text=dead_letters(dead), weight="note")
    pages, free, size = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    if free > _TELL_FREE * pages and free * size >> 20:
        text = f"{free * size >> 20} MiB of its {pages * size >> 20} MiB are free, and are used again for what comes"
        yield Finding(text=text, weight="note")
