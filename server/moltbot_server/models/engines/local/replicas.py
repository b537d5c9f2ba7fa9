"""The replicas of a model: each writes one batch after the other, on a thread of ours."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Protocol

from moltbot_server.errors import ModelUnavailable
from moltbot_server.models.engines.local.batch_writing import BatchWriting, Reader
from moltbot_server.models.engines.local.batches import Batch
from moltbot_server.models.engines.local.processes import ReplicaLost
from moltbot_server.models.engines.local.rows import GONE
from moltbot_server.models.engines.local.waiting import Waiting

LOCK_TURN = 0.0001
"""How long a thread may keep the interpreter's lock from those that wait for it, in seconds.

A replica in a thread needs the lock once per row and step. Measured with the built-in model, 16 streams, two replicas,
and an event loop that was half busy with other calls: 4,800 tokens/s with Python's own 5 ms, 7,000 with 1 ms, 8,800
with 0.3 ms and 9,900 with this; with an idle loop it makes no difference.
"""

PAUSES = (0.0, 0.1, 0.5, 2.0, 5.0, 10.0)
"""Seconds before each attempt to start a replica again."""

_log = logging.getLogger(__name__)


class Replica(Protocol):
    """What writes batches, one at a time."""

    def start(self) -> None:
        """Be ready to write.

        Raises:
            ModelUnavailable: the text says why not.
        """

    def lives(self) -> bool:
        """Tell whether it has not died since it last wrote; `start` makes one anew that has."""

    def write(self, batch: Batch, writing: BatchWriting) -> None:
        """Write a batch to its end; what of it does not end is left open.

        Raises:
            ReplicaLost: it has died; `start` makes it anew.
        """

    def close(self) -> None:
        """Write no more; may be called from any thread."""


class Replicas:
    """A loaded model and its threads. Each takes batches from the queue and tells the reader what was written."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        *,
        name: str,
        waiting: Waiting,
        reader: Reader,
        ends: frozenset[int],
        vocabulary: Sequence[str],
    ) -> None:
        """`ends`: ids of the tokens that end an answer; `vocabulary`: the tokens by id."""
        self._replicas = replicas
        self._name = name
        self._waiting = waiting
        self._reader = reader
        self._ends = ends
        self._vocabulary = vocabulary
        self._leads: set[tuple[str, ...]] = set()
        self._running: set[Batch] = set()
        self._closing = threading.Event()
        self.revivals = 0
        self._threads = [
            threading.Thread(target=self._work, args=(replica,), name=f"model-{name}-{index}", daemon=True)
            for index, replica in enumerate(replicas)
        ]

    @property
    def alive(self) -> bool:
        """Whether every thread lives."""
        return all(thread.is_alive() for thread in self._threads)

    @property
    def rows(self) -> int:
        """How many answers are being written."""
        return sum(len(batch.rows) - batch.over for batch in tuple(self._running))

    def load(self) -> None:
        """Make all replicas ready to write.

        Raises:
            ModelUnavailable: one of them cannot be; the others are still to be closed.
        """
        with ThreadPoolExecutor(len(self._replicas), "load") as pool:
            list(pool.map(lambda replica: replica.start(), self._replicas))

    def start(self) -> None:
        """Start the threads; from now on the interpreter's lock goes round faster in this process."""
        sys.setswitchinterval(min(sys.getswitchinterval(), LOCK_TURN))
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End the replicas and wait for the threads; the queue must be closed and the rows cancelled before."""
        self._closing.set()
        for replica in self._replicas:
            replica.close()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _work(self, replica: Replica) -> None:
        batch: Batch | None = None
        try:
            while (batch := self._waiting.take()) is not None:
                if not replica.lives():
                    # No fault of those that wait now: only what a process dies with may be what ends it.
                    extra = {"model": self._name}
                    _log.error("a process of the model has died while it had nothing to do", extra=extra)
                    if not self._revive(replica):
                        self._let_go(batch)
                        break
                if not self._write(replica, batch) and not self._revive(replica):
                    break
        except BaseException:
            _log.exception("a thread of the model died", extra={"model": self._name})
            self._reader.died()
            for row in batch.rows if batch else ():
                self._reader.note(row, GONE)
            for row in self._waiting.close():
                self._reader.note(row, GONE)
            self._reader.hand_over()

    def _write(self, replica: Replica, batch: Batch) -> bool:
        """Write a batch; tell whether the replica still lives."""
        began = perf_counter()
        for row in batch.rows:
            if not row.began:
                row.began, row.cached = began, len(batch.lead)
        writing = BatchWriting(batch, self._reader, self._waiting, self._ends, self._vocabulary)
        self._running.add(batch)
        lost = ""
        try:
            if not all(row.cancelled for row in batch.rows):
                replica.write(batch, writing)
        except ReplicaLost as problem:
            lost = str(problem)
            writing.lost()
        except Exception as problem:
            writing.trouble.append(problem)
        finally:
            self._running.discard(batch)
            if writing.trouble:
                extra = {"model": self._name, "rows": len(batch.rows)}
                _log.error("a batch failed", exc_info=writing.trouble[0], extra=extra)
            for index in writing.open:
                self._reader.note(batch.rows[index], GONE)
            self._reader.hand_over()
        self._learn(batch, writing, usual=not lost)
        if lost and not self._closing.is_set():
            extra = {"model": self._name, "how": lost, "rows": len(batch.rows), "again": len(batch.paused)}
            _log.error("a process of the model has died, and another one takes its place", extra=extra)
        return not lost

    def _let_go(self, batch: Batch) -> None:
        """Tell the rows of a batch that nobody will write it."""
        for row in batch.rows:
            self._reader.note(row, GONE)
        self._reader.hand_over()

    def _revive(self, replica: Replica) -> bool:
        """Start a replica that has died again; False when the model is closed, or it could not be for too long."""
        for pause in PAUSES:
            if self._closing.wait(pause):
                return False
            try:
                replica.start()
            except ModelUnavailable as problem:
                extra = {"model": self._name, "problem": problem.message}
                _log.error("a process of the model cannot be started", extra=extra)
            else:
                self.revivals += 1
                return True
        raise RuntimeError("no process for a replica can be started")

    def _learn(self, batch: Batch, writing: BatchWriting, *, usual: bool) -> None:
        new = bool(batch.lead) and batch.lead not in self._leads
        self._leads.add(batch.lead)
        usual = usual and bool(writing.first) and not new and not writing.trouble
        self._waiting.ended(batch, writing.began, writing.first if usual else None, writing.ended or perf_counter())
