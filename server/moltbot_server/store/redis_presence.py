"""Whether the Redis of a store is there and takes writes, as all of its connections find it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from redis.exceptions import OutOfMemoryError

from moltbot_server.store.protocol import Away

log = logging.getLogger(__name__)

_FULL = "its memory is used up, so it takes no writes (OOM): raise its maxmemory, or make room in it"
_WHY = {
    "maxmemory": _FULL,  # as older ones tell it of a script
    "MISCONF": "it cannot save, so it takes no writes (MISCONF): make room on its disk; its log says more",
    "NOREPLICAS": "too few replicas follow it, so it takes no writes (NOREPLICAS): start those that are missing",
}


class Presence:
    """What the lines of a store tell of one Redis: it is away as soon as one of them finds so, until none does.

    One that refuses writes, of whatever kind, is away as well, until a write of a certain size was taken; it can be
    read meanwhile. The log hears of each once, however many lines there are.
    """

    def __init__(self, address: str) -> None:
        """`address` is for whoever runs it."""
        self.address = address
        self._missing: set[object] = set()
        self._unreachable: Away | None = None
        self._refusing: Away | None = None
        self._look: Callable[[], None] = lambda: None

    @property
    def away(self) -> Away | None:
        """Why Redis cannot be used; None while all is well."""
        return self._unreachable or self._refusing

    @property
    def is_lost(self) -> bool:
        """Whether Redis cannot be reached."""
        return self._unreachable is not None

    def when_refusing(self, look: Callable[[], None]) -> None:
        """Have `look` called when Redis begins to refuse writes: it has to find out when that is over."""
        self._look = look

    def lost(self, line: object, problem: str) -> None:
        """Take note that a line cannot reach it, and why."""
        self._missing.add(line)
        if self._unreachable is None:
            self._unreachable = self._away(problem)
            fields = {"at": self.address, "problem": problem}
            log.warning("Redis is away; turns are refused until it is there again", extra=fields)

    def found(self, line: object) -> None:
        """Take note that a line has it again."""
        self._missing.discard(line)
        if self._unreachable is not None and not self._missing:
            fields = self._lasted(self._unreachable)
            self._unreachable = None
            log.info("Redis is there again", extra=fields)

    def refused(self, refusal: Exception) -> None:
        """Take note of a refusal, where it says that Redis takes no writes."""
        problem = why_no_writes(refusal)
        if problem and self._refusing is None:
            self._refusing = self._away(problem)
            fields = {"at": self.address, "problem": problem}
            log.error("Redis takes no writes; turns are refused until it does again", extra=fields)
            self._look()

    def took(self) -> None:
        """Take note that Redis took a write."""
        if self._refusing is not None:
            fields = self._lasted(self._refusing)
            self._refusing = None
            log.info("Redis takes writes again", extra=fields)

    def _away(self, problem: str) -> Away:
        return Away(where=f"Redis at {self.address}", problem=problem, since=time.time())

    def _lasted(self, away: Away) -> dict[str, object]:
        return {"at": self.address, "seconds": round(time.time() - away.since, 1)}


def why_no_writes(refusal: Exception) -> str:
    """Return why Redis takes no writes at all, for whoever runs it; empty where a refusal says nothing of the kind."""
    if isinstance(refusal, OutOfMemoryError):
        return _FULL
    text = str(refusal)
    return next((why for known, why in _WHY.items() if known in text), "")
