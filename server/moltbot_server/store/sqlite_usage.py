"""What turns used, in SQLite: a row for each day, model and user of a workspace, added to in groups."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moltbot_server.store.protocol import UsagePage, UsagePlace, UsageQuery, UsageRow
from moltbot_server.store.writer import Rows

USAGE_SCHEMA = """
CREATE TABLE IF NOT EXISTS usage (
    workspace TEXT NOT NULL, day TEXT NOT NULL, model TEXT NOT NULL, user TEXT NOT NULL, turns INTEGER NOT NULL,
    input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, cached_input_tokens INTEGER NOT NULL,
    cached_turns INTEGER NOT NULL, cost REAL NOT NULL,
    PRIMARY KEY (workspace, day, model, user)
) WITHOUT ROWID;
"""

_NAMES = ("day", "model", "user")
_NUMBERS = ("turns", "input_tokens", "output_tokens", "cached_input_tokens", "cached_turns", "cost")
_COLUMNS = ("workspace", *_NAMES, *_NUMBERS)
_ADD = Rows(
    f"INSERT INTO usage ({', '.join(_COLUMNS)}) VALUES {{rows}} ON CONFLICT (workspace, day, model, user) "
    f"DO UPDATE SET {', '.join(f'{name} = {name} + excluded.{name}' for name in _NUMBERS)}",
    row=f"({', '.join('?' * len(_COLUMNS))})",
)
_SUMS = ", ".join(f"sum({name})" for name in _NUMBERS)


def add_usage(connection: sqlite3.Connection, rows: Sequence[UsageRow]) -> None:
    """Add rows to what is stored of the same workspace, day, model and user."""
    _ADD.execute(connection, [tuple(getattr(row, name) for name in _COLUMNS) for row in rows])


def forget_usage(connection: sqlite3.Connection, before: str) -> None:
    """Delete what is older than a day, in all workspaces."""
    workspace = ""
    while True:  # from one to the next: a look at all rows would keep the writer for long
        found = connection.execute("SELECT min(workspace) FROM usage WHERE workspace > ?", (workspace,)).fetchone()
        if found[0] is None:
            return
        workspace = found[0]
        connection.execute("DELETE FROM usage WHERE workspace = ? AND day < ?", (workspace, before))


def read_usage(path: Path, query: UsageQuery, *, after: UsagePlace | None, limit: int) -> UsagePage:
    """Return what was used, from a connection of its own: the sum of a year may take a while, and nobody waits for it.

    A database that never held any has none. `limit` below 0 is no limit.

    Raises:
        sqlite3.Error: the database cannot be read.
    """
    with contextlib.closing(
        sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=5.0)
    ) as connection:
        if not connection.execute("SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = 'usage'").fetchone():
            return UsagePage(rows=(), total=UsageRow(workspace=query.workspace))
        # Both are of one moment: the page and the total agree while others write.
        connection.execute("BEGIN")
        return usage_page(connection, query, after=after, limit=limit)


def usage_page(connection: sqlite3.Connection, query: UsageQuery, *, after: UsagePlace | None, limit: int) -> UsagePage:
    """Return what was used, from a table that is there."""
    return UsagePage(rows=_page(connection, query, after, limit), total=_total(connection, query))


def _page(
    connection: sqlite3.Connection, query: UsageQuery, after: UsagePlace | None, limit: int
) -> tuple[UsageRow, ...]:
    where, values = _chosen(query)
    day, model, user = (name if name in query.by else "''" for name in _NAMES)
    if after is not None:
        where += f" AND ({day} < ? OR ({day} = ? AND ({model}, {user}) > (?, ?)))"
        values += [after[0], *after]
    found = connection.execute(
        f"SELECT workspace, {day}, {model}, {user}, {_SUMS} FROM usage WHERE {where} "
        "GROUP BY 1, 2, 3, 4 ORDER BY 1, 2 DESC, 3, 4 LIMIT ?",
        [*values, limit],
    )
    return tuple(_row(row) for row in found)


def _total(connection: sqlite3.Connection, query: UsageQuery) -> UsageRow:
    where, values = _chosen(query)
    sums = connection.execute(f"SELECT {_SUMS} FROM usage WHERE {where}", values).fetchone()
    return _row((query.workspace, "", "", "", *(number or 0 for number in sums)))


def _chosen(query: UsageQuery) -> tuple[str, list[Any]]:
    """Return the condition that a query puts on rows, and its values."""
    where, values = "day BETWEEN ? AND ?", [query.first, query.last]
    for column in ("workspace", "model", "user"):
        if value := getattr(query, column):
            where += f" AND {column} = ?"
            values.append(value)
    return where, values


def _row(row: Sequence[Any]) -> UsageRow:
    return UsageRow(**dict(zip(_COLUMNS, row, strict=True)))
