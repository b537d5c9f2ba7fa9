"""How many places of the model a workspace may have: all of them, or its share while it takes more than that."""

from __future__ import annotations

from collections.abc import Callable
from math import exp

ALL = 1 << 30
"""The room of a workspace that nothing bounds: more places than there are, for more rows are looked at than taken."""

WINDOW = 10.0
"""Seconds that service is remembered for, and that a workspace counts as active after its last row."""

_LONGEST_PAUSE = 1.0
_MANY = 1024


class _Use:
    """What one workspace has had."""

    __slots__ = ("asked", "at", "running", "used", "weight")

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.asked = self.at = float("-inf")
        self.used = 0.0
        self.running = 0


class Shares:
    """Who uses the model how much. Pure: the time is told, in seconds.

    A workspace may have every place that is free. Only while others are active too, and while it has had more of the
    last seconds than its share among them, it has no more places than its share, and always one.
    """

    def __init__(self, places: int, replicas: int, weight: Callable[[str], float]) -> None:
        """`places`: rows that are written at the same time; `weight` of a workspace among others."""
        self._places = places
        self._replicas = replicas
        self._weight = weight
        self._uses: dict[str, _Use] = {}

    def asked(self, workspace: str, now: float) -> None:
        """Take note of a row that comes."""
        self._use(workspace, now).asked = now

    def took(self, workspace: str, cost: float, now: float) -> None:
        """Take note of a row that begins; `cost` in seconds of a replica."""
        use = self._use(workspace, now)
        use.used = self._used(use, now) + cost
        use.at = now
        use.running += 1

    def left(self, workspace: str, more: float) -> None:
        """Take note of a row that is written no more, and has cost so much more than was expected."""
        use = self._uses[workspace]
        use.used = max(0.0, use.used + more)
        use.running -= 1

    def active(self, now: float) -> float:
        """Return the weight of all workspaces that are active."""
        return sum(use.weight for use in self._uses.values() if use.running or now - use.asked < WINDOW)

    def room(self, workspace: str, active: float, now: float) -> int:
        """Return how many more places a workspace may have, while workspaces of so much weight are active."""
        use = self._uses.get(workspace)
        if use is None:
            return ALL
        share = use.weight / max(active, use.weight)
        return max(1, int(share * self._places)) - use.running if self._is_over(use, share, now) else ALL

    def may_lead(self, workspace: str, active: float, now: float, free: int) -> bool:
        """Tell whether a workspace may begin a batch where so many replicas are free."""
        use = self._uses.get(workspace)
        if use is None or free > 1 or self._replicas == 1 or now - use.at > _LONGEST_PAUSE:
            return True
        return not self._is_over(use, use.weight / max(active, use.weight), now)

    def _is_over(self, use: _Use, share: float, now: float) -> bool:
        return share < 1.0 and self._used(use, now) > share * self._replicas * WINDOW

    def _used(self, use: _Use, now: float) -> float:
        return use.used * exp((use.at - now) / WINDOW) if use.used else 0.0

    def _use(self, workspace: str, now: float) -> _Use:
        use = self._uses.get(workspace)
        if use is None:
            if len(self._uses) >= _MANY:
                self._forget(now)
            use = self._uses[workspace] = _Use(self._weight(workspace))
        return use

    def _forget(self, now: float) -> None:
        for name in [n for n, use in self._uses.items() if not use.running and now - use.asked > WINDOW]:
            del self._uses[name]
