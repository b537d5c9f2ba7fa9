"""The time that a route goes by: the event loop's, or one that a simulation moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Timer(Protocol):
    """Something that will happen."""

    def cancel(self) -> None:
        """Have it not happen; does nothing afterwards."""


class Clock(Protocol):
    """Tells the time and calls back, as an event loop does. Seconds, counted from anywhere."""

    def time(self) -> float:
        """Return the time now."""

    def call_later(self, delay: float, callback: Callable[[], None], /) -> Timer:
        """Call back once, when `delay` seconds have passed."""
