"""Tables for people to read, and what stands in their cells."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from moltbot_server.cli.terminal import harmless

_WIDEST = 40


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows with their cells below each other; the first row has the titles."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def short(text: str) -> str:
    """Return the beginning of a text as one harmless line."""
    line = " ".join(harmless(text).split())
    return line if len(line) <= _WIDEST else line[: _WIDEST - 1] + "…"


def moment(at: Timestamp) -> str:
    """Return a time as text, such as `2026-11-22T08:30:00Z`."""
    return datetime.fromtimestamp(at.ToNanoseconds() / 1e9, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
