"""The queue before the replicas: the event loop puts rows in, the replicas' threads take batches out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from time import perf_counter

from moltbot_server.errors import ModelUnavailable
from moltbot_server.models.engines.local.admission import Admission
from moltbot_server.models.engines.local.batches import LOOKED_AT, Batch, joined_by, together
from moltbot_server.models.engines.local.costs import Costs, Shape, share
from moltbot_server.models.engines.local.fair_queue import FairQueue
from moltbot_server.models.engines.local.rows import Row
from moltbot_server.models.engines.local.shares import Shares

_LOOKED_AT = 1024
"""Most waiting rows whose places are told and whose deadlines are watched; those behind come closer first."""

_ANSWERED = 0.020  # seconds after the end of a batch in which those who were answered may ask again
_BURST = 0.050  # longest that rows which come one by one are waited for, unless
_BURST_SHARE = 0.02  # of a batch's time is less
_GAP = 0.004  # without another row, after which none is expected any more, unless fewer came than were answered
_UNSEEN = 64.0  # tokens of an answer, as far as its limit lets it, before any was seen
_SEEN = 0.05  # what the latest answer counts among those before it; the first ones are counted alike
_LEAST_BACKLOG = 8  # rows of somebody that wait before he may be found to crowd others
_LOOK_AGAIN = 0.02
_FEW_STEPS = 4


class Waiting:
    """Rows that wait, shared out between the replicas. Its methods may be called from any thread."""

    def __init__(self, *, limit: int, replicas: int, batch: int, weights: Mapping[str, float] | None = None) -> None:
        """`limit`: rows that may wait; `batch`: most rows of a batch; `weights` are those of `FairQueue`."""
        self.costs = Costs()
        self.pauses = self.batches = self.rows = 0
        self._limit = limit
        self._replicas = replicas
        self._batch = batch
        self._much = max(batch, _LEAST_BACKLOG)
        self._queue = FairQueue(weights)
        self._shares = Shares(replicas)
        self._admission = Admission(self._queue, limit=limit, replicas=replicas)
        self._changed = threading.Condition()
        self._idle = 0
        self._closed = False
        self._typical = _UNSEEN  # tokens of an answer, averaged over the latest
        self._lengths = 0  # answers that it was learned from
        self._answered, self._back = 0.0, 0  # when a batch ended, and how many of its rows were answered

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def refused(self) -> int:
        """Rows that were refused."""
        return self._admission.refused

    def admit(self, workspace: str, session: str, deadline: float | None) -> None:
        """Refuse what could not begin in time; `deadline` is on `perf_counter`'s clock.

        Raises:
            QueueFull: too much waits; `retry_after` says when to come back.
            ModelUnavailable: the queue is closed.
        """
        with self._changed:
            self._admit(workspace, session, deadline)

    def _admit(self, workspace: str, session: str, deadline: float | None) -> None:
        if self._closed:
            raise ModelUnavailable("The model is not loaded.")
        regular = bool(session) and self._shares.knows(workspace, session)
        self._admission.check(workspace, session, deadline, perf_counter(), regular=regular)

    def put(self, row: Row) -> None:
        """Add a row; idle replicas hear of it by `wake` only, so that rows that come together are taken together.

        Raises:
            QueueFull, ModelUnavailable: as `admit` does.
        """
        with self._changed:
            self._admit(row.workspace, row.session if row.named else "", row.deadline)
            row.cost = self._cost(len(row.prompt), min(row.left, int(self._typical)))
            self._queue.put(row)
            self._shares.asked(row.workspace, row.session, row.arrived)

    def wake(self) -> None:
        """Let the idle replicas take what waits."""
        with self._changed:
            self._changed.notify(len(self._queue))

    def pause(self, batch: Batch, index: int, words: Sequence[str], *, must: bool = False) -> bool:
        """Put a row back that a batch is writing, `words` added to its prompt; tell whether it will go on later.

        `must`: also where nobody waits who should have its place.
        """
        row = batch.rows[index]
        with self._changed:
            if self._closed or not (must or self._presses()):
                return False
            batch.paused.add(index)
            self._settle(batch, index)
            row.prompt = [*row.prompt, *words]
            row.cost = self._cost(len(row.prompt), min(row.left, int(self._typical)))
            self._queue.put(row, first=True)
            self.pauses += 1
            self._changed.notify()
            return True

    def rereading(self, batch: Batch) -> float:
        """Return how many seconds it would take to read the rows of a batch again with what was written of them."""
        sizes = [len(row.prompt) + len(tokens) for row, tokens in zip(batch.rows, batch.tokens, strict=True)]
        return self.costs((sum(sizes), sum(size * size for size in sizes) / 2, 0, 0, 0))

    def remove(self, row: Row) -> None:
        """Take a row out if it still waits."""
        with self._changed:
            self._queue.remove(row)

    def take(self) -> Batch | None:
        """Wait for work and return the rows to answer together; None when the queue is closed.

        The rows that wait are shared out between the threads that are free, so that a burst keeps all of them busy.
        """
        with self._changed:
            self._idle += 1
            self._let_burst_grow()
            while (batch := self._form()) is None and not self._closed:
                # Whoever may not begin now may when the others are quiet, of which nobody tells.
                self._changed.wait(_LOOK_AGAIN if self._queue else None)
                self._let_burst_grow()
            self._idle -= 1
            return None if self._closed else batch

    def _form(self) -> Batch | None:
        """Take out the rows that are best answered next; None where nobody may begin."""
        if self._closed or not self._queue:
            return None
        now = perf_counter()
        spared = self._spared(now)
        rows = list(islice(self._queue.walk(spared), LOOKED_AT))
        more = spared is not None and len(rows) < self._batch
        riders = list(islice(self._queue.walk(self._crowding(now)), LOOKED_AT)) if more else []
        most = min(self._batch, -(-len(self._queue) // self._idle))
        typical = max(1, int(self._typical))
        if rows:
            batch = joined_by(riders, together(rows, most, self.costs, typical), most, self.costs, typical)
        elif riders and self._shares.may_lead(
            riders[0].workspace, riders[0].session, now, self._idle, self._has_backlog
        ):
            batch = together(riders, most, self.costs, typical)
        else:
            return None
        self._queue.take(batch.rows)
        for row in batch.rows:
            self._shares.took(row.workspace, row.session, now)
        batch.crowded = len(self._queue) > 0
        return batch

    def _presses(self) -> bool:
        """Tell whether a row waits for which others should give way."""
        return next(self._queue.walk(self._spared(perf_counter())), None) is not None

    def _crowding(self, now: float) -> Callable[[str, str], bool]:
        """Return what tells whether a session is one of those who crowd others."""
        shares, backlog = self._shares, self._has_backlog
        return lambda workspace, session: shares.crowds(workspace, session, now, backlog)

    def _spared(self, now: float) -> Callable[[str, str], bool] | None:
        """Return what tells whether a session is none of those, unless there can be none of those."""
        crowding = self._crowding(now)
        return None if len(self._queue) < self._much else lambda workspace, session: not crowding(workspace, session)

    def _has_backlog(self, workspace: str, session: str | None) -> bool:
        queue = self._queue
        return (queue.count(workspace) if session is None else queue.count_of(workspace, session)) >= self._much

    def ended(self, batch: Batch, began: float, first: float | None, ended: float) -> None:
        """Learn from a batch: when it began, had its first token, ended. `first` is None where it was unlike others."""
        with self._changed:
            self.batches += 1
            self.rows += len(batch.rows)
            self._shares.remember(self._admission.round)
            self._admission.measured(ended - began, batch.charged, crowded=batch.crowded)
            answered = [index for index in range(len(batch.rows)) if index not in batch.paused]
            for index in answered:
                self._settle(batch, index)
            if answered:
                self._answered, self._back = ended, len(answered)
            self._changed.notify()  # for who had no place before
            if first is not None:
                self._learn(batch.shape(), first - began, ended - first)

    def _learn(self, shape: Shape, first: float, rest: float) -> None:
        until_first, terms = shape.first_terms, shape.terms
        self.costs.learn(until_first, first)
        if terms[2] > _FEW_STEPS:
            self.costs.learn((0, 0, terms[2] - 1, terms[3] - until_first[3], terms[4] - until_first[4]), rest)
        self.costs.fit()

    def answered(self, tokens: int, *, cut: bool) -> None:
        """Learn how long an answer was; one that was `cut` at its limit tells only that answers are no shorter."""
        if cut and tokens <= self._typical:
            return
        self._lengths += 1
        self._typical += max(_SEEN, 1 / self._lengths) * (tokens - self._typical)

    def under_way(self, tokens: Sequence[int]) -> None:
        """Learn how much of the answers that are being written there is: if most are longer than expected, all are."""
        if tokens:
            self._typical = max(self._typical, sorted(tokens)[len(tokens) // 2])

    def forget(self) -> None:
        """Forget what was learned, of a model that has just woken up: its first batch tells how long that takes."""
        with self._changed:
            self.costs = Costs()
            self._admission = Admission(self._queue, limit=self._limit, replicas=self._replicas)
            self._typical, self._lengths = _UNSEEN, 0

    def places(self) -> list[Row]:
        """Return the rows that wait, the next to be served first; at most 1,024."""
        with self._changed:
            return list(islice(self._queue.walk(), _LOOKED_AT))

    def expired(self) -> list[Row]:
        """Take out the rows that did not begin before their deadline."""
        with self._changed:
            return list(self._queue.expired(perf_counter(), _LOOKED_AT))

    def close(self) -> list[Row]:
        """Let no more in, wake every thread, and return the rows that nobody will answer."""
        with self._changed:
            self._closed = True
            left = self._queue.clear()
            self._changed.notify_all()
            return left

    def _settle(self, batch: Batch, index: int) -> None:
        """Charge a row what it has cost in a batch, now that it is known."""
        row = batch.rows[index]
        more = self._cost(batch.sizes[index] + len(batch.lead), len(batch.tokens[index])) - row.charged
        self._queue.charge(row, more)

    def _cost(self, prompt: int, new: int) -> float:
        return self.costs(share(prompt, new, self._batch))

    def _let_burst_grow(self) -> None:
        """Wait while more rows come, if answers have just ended: who was answered may ask again at once.

        Not longer than is little beside what a batch takes, for a row that came alone waits in vain.
        """
        now = perf_counter()
        most_time = min(_BURST, _BURST_SHARE * self._admission.round)
        if not self._queue or now - self._answered > max(_ANSWERED, most_time):
            return
        until = now + most_time
        most = self._batch * self._idle
        while (left := until - perf_counter()) > 0 and len(self._queue) < most:
            size = len(self._queue)
            self._changed.wait(left if size < self._back else min(_GAP, left))
            if self._closed or (len(self._queue) <= size and size >= self._back):
                return
