"""Tables for people to read, and what stands in their cells."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from moltbot_server.cli.terminal import harmless

_WIDEST = 40
_NARROW = 60
"""Columns of a terminal below which a table that does not fit is no table any more."""


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows with their cells below each other; the first row has the titles."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return fitted([line.rstrip() for line in lines], rows)


def fitted(lines: Sequence[str], rows: Sequence[Sequence[str]], columns: int | None = None) -> str:
    """Return the lines of a table, or what stands in its rows one cell below the other where a terminal is narrow.

    `rows` are those of the table, with the titles first; `columns` is how wide the terminal is, by default ours.
    """
    columns = columns or _columns()
    if columns >= _NARROW or all(len(line) <= columns for line in lines):
        return "\n".join(lines)
    titles, *body = rows
    return "\n\n".join("\n".join(_below(titles, row, columns)) for row in body)


def _columns() -> int:
    """Return how wide the terminal is that is written to; what is no terminal takes lines of any length."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else _NARROW


def _below(titles: Sequence[str], row: Sequence[str], columns: int) -> Iterator[str]:
    """Yield the cells of a row that have something, each with its title and broken between words alone."""
    indent = max(map(len, titles)) + 2
    for title, cell in zip(titles, row, strict=True):
        room = max(columns - indent, 1)
        for number, part in enumerate(textwrap.wrap(cell, room, break_long_words=False, break_on_hyphens=False)):
            yield f"{'' if number else title:{indent}}{part}"


def short(text: str) -> str:
    """Return the beginning of a text as one harmless line."""
    line = " ".join(harmless(text).split())
    return line if len(line) <= _WIDEST else line[: _WIDEST - 1] + "…"


def moment(at: Timestamp) -> str:
    """Return a time as text, such as `2026-11-22T08:30:00Z`."""
    return datetime.fromtimestamp(at.ToNanoseconds() / 1e9, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
