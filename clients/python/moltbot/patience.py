"""Whether a call that failed is made again, and when: full jitter, a limit of patience, a budget of repeats."""

from __future__ import annotations

import asyncio
import random
import time

import grpc

from moltbot.channel import Link, Ways
from moltbot.errors import MoltBotClientError

_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 1.0
PATIENCE = 60.0
"""Seconds that a client goes without any progress."""
FIRST_CONTACT = 5.0
"""Seconds that it waits for a core of which it has never heard: most often the address is wrong."""
_HELD = 30.0
"""Seconds after which a call that broke was alive, however silent it was: a dead connection is found sooner."""
_ODD_TRIES = 4
"""How often something is tried that ends with a status which is not UNAVAILABLE, so is perhaps no fault of the way."""


class Budget:
    """How many calls may be made again that a core which is there refused; each success earns one.

    It bounds what all streams and calls of a client together ask of a core in trouble. A connection that is broken
    costs nothing: nobody is asked anything before there is another one.
    """

    def __init__(self, *, most: float = 20.0, per_second: float = 2.0) -> None:
        self._most = self._left = most
        self._per_second = per_second
        self._counted = time.monotonic()

    def earn(self) -> None:
        """Take note of a success."""
        self._left = min(self._left + 1.0, self._most)

    def take(self) -> bool:
        """Take one repeat; False when there is none."""
        now = time.monotonic()
        self._left = min(self._left + (now - self._counted) * self._per_second, self._most)
        self._counted = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


class Patience:
    """What one call has left: of its deadline, and of the time that it may go without any progress."""

    def __init__(
        self, ways: Ways, budget: Budget, *, limit: float, first: float, within: float | None, safe: bool = True
    ) -> None:
        """`limit`, `first` (the limit before any core has answered) and `within` are in seconds.

        A call that is not `safe` is repeated only where no core can have begun it.
        """
        self._ways = ways
        self._budget = budget
        self._limit = limit
        self._first = first
        self._safe = safe
        self._ends = None if within is None else time.monotonic() + within
        self._began = 0.0
        self._since: float | None = None
        self._tried = 0

    def left(self) -> float | None:
        """Return the seconds that the next attempt may take, and begin it; None for as long as it takes."""
        self._began = time.monotonic()
        # A deadline that has passed is still sent, as one that passes at once: the core answers DEADLINE_EXCEEDED.
        return None if self._ends is None else max(self._ends - self._began, 0.001)

    def progress(self) -> None:
        """Take note that the core answered."""
        if self._since is not None or not self._ways.answered:
            self._ways.answered = True
            self._since = None
            self._tried = 0
            self._budget.earn()

    async def pause(self, error: MoltBotClientError, link: Link) -> None:
        """Wait until the call is to be made again.

        Raises:
            MoltBotClientError: `error`, where another attempt would be in vain or would come too late.
        """
        if not self._passes(error):
            raise error
        now = time.monotonic()
        if self._since is None or now - self._began > _HELD:
            self._since = now
            self._tried = 0
        self._ways.leave(link)
        others = self._tried < len(self._ways) - 1  # which have not been asked yet
        while True:
            wait = 0.0 if others else self._wait(error)
            self._tried += 1
            if now + wait > self._until(error):
                raise error
            await asyncio.sleep(wait)
            if not self._ways.pick().is_there or self._budget.take():
                return
            now, others = time.monotonic(), False

    def _passes(self, error: MoltBotClientError) -> bool:
        if error.never_reached:
            return not error.is_final
        if not self._safe or error.is_final:
            return False
        if error.connection_broke and error.code is not grpc.StatusCode.UNAVAILABLE:
            return self._tried < _ODD_TRIES
        return error.connection_broke or error.reason in ("STORAGE_UNAVAILABLE", "SLOW_CONSUMER")

    def _wait(self, error: MoltBotClientError) -> float:
        jitter = random.uniform(0.0, min(_FIRST_PAUSE * 2.0**self._tried, _LONGEST_PAUSE))
        return jitter + (error.retry_after or 0.0)

    def _until(self, error: MoltBotClientError) -> float:
        """Return the time after which the call is given up."""
        assert self._since is not None
        known = self._ways.answered or error.reason
        until = self._since + (self._limit if known else min(self._limit, self._first))
        return until if self._ends is None else min(until, self._ends)
