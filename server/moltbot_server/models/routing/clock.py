"""The time that a route goes by: the event loop's, or one that a simulation moves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol


class Timer(Protocol):
    """Something that will happen."""

    def cancel(self) -> None:
        """Have it not happen; does nothing afterwards."""


class Clock(Protocol):
    """Tells the time and calls back. Seconds, counted from anywhere."""

    def time(self) -> float:
        """Return the time now."""

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        """Call back once, when `delay` seconds have passed."""


class LoopClock:
    """The clock of the event loop that runs."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def time(self) -> float:
        """Return the loop's time."""
        return self._running().time()

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        """Have the loop call back."""
        return self._running().call_later(delay, callback)

    def _running(self) -> asyncio.AbstractEventLoop:
        # A route is made before the loop runs that it will belong to, and belongs to it for good.
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        return self._loop
