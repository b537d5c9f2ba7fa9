"""The retry budget: how many attempts more than turns a route may make."""

from __future__ import annotations

FLOOR = 10.0
"""So many extra attempts are always there for the first turns and for quiet times; they come back one a second."""


class RetryBudget:
    """An account: each turn pays a share of an attempt in, each extra attempt takes a whole one out.

    It never keeps a turn from a model that is well: a turn without an answer is worse than an attempt too many. It says
    who is to rest when extra attempts become too many, and whether models that are ill are worth a try.
    """

    def __init__(self, share: float) -> None:
        """`share` is the most extra attempts for each turn, in the long run."""
        self.share = share
        self._saved = FLOOR
        self._at: float | None = None

    def turn(self, now: float) -> None:
        """Pay in for a turn."""
        self._refill(now)
        self._saved = min(self._saved + self.share, FLOOR)

    def spend(self, now: float) -> bool:
        """Take an extra attempt out; False when there was none left for it."""
        self._refill(now)
        covered = self._saved >= 1.0
        # A debt is bounded, so that it is paid back in seconds.
        self._saved = max(self._saved - 1.0, -FLOOR)
        return covered

    def has(self, now: float) -> bool:
        """Tell whether an extra attempt is left."""
        self._refill(now)
        return self._saved >= 1.0

    def _refill(self, now: float) -> None:
        if self._at is not None and now > self._at:
            self._saved = min(self._saved + now - self._at, FLOOR)
        self._at = now
