"""Who asks the model lately: whether somebody who asks for much does so beside others."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

_KNOWN = 10.0  # seconds that an asker is remembered after its last row, unless
_ACTIVE_ROUNDS = 8.0  # batches' time for which it counts as active, which may be longer
_QUIET_ROUNDS = 2.0
_LONGEST_PAUSE = 1.0
_NEVER = float("-inf")

Backlog = Callable[[str, str | None], bool]
"""Tells of a workspace, or of a session of it, whether a whole batch of its rows waits."""


class _Use:
    """What one asker has: when it asked and was served last, and the askers within it."""

    __slots__ = ("asked", "inside", "served")

    def __init__(self) -> None:
        self.asked = self.served = _NEVER
        self.inside: _Level | None = None


class _Level:
    """Those who share something: workspaces the model, sessions their workspace. Only the active ones are known."""

    __slots__ = ("_order",)

    def __init__(self) -> None:
        self._order: OrderedDict[str, _Use] = OrderedDict()

    def __len__(self) -> int:
        return len(self._order)

    def get(self, name: str) -> _Use | None:
        return self._order.get(name)

    def asked(self, name: str, now: float, known: float) -> _Use:
        """Take note of who comes, and forget who has not come for long."""
        use = self._order.get(name)
        if use is None:
            use = self._order[name] = _Use()
        use.asked = now
        self._order.move_to_end(name)
        while next(iter(self._order.values())).asked < now - known:
            self._order.popitem(last=False)
        return use

    def others_asked(self, name: str, heavy: Callable[[str], bool]) -> float:
        """Return when somebody else asked last who does not ask for much."""
        return next((use.asked for o, use in reversed(self._order.items()) if o != name and not heavy(o)), _NEVER)


class Shares:
    """Who is active. Pure: times are told, in seconds.

    One that asks alone may have all of the model, and those who have a backlog of a whole batch each share it like
    any others. But beside others that have none and are active, who has one crowds them: it is written along with
    them, and by itself only where that leaves a replica free and the others are quiet, or where it was not served for
    a second.
    """

    def __init__(self, replicas: int) -> None:
        self._replicas = replicas
        self._workspaces = _Level()
        self._known, self._active, self._quiet = _KNOWN, 0.0, 0.0

    def __len__(self) -> int:
        return len(self._workspaces)

    def remember(self, seconds: float) -> None:
        """Learn how long a batch takes: who waits for one is active meanwhile."""
        self._active, self._quiet = _ACTIVE_ROUNDS * seconds, _QUIET_ROUNDS * seconds
        self._known = max(_KNOWN, self._active)

    def asked(self, workspace: str, session: str, now: float) -> None:
        """Take note of a row that comes."""
        use = self._workspaces.asked(workspace, now, self._known)
        if use.inside is None:
            use.inside = _Level()
        use.inside.asked(session, now, self._known)

    def took(self, workspace: str, session: str, now: float) -> None:
        """Take note of a row that begins."""
        outer = self._workspaces.get(workspace)
        inner = outer.inside.get(session) if outer and outer.inside else None
        for use in (outer, inner):
            if use is not None:
                use.served = now

    def knows(self, workspace: str, session: str) -> bool:
        """Tell whether a session has asked lately."""
        outer = self._workspaces.get(workspace)
        return outer is not None and outer.inside is not None and outer.inside.get(session) is not None

    def crowds(self, workspace: str, session: str, now: float, backlog: Backlog) -> bool:
        """Tell whether a session has a backlog beside others that have none, or its workspace has."""
        among, within = self._others(workspace, session, backlog)
        return now - max(among, within) < self._active

    def may_lead(self, workspace: str, session: str, now: float, free: int, backlog: Backlog) -> bool:
        """Tell whether somebody who crowds may begin a batch where so many replicas are free."""
        if self._replicas == 1:
            return True  # others come first in the queue, and nothing can be kept free for them
        among, within = self._others(workspace, session, backlog)
        # Who crowds may be the workspace, whichever session of it is next, or this session of it.
        use = self._workspaces.get(workspace)
        if use is not None and use.inside is not None and now - among >= self._active:
            use = use.inside.get(session)
        if use is None or now - use.served > _LONGEST_PAUSE:
            return True
        return free > 1 and now - max(among, within) > self._quiet

    def _others(self, workspace: str, session: str, backlog: Backlog) -> tuple[float, float]:
        """Return when another workspace, and another session of this one, asked last whom a backlog of these crowds."""
        among = within = _NEVER
        if backlog(workspace, None):
            among = self._workspaces.others_asked(workspace, lambda other: backlog(other, None))
            outer = self._workspaces.get(workspace)
            if outer is not None and outer.inside is not None and backlog(workspace, session):
                within = outer.inside.others_asked(session, lambda other: backlog(workspace, other))
        return among, within
