"""How many places of the model a workspace, or a session of it, may have: all of them, unless it crowds others out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from math import exp

ALL = 1 << 30
"""The room of who is not bounded: more places than there are, for more rows are looked at than taken."""

ACTIVE = 10.0
"""Seconds that an asker counts as active after its last row."""

_REMEMBERED = 2.0  # seconds of service that count, unless
_REMEMBERED_ROUNDS = 8.0  # so many batches take longer
_BUSY = 0.25  # of the replicas' time: below it nobody crowds anybody
_DOMINANT = 0.3
_LONGEST_PAUSE = 1.0


class _Use:
    """What one asker has had."""

    __slots__ = ("asked", "at", "inside", "running", "used", "weight")

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.asked = 0.0
        self.at = float("-inf")
        self.used = 0.0
        self.running = 0
        self.inside: _Level | None = None

    def recent(self, now: float, remembered: float) -> float:
        """Return the service of the last seconds."""
        return self.used * exp((self.at - now) / remembered) if self.used else 0.0

    def add(self, cost: float, now: float, remembered: float) -> None:
        self.used = max(0.0, self.recent(now, remembered) + cost)
        self.at = now


class _Level:
    """Those who share something: workspaces the model, sessions their workspace. Only the active ones are known."""

    __slots__ = ("_order", "_weight", "total")

    def __init__(self) -> None:
        self._order: OrderedDict[str, _Use] = OrderedDict()
        self._weight = 0.0
        self.total = _Use(0.0)

    def __len__(self) -> int:
        return len(self._order)

    def get(self, name: str) -> _Use | None:
        return self._order.get(name)

    def asked(self, name: str, weight: float, now: float) -> _Use:
        """Take note of who comes, and forget who has not come for long."""
        use = self._order.get(name)
        if use is None:
            use = self._order[name] = _Use(weight)
            self._weight += weight
        use.asked = now
        self._order.move_to_end(name)
        self.forget(now)
        return use

    def forget(self, now: float) -> None:
        """Forget who is not active any more."""
        while self._order:
            name, use = next(iter(self._order.items()))
            if now - use.asked < ACTIVE:
                return
            if use.running:
                use.asked = now
                self._order.move_to_end(name)
            else:
                del self._order[name]
                self._weight -= use.weight

    def share(self, use: _Use) -> float:
        """Return an asker's share of what there is."""
        return 1.0 if len(self._order) == 1 else use.weight / self._weight


class Shares:
    """Who uses the model how much. Pure: times are told, in seconds.

    Anybody may have every place that is free. Only who crowds out others that are active too is kept to its share of
    the places, and always has one: it had much more of the last seconds than its share, and more answers than half of
    the places hold. It then leaves the last free replica to the others, and is written along with them, unless it was
    not served for a second.
    """

    def __init__(self, places: int, replicas: int, weight: Callable[[str], float]) -> None:
        """`places`: rows that are written at the same time; `weight` of a workspace among others."""
        self._places = places
        self._replicas = replicas
        self._weight = weight
        self._workspaces = _Level()
        self._typical = 0.0
        self._remembered = _REMEMBERED

    def __len__(self) -> int:
        return len(self._workspaces)

    def remember(self, seconds: float) -> None:
        """Learn how long a batch takes, and remember long enough to see some."""
        self._remembered = max(_REMEMBERED, _REMEMBERED_ROUNDS * seconds)

    def asked(self, workspace: str, session: str, now: float) -> None:
        """Take note of a row that comes."""
        use = self._workspaces.asked(workspace, self._weight(workspace), now)
        if use.inside is None:
            use.inside = _Level()
        use.inside.asked(session, 1.0, now)

    def took(self, workspace: str, session: str, cost: float, now: float) -> None:
        """Take note of a row that begins, and is expected to cost so many seconds of a replica."""
        self._typical += (0.05 if self._typical else 1.0) * (cost - self._typical)
        self.asked(workspace, session, now)
        self._add(workspace, session, cost, 1, now)

    def left(self, workspace: str, session: str, more: float, now: float) -> None:
        """Take note of a row that is written no more, and has cost so much more than was expected."""
        self._add(workspace, session, more, -1, now)

    def _add(self, workspace: str, session: str, cost: float, running: int, now: float) -> None:
        level: _Level | None = self._workspaces
        for name in (workspace, session):
            use = level.get(name) if level is not None else None
            if use is None or level is None:
                return
            level.total.add(cost, now, self._remembered)
            use.add(cost, now, self._remembered)
            use.running += running
            level = use.inside

    def room(self, workspace: str, now: float) -> int:
        """Return how many more rows of a workspace may be written."""
        use = self._workspaces.get(workspace)
        if use is None or not self._crowds(self._workspaces, use, now):
            return ALL
        return self._share_of_places(self._workspaces, use) - use.running

    def room_of(self, workspace: str, session: str, now: float) -> int:
        """Return how many more rows of a session may be written, as far as its workspace's other sessions go."""
        outer = self._workspaces.get(workspace)
        use = outer.inside.get(session) if outer and outer.inside else None
        if outer is None or outer.inside is None or use is None or not self._crowds(outer.inside, use, now):
            return ALL
        return self._share_of_places(outer.inside, use) - use.running

    def may_lead(self, workspace: str, session: str, now: float, free: int) -> bool:
        """Tell whether a row may begin a batch where so many replicas are free."""
        if free > 1 or self._replicas == 1:
            return True
        level: _Level | None = self._workspaces
        for name in (workspace, session):
            use = level.get(name) if level is not None else None
            if use is None or level is None:
                return True
            if self._crowds(level, use, now):
                return now - use.at > _LONGEST_PAUSE
            level = use.inside
        return True

    def _share_of_places(self, level: _Level, use: _Use) -> int:
        return max(1, int(level.share(use) * self._places))

    def _crowds(self, level: _Level, use: _Use, now: float) -> bool:
        if len(level) == 1:
            return False
        recent = use.recent(now, self._remembered)
        if recent <= self._typical * self._places / 2:
            return False
        share = level.share(use)
        much = min(2 * share, share + _DOMINANT * (1 - share))
        all_recent = level.total.recent(now, self._remembered)
        return recent > much * max(all_recent, _BUSY * self._replicas * self._remembered)
