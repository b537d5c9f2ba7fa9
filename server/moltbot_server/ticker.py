"""One timer for all that waits a moment, such as the text of a turn for more of it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

log = logging.getLogger(__name__)


class Ticker:
    """Calls back within a time: one timer for any number of turns, armed only while somebody waits."""

    def __init__(self) -> None:
        self._due: dict[Callable[[], None], float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def call_within(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call back once, when `seconds` have passed."""
        due = asyncio.get_running_loop().time() + seconds
        self._due[callback] = due
        if self._timer is None:
            self._timer = timer_at(due, self._tick)
        elif self._timer.when() > due:
            self._timer.cancel()
            self._timer = timer_at(due, self._tick)

    def forget(self, callback: Callable[[], None]) -> None:
        """Do not call back."""
        self._due.pop(callback, None)

    def _tick(self) -> None:
        # What is due in a moment may as well come now, with the others.
        now = asyncio.get_running_loop().time() + 0.001
        for callback in [callback for callback, due in self._due.items() if due <= now]:
            if self._due.pop(callback, None) is None:
                continue  # forgotten by one that came before it
            try:
                callback()
            except Exception:
                # The turn that it belongs to has its own ways to end; the others go on.
                log.exception("a callback of the ticker failed")
        self._timer = timer_at(min(self._due.values()), self._tick) if self._due else None


def timer_at(when: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
    """Return a timer that knows when it is due. uvloop's do not where no millisecond is left: those get one or more."""
    loop = asyncio.get_running_loop()
    left = 0.001
    while True:
        timer = loop.call_at(max(when, loop.time() + left), callback)
        if hasattr(timer, "when"):
            return timer
        # The system kept the process from going on between the two looks at the clock.
        timer.cancel()
        left *= 2
