"""The replicas of a model: threads that write one batch after the other in native code."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Protocol

import ctranslate2

from moltbot_server.errors import ModelUnavailable
from moltbot_server.models.engines.local.batches import Batch
from moltbot_server.models.engines.local.rows import FULL, GONE, STOPPED, Row
from moltbot_server.models.engines.local.waiting import Waiting
from moltbot_server.models.folder import ModelFolder
from moltbot_server.models.tuning import Tuning

SLICE = 128
"""Least tokens that a row writes in one batch before it gives way to those that wait."""

PAYS = 5.0
"""How many times as long as reading its rows again a batch is written before they give way.

Measured with 100 million parameters, 24 answers of 512 tokens for 16 places and a short question now and then: 298
tokens/s without giving way, with it after 64, 128 or 256 tokens 209, 235 and 260; the short question waited at most
27 s, and 8, 16 and 22 s. The longer the context, the more it costs to read it again.
"""

LOCK_TURN = 0.0001
"""How long a thread may keep the interpreter's lock from those that wait for it, in seconds.

A replica needs the lock once per row and step. Measured with the built-in model, 16 streams, two replicas, and an event
loop that was half busy with other calls: 4,800 tokens/s with Python's own 5 ms, 7,000 with 1 ms, 8,800 with 0.3 ms and
9,900 with this; with an idle loop it makes no difference.
"""

_NEARLY_DONE = 32
_log = logging.getLogger(__name__)

Callback = Callable[[ctranslate2.GenerationStepResult], bool]
"""Called once per row and step; True ends the row."""


class Reader(Protocol):
    """Who hears from the replicas; called on their threads."""

    def note(self, row: Row, token: int) -> None:
        """Hear of a token of a row, or of what ended it; it is read after the next `hand_over`."""

    def hand_over(self) -> None:
        """Let the event loop read what was noted."""

    def died(self) -> None:
        """Hear that a thread has died."""


def load(folder: ModelFolder, tuning: Tuning) -> ctranslate2.Generator:
    """Load the weights once for all replicas.

    Raises:
        ModelUnavailable: the text says what was found and what was expected.
    """
    try:
        return ctranslate2.Generator(
            str(folder.path),
            device="cpu",
            inter_threads=tuning.replicas,
            intra_threads=tuning.threads,
            compute_type=tuning.compute_type,
            max_queued_batches=-1,
        )
    except (RuntimeError, ValueError, MemoryError) as problem:
        raise ModelUnavailable(
            f"{folder.path} cannot be loaded: {problem}; expected a whole CTranslate2 decoder model."
        ) from None


class Replicas:
    """A loaded model and its threads. Each takes batches from the queue and tells the reader what was written."""

    def __init__(
        self,
        generator: ctranslate2.Generator,
        *,
        name: str,
        count: int,
        waiting: Waiting,
        reader: Reader,
        ends: frozenset[int],
        vocabulary: Sequence[str],
    ) -> None:
        """`ends`: ids of the tokens that end an answer; `vocabulary`: the tokens by id."""
        self._generator = generator
        self._name = name
        self._waiting = waiting
        self._reader = reader
        self._ends = ends
        self._end_list = sorted(ends)
        self._vocabulary = vocabulary
        self._leads: set[tuple[str, ...]] = set()
        self._running: set[Batch] = set()
        self._threads = [
            threading.Thread(target=self._work, name=f"model-{name}-{index}", daemon=True) for index in range(count)
        ]

    @property
    def alive(self) -> bool:
        """Whether every thread lives."""
        return all(thread.is_alive() for thread in self._threads)

    @property
    def rows(self) -> int:
        """How many answers are being written."""
        return sum(len(batch.rows) - batch.over for batch in tuple(self._running))

    def start(self) -> None:
        """Start the threads; from now on the interpreter's lock goes round faster in this process."""
        sys.setswitchinterval(min(sys.getswitchinterval(), LOCK_TURN))
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        """Wait for the threads to end, which they do when the queue is closed and their rows are cancelled."""
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        batch: Batch | None = None
        try:
            while (batch := self._waiting.take()) is not None:
                self._write(batch)
        except BaseException:
            _log.exception("a thread of the model died", extra={"model": self._name})
            self._reader.died()
            for row in batch.rows if batch else ():
                self._reader.note(row, GONE)
            for row in self._waiting.close():
                self._reader.note(row, GONE)
            self._reader.hand_over()

    def _write(self, batch: Batch) -> None:
        began = perf_counter()
        for row in batch.rows:
            if not row.began:
                row.began, row.cached = began, len(batch.lead)
        writing = _Writing(batch, self._reader, self._waiting, self._ends, self._vocabulary)
        self._running.add(batch)
        try:
            if not all(row.cancelled for row in batch.rows):
                self._generate(batch, writing.wrote)
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
        self._learn(batch, began, writing)

    def _generate(self, batch: Batch, callback: Callback) -> None:
        sampling = batch.rows[0].sampling
        known = len(batch.lead)
        self._generator.generate_batch(
            [row.prompt[known:] for row in batch.rows],
            max_length=max(row.left for row in batch.rows),
            end_token=self._end_list,
            include_prompt_in_result=False,
            static_prompt=list(batch.lead) or None,
            cache_static_prompt=True,
            sampling_topk=sampling.topk,
            sampling_topp=sampling.topp,
            sampling_temperature=sampling.temperature,
            repetition_penalty=sampling.repetition_penalty,
            callback=callback,
        )

    def _learn(self, batch: Batch, began: float, writing: _Writing) -> None:
        new = bool(batch.lead) and batch.lead not in self._leads
        self._leads.add(batch.lead)
        usual = writing.first and not new and not writing.trouble
        self._waiting.ended(batch, began, writing.first if usual else None, perf_counter())


class _Writing:
    """A batch that is being written. What the native code calls must not raise: that would end all mates."""

    __slots__ = (
        "_alive",
        "_at",
        "_batch",
        "_began",
        "_ends",
        "_index",
        "_last",
        "_note",
        "_pays_at",
        "_reader",
        "_rows",
        "_vocabulary",
        "_waiting",
        "first",
        "open",
        "trouble",
    )

    def __init__(
        self, batch: Batch, reader: Reader, waiting: Waiting, ends: frozenset[int], vocabulary: Sequence[str]
    ) -> None:
        self._batch = batch
        self._rows = batch.rows
        self._reader = reader
        self._note = reader.note
        self._waiting = waiting
        self._ends = ends
        self._vocabulary = vocabulary
        self._began = self._at = perf_counter()
        self._pays_at = 0.0
        self._alive = set(range(len(batch.rows)))
        self._last = len(batch.rows) - 1  # of those that are written still
        self._index = len(batch.rows)
        self.first = 0.0
        self.open = set(self._alive)
        self.trouble: list[Exception] = []

    def wrote(self, step: ctranslate2.GenerationStepResult) -> bool:
        """Take one token of one row, in the order of the rows; tell whether the row is to end."""
        index = -1
        try:
            index = step.batch_id
            if index <= self._index:  # the first row of a step
                self._at = perf_counter()
                self.first = self.first or self._at
            self._index = index
            over = self._took(index, step.token_id)
        except Exception as problem:
            self.trouble.append(problem)
            over = True
        if index >= self._last:
            self._reader.hand_over()  # a step's tokens together
        if over:
            self._batch.over += 1
            self._alive.discard(index)
            self._last = max(self._alive, default=-1)
        return over

    def _took(self, index: int, token: int) -> bool:
        row = self._rows[index]
        if row.cancelled:
            return True
        row.last = self._at
        if token in self._ends:
            return self._ended(index, row, STOPPED)
        if not row.first:
            row.first = self._at
        tokens = self._batch.tokens[index]
        tokens.append(token)
        self._note(row, token)
        row.left -= 1
        if not row.left:
            return self._ended(index, row, FULL)
        return len(tokens) >= SLICE and len(self._waiting) > 0 and self._pause(index, row, tokens)

    def _ended(self, index: int, row: Row, end: int) -> bool:
        self.open.discard(index)
        self._note(row, end)
        return True

    def _pause(self, index: int, row: Row, tokens: Sequence[int]) -> bool:
        """Let a row wait again, unless it is nearly done, would go on differently, or has not been written long."""
        if row.left <= _NEARLY_DONE or row.sampling.alone:
            return False
        if not self._pays_at:
            self._pays_at = self._began + PAYS * self._waiting.rereading(self._batch)
        if row.last < self._pays_at:
            return False
        if not self._waiting.pause(self._batch, index, [self._vocabulary[token] for token in tokens]):
            return False
        self.open.discard(index)
        return True
