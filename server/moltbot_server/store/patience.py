"""How long a turn may take to be stored without anybody noticing: the model reads it meanwhile."""

from __future__ import annotations

import time

from moltbot_server.turns import TurnKey

MOST = 0.01
"""Seconds that a turn waits at most for something that can be written with it."""

_SHARE = 1 / 3
_WEIGHT = 1 / 16
_MOST_SILENT = 10_000
_COMPANY = 4
"""Turns under way, from which on there is something to wait for."""


class Patience:
    """Learns how long turns have nothing to show, and lets their acceptance wait for a part of it.

    A group of rows costs little more than one row, so an acceptance that goes with another turn's end costs half as
    much. Nobody sees anything of a turn before it is stored: where there is something to see, it waits no longer.
    """

    def __init__(self) -> None:
        self._silent: dict[TurnKey, float] = {}
        self._usual = 0.0

    def begin(self, key: TurnKey, under_way: int) -> float:
        """Take note of a turn that is to be stored, one of so many; return the seconds that this may wait."""
        if len(self._silent) >= _MOST_SILENT:
            self._silent.clear()  # other nodes took them, and have ended them
        self._silent[key] = time.monotonic()
        return min(MOST, self._usual * _SHARE) if under_way >= _COMPANY else 0.0

    def told(self, key: TurnKey) -> None:
        """Take note that a turn has something to show: the first time tells how long that took."""
        if (begun := self._silent.pop(key, None)) is not None:
            self._usual += (time.monotonic() - begun - self._usual) * _WEIGHT

    def end(self, key: TurnKey) -> None:
        """Forget a turn: it has ended, or was not stored."""
        self._silent.pop(key, None)
