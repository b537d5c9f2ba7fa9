"""Who floods the core: whose turns are refused by the hundred."""

from __future__ import annotations

import time
from collections.abc import Callable

_WINDOW = 0.5
_A_FLOOD = 100
_LOOKED_AT = 16
_MANY = 1024


class Floods:
    """Counts refused turns by workspace. `unread` says of whom the next turn may be refused without a look at it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` returns seconds."""
        self._clock = clock
        self._floods: dict[str, _Flood] = {}

    def refused(self, workspace: str) -> None:
        """Take note of a turn that was refused because too much waits."""
        flood = self._floods.get(workspace)
        if flood is None:
            if len(self._floods) >= _MANY:
                self._floods.clear()
            flood = self._floods[workspace] = _Flood()
        now = self._clock()
        if now - flood.since > _WINDOW:
            flood.before = flood.count if now - flood.since < 2 * _WINDOW else 0
            flood.since, flood.count = now, 0
        flood.count += 1

    def over(self, workspace: str) -> None:
        """Take note that a workspace asks for something else too, so that its turns have to be looked at."""
        self._floods.pop(workspace, None)

    def unread(self, workspace: str) -> bool:
        """Tell whether two hundred turns a second of a workspace are refused; one in 16 is looked at all the same."""
        flood = self._floods.get(workspace)
        if flood is None or max(flood.count, flood.before) < _A_FLOOD:
            return False
        if self._clock() - flood.since > 2 * _WINDOW:
            del self._floods[workspace]
            return False
        flood.calls += 1
        return flood.calls % _LOOKED_AT != 0


class _Flood:
    """The refusals of one workspace, in this window and the one before."""

    __slots__ = ("before", "calls", "count", "since")

    def __init__(self) -> None:
        self.since = 0.0
        self.count = self.before = self.calls = 0
