"""How far something is, on the standard error: a bar for who watches a terminal, a line now and then for a log."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from types import TracebackType
from typing import Self

from moltbot_server.cli.terminal import harmless
from moltbot_server.models.sizes import readable

_REDRAW = 0.1
_REPORT = 10.0
_BAR = 24
_RECENT = 5.0  # seconds over which a rate is taken


class Progress:
    """A bar of something that is `total` long, of bytes or else of shares of 1; other threads may tell it, too.

    Nothing is shown where nobody asked: `quiet` is for what a program reads.
    """

    def __init__(self, what: str, total: float = 1.0, *, quiet: bool = False) -> None:
        self._what = what
        self._total = max(total, 1e-9)
        self._in_bytes = total > 1
        self._done = 0.0
        self._terminal = sys.stderr.isatty() and not quiet
        self._quiet = quiet
        self._lock = threading.Lock()
        self._drawn = time.monotonic() if not self._terminal else 0.0
        self._marks: list[tuple[float, float]] = [(time.monotonic(), 0.0)]

    def __enter__(self) -> Self:
        self._show(now=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._erase()
            self._terminal, self._quiet = False, True

    def advance(self, count: int) -> None:
        """Take note that so much more is done, or less again."""
        with self._lock:
            self._done += count
        self._show()

    def reach(self, share: float, what: str = "") -> None:
        """Take note of how far it is, from 0 to 1, and of what is done now."""
        with self._lock:
            self._done = share * self._total
            self._what = what or self._what
        self._show()

    def note(self, text: str) -> None:
        """Print a line that stays."""
        if self._quiet:
            return
        with self._lock:
            self._erase()
            print(harmless(text), file=sys.stderr, flush=True)
        self._show(now=True)

    def _erase(self) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _show(self, *, now: bool = False) -> None:
        moment = time.monotonic()
        if self._quiet or (moment - self._drawn < (_REDRAW if self._terminal else _REPORT) and not now):
            return
        if not self._terminal and now:
            return
        with self._lock:
            self._drawn = moment
            line = self._line(moment)
            if self._terminal:
                width = shutil.get_terminal_size().columns - 1
                print(f"\r\x1b[K{line[:width]}", end="", file=sys.stderr, flush=True)
            else:
                print(line, file=sys.stderr, flush=True)

    def _line(self, moment: float) -> str:
        share = min(max(self._done / self._total, 0.0), 1.0)
        filled = int(share * _BAR)
        parts = [f"{self._what}  [{'#' * filled}{'.' * (_BAR - filled)}] {share:4.0%}"]
        if self._in_bytes:
            parts.append(f"{readable(self._done)} of {readable(self._total)}")
            if rate := self._rate(moment):
                left = (self._total - self._done) / rate
                parts.append(f"{readable(rate)}/s, {left:.0f} s left" if left < 6000 else f"{readable(rate)}/s")
        return "  ".join(parts)

    def _rate(self, moment: float) -> float:
        self._marks.append((moment, self._done))
        while len(self._marks) > 2 and self._marks[1][0] < moment - _RECENT:
            del self._marks[0]
        began, before = self._marks[0]
        return max((self._done - before) / max(moment - began, 1e-9), 0.0)
