"""Whether the Redis of a store is there, as all of its connections find it."""

from __future__ import annotations

import logging
import time

from moltbot_server.store.protocol import Away

log = logging.getLogger(__name__)


class Presence:
    """What the lines of a store tell of one Redis: it is away as soon as one of them finds so, until none does.

    The log hears of it once, however many lines there are.
    """

    def __init__(self, address: str) -> None:
        """`address` is for whoever runs it."""
        self._address = address
        self._missing: set[object] = set()
        self.away: Away | None = None

    def lost(self, line: object, problem: str) -> None:
        """Take note that a line cannot reach it, and why."""
        self._missing.add(line)
        if self.away is None:
            self.away = Away(where=f"Redis at {self._address}", problem=problem, since=time.time())
            fields = {"at": self._address, "problem": problem}
            log.warning("Redis is away; turns are refused until it is there again", extra=fields)

    def found(self, line: object) -> None:
        """Take note that a line has it again."""
        self._missing.discard(line)
        if self.away is not None and not self._missing:
            fields = {"at": self._address, "seconds": round(time.time() - self.away.since, 1)}
            self.away = None
            log.info("Redis is there again", extra=fields)
