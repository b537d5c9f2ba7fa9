"""Answers that wait for the model, and answers being written: the seam between the event loop and native threads."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import NamedTuple

from moltbot_server.errors import ModelUnavailable, QueueFull

STOPPED, FULL, GONE = -1, -2, -3
"""What ends a row instead of a token id: an end token, its token limit, the model itself."""

BATCH = 8
"""Most rows of one batch: beyond it the first tokens come later and the throughput grows no more."""


class Sampling(NamedTuple):
    """Options that all rows of a batch share, in CTranslate2's terms."""

    topk: int = 1
    topp: float = 1.0
    temperature: float = 1.0
    repetition_penalty: float = 1.0


class Row:
    """One answer: its prompt, what was written of it, and who reads that.

    The native thread only reads `cancelled` and counts; all else belongs to the event loop. Times are `perf_counter`'s.
    """

    __slots__ = (
        "arrived",
        "began",
        "cancelled",
        "ended",
        "first",
        "inbox",
        "last",
        "left",
        "limit",
        "prompt",
        "read",
        "sampling",
    )

    def __init__(self, prompt: Sequence[str], sampling: Sampling, limit: int) -> None:
        self.prompt = prompt
        self.sampling = sampling
        self.limit = limit
        self.left = limit
        self.cancelled = False
        self.ended = False
        self.inbox: list[int] = []
        self.read: Callable[[list[int]], None] = unread
        self.arrived = perf_counter()
        self.began = self.first = self.last = 0.0

    def put(self, token: int) -> bool:
        """Add a token id or what ends the row; nothing comes after an end. Tell whether it is the first to be read."""
        if self.ended:
            return False
        self.ended = token < 0
        self.inbox.append(token)
        return len(self.inbox) == 1

    def hand_over(self) -> None:
        """Let the reader have what has arrived since the last time."""
        taken, self.inbox = self.inbox, []
        self.read(taken)


def unread(tokens: list[int]) -> None:
    """Stand in for the reader of a row that nobody reads."""


class Waiting:
    """The bounded queue before the model. Rows of equal sampling and similar length leave it together."""

    def __init__(self, limit: int, threads: int) -> None:
        self._limit = limit
        self._threads = threads
        self._rows: deque[Row] = deque()
        self._changed = threading.Condition()
        self._idle = 0
        self._closed = False
        self._seconds = 0.05  # of one thread for one row, averaged over the latest batches

    def __len__(self) -> int:
        return len(self._rows)

    def check(self) -> None:
        """Refuse when no row can be added.

        Raises:
            QueueFull: as many rows wait as may; `retry_after` is when half of them will have been answered.
            ModelUnavailable: the queue is closed.
        """
        if self._closed:
            raise ModelUnavailable("The model is not loaded.")
        if len(self._rows) >= self._limit:
            wait = self._seconds * len(self._rows) / self._threads / 2
            raise QueueFull(
                f"{len(self._rows)} answers wait already; come back later.", retry_after=min(max(wait, 0.05), 30.0)
            )

    def put(self, row: Row) -> None:
        """Add a row at the end.

        Raises:
            QueueFull, ModelUnavailable: as `check` does.
        """
        with self._changed:
            self.check()
            self._rows.append(row)
            self._changed.notify()

    def remove(self, row: Row) -> None:
        """Take a row out if it still waits."""
        with self._changed:
            if row in self._rows:
                self._rows.remove(row)

    def take(self) -> list[Row]:
        """Wait for work and return the rows to answer together; none when the queue is closed.

        The rows that wait are shared out between the threads that are free, so that a burst keeps all of them busy.
        """
        with self._changed:
            self._idle += 1
            while not self._rows and not self._closed:
                self._changed.wait()
            share = min(BATCH, -(-len(self._rows) // self._idle))
            self._idle -= 1
            return self._together(share)

    def measured(self, seconds: float, rows: int) -> None:
        """Learn how long a batch took."""
        self._seconds += 0.1 * (seconds / rows - self._seconds)

    def close(self) -> list[Row]:
        """Let no more in, wake every thread, and return the rows that nobody will answer."""
        with self._changed:
            self._closed = True
            left = list(self._rows)
            self._rows.clear()
            self._changed.notify_all()
            return left

    def _together(self, most: int) -> list[Row]:
        if not self._rows:
            return []
        first = self._rows.popleft()
        batch = [first]
        size = len(first.prompt)
        # A longer prompt reads its surplus one token per step while the shorter ones already speak.
        near = 4 + size // 16
        passed: list[Row] = []
        while self._rows and len(batch) < most:
            row = self._rows.popleft()
            fits = row.sampling == first.sampling and abs(len(row.prompt) - size) <= near
            (batch if fits else passed).append(row)
        self._rows.extendleft(reversed(passed))
        return batch
