"""Who may still join the queue: a bound in numbers, and one in time by what the replicas were measured to serve."""

from __future__ import annotations

from moltbot_server.errors import QueueFull
from moltbot_server.models.engines.local.fair_queue import FairQueue

PATIENCE = 60.0
"""Longest expected wait in seconds for those who name no deadline, unless four rounds of the replicas take longer."""

_PATIENT_ROUNDS = 4.0
_FLOODED_ROUNDS = 2.0
_MANY = 1024


class Admission:
    """Refuses what could not begin in time. Pure: times are told, and `deadline` and `now` are of one clock.

    A burst may fill the queue. A workspace that was refused once floods it until none of its rows waits: meanwhile only
    so much of it is let in as keeps the replicas busy, for more would only make all of it late. When the queue is full,
    a workspace that has less than its share of it still gets in, up to twice the limit.
    """

    def __init__(self, queue: FairQueue, *, limit: int, replicas: int) -> None:
        """`limit`: rows that may wait."""
        self._queue = queue
        self._limit = limit
        self._replicas = replicas
        self._flooding: set[str] = set()
        self._pace = 1.0  # seconds that a replica takes for each second that was expected
        self._round = 0.0  # seconds of a batch
        self.refused = 0

    def wait(self, workspace: str, session: str) -> float:
        """Return how long another row of a session would wait, in seconds, when all replicas are busy."""
        return self._queue.ahead(workspace, session) * self._pace / self._replicas

    def check(self, workspace: str, session: str, deadline: float | None, now: float) -> None:
        """Refuse a row that could not begin in time.

        Raises:
            QueueFull: with when to come back.
        """
        waiting = len(self._queue)
        if not waiting:
            self._flooding.clear()
            return
        wait = self.wait(workspace, session)
        if deadline is not None and now + wait > deadline:
            self._refuse(
                f"An answer would begin in about {wait:.1f} s, after the deadline; come back later or allow more time.",
                now + wait - deadline,
            )
        own = self._queue.count(workspace)
        if not own:
            self._flooding.discard(workspace)
        elif workspace in self._flooding and wait > _FLOODED_ROUNDS * self._round:
            self._refuse(f"{own} answers wait already; come back later.", wait / 2)
        if waiting >= self._limit and not self._has_less_than_its_share(own, waiting):
            self._flood(workspace)
            self._refuse(f"{waiting} answers wait already; come back later.", wait / 2)
        if wait > max(PATIENCE, _PATIENT_ROUNDS * self._round):
            self._flood(workspace)
            self._refuse(f"An answer would begin in about {wait:.0f} s; come back later.", wait / 2)

    def measured(self, seconds: float, expected: float, *, crowded: bool) -> None:
        """Learn how long a batch took, and what its rows were expected to cost in full batches of equals.

        Only batches that left `crowded` others waiting tell how fast a queue is served.
        """
        self._round = seconds if not self._round else self._round + 0.1 * (seconds - self._round)
        if crowded and expected > 0:
            pace = min(max(seconds / expected, self._pace / 2), self._pace * 2)
            self._pace += 0.1 * (pace - self._pace)

    @property
    def round(self) -> float:
        """Seconds that a batch takes."""
        return self._round

    def _has_less_than_its_share(self, own: int, waiting: int) -> bool:
        sharing = self._queue.workspaces + (not own)
        # Half of what is left for each leaves something for whoever comes after.
        left = 2 * self._limit - waiting
        return sharing > 1 and own < self._limit // sharing and 2 * own < left

    def _flood(self, workspace: str) -> None:
        if len(self._flooding) >= _MANY:
            self._flooding = {name for name in self._flooding if self._queue.count(name)}
        self._flooding.add(workspace)

    def _refuse(self, message: str, retry_after: float) -> None:
        self.refused += 1
        raise QueueFull(message, retry_after=min(max(retry_after, 0.05), 30.0))
