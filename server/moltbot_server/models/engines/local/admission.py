"""Who may still join the queue: a bound in numbers, and one in time by what the replicas were measured to serve."""

from __future__ import annotations

from moltbot_server.errors import QueueFull
from moltbot_server.models.engines.local.fair_queue import FairQueue

PATIENCE = 60.0
"""Longest expected wait in seconds for those who name no deadline, unless four rounds of the replicas take longer."""

_PATIENT_ROUNDS = 4.0
_FLOODED_WAIT = 0.1  # seconds that those who flood may wait, unless a round takes longer
_CALM = 1.0  # seconds without a refusal after which a flood is over, unless
_CALM_ROUNDS = 4.0  # so many rounds take longer
_MANY = 1024
_FEW = 4


class Admission:
    """Refuses what could not begin in time. Pure: times are told, and `deadline` and `now` are of one clock.

    A burst may fill the queue. A workspace that was refused is flooding it until it was not refused for a while:
    meanwhile only so much of it is let in as keeps the replicas busy, for more would only make all of it late. When the
    queue is full, a workspace that has less than its share of it still gets in, up to twice the limit, and so does a
    session that has next to nothing waiting, up to a quarter more.
    """

    def __init__(self, queue: FairQueue, *, limit: int, replicas: int) -> None:
        """`limit`: rows that may wait."""
        self._queue = queue
        self._limit = limit
        self._replicas = replicas
        self._flooding: dict[str, float] = {}
        self._pace = 1.0  # seconds that a replica takes for each second that was expected
        self._round = 0.0  # seconds of a batch
        self.refused = 0

    def wait(self, workspace: str, session: str) -> float:
        """Return how long another row of a session would wait, in seconds, when all replicas are busy."""
        return self._queue.ahead(workspace, session) * self._pace / self._replicas

    def check(self, workspace: str, session: str, deadline: float | None, now: float, *, regular: bool = False) -> None:
        """Refuse a row that could not begin in time; `regular`: its session has asked lately.

        Raises:
            QueueFull: with when to come back.
        """
        waiting = len(self._queue)
        if not waiting:
            return
        wait = self.wait(workspace, session)
        if deadline is not None and now + wait > deadline:
            self._refuse(
                f"An answer would begin in about {wait:.1f} s, after the deadline; come back later or allow more time.",
                now + wait - deadline,
            )
        own = self._queue.count(workspace)
        held = self._queue.count_of(workspace, session) if session else _MANY
        full = waiting >= self._limit and not self._has_less_than_its_share(own, held < _FEW, waiting)
        flood = wait > max(self._round, _FLOODED_WAIT) and self._is_flooding(workspace, now)
        # Those who talk in a workspace that somebody floods are not those who flood it.
        flood = flood and not (regular and held < _FEW)
        if full or flood or wait > max(PATIENCE, _PATIENT_ROUNDS * self._round):
            self._note_flood(workspace, now)
            self._refuse(f"{waiting} answers wait already, which takes {wait:.1f} s; come back later.", wait / 2)

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

    def _has_less_than_its_share(self, own: int, light: bool, waiting: int) -> bool:
        """Tell whether there is room beyond the limit for a row of a workspace that has so many of those that wait."""
        sharing = self._queue.workspaces + (not own)
        # Half of what is left for each leaves something for whoever comes after.
        left = 2 * self._limit - waiting
        if sharing > 1 and own < self._limit // sharing and 2 * own < left:
            return True
        return light and 4 * waiting < 5 * self._limit

    def _is_flooding(self, workspace: str, now: float) -> bool:
        refused = self._flooding.get(workspace)
        return refused is not None and now - refused < max(_CALM, _CALM_ROUNDS * self._round)

    def _note_flood(self, workspace: str, now: float) -> None:
        if len(self._flooding) >= _MANY:
            self._flooding = {name: at for name, at in self._flooding.items() if self._is_flooding(name, now)}
        self._flooding[workspace] = now

    def _refuse(self, message: str, retry_after: float) -> None:
        self.refused += 1
        raise QueueFull(message, retry_after=min(max(retry_after, 0.05), 30.0))
