"""A batch that is being written: what becomes of each token, and when the event loop hears of it."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Protocol

from moltbot_server.models.engines.local.batches import Batch
from moltbot_server.models.engines.local.rows import FULL, STOPPED, Row
from moltbot_server.models.engines.local.waiting import Waiting

SLICE = 128
"""Least tokens that a row writes in one batch before it gives way to those that wait."""

PAYS = 5.0
"""How many times as long as reading its rows again a batch is written before they give way.

Measured with 100 million parameters, 24 answers of 512 tokens for 16 places and a short question now and then: 298
tokens/s without giving way, with it after 64, 128 or 256 tokens 209, 235 and 260; the short question waited at most
27 s, and 8, 16 and 22 s. The longer the context, the more it costs to read it again.
"""

GATHER = 0.004
"""Seconds of steps that the event loop reads at once; first tokens and ends it hears of with their step.

A small model writes a step in half a millisecond, and to be woken costs the event loop and the replicas more than that
step's tokens do. The core gathers text for longer anyway.
"""

LIVES = 2
"""How often a row is written again because the process that wrote it has died; it may be what kills them."""

_NEARLY_DONE = 32


class Reader(Protocol):
    """Who hears from the replicas; called on their threads."""

    def note(self, row: Row, token: int) -> None:
        """Hear of a token of a row, or of what ended it; it is read after the next `hand_over`."""

    def hand_over(self) -> None:
        """Let the event loop read what was noted."""

    def died(self) -> None:
        """Hear that a thread has died."""


class BatchWriting:
    """Takes the tokens of a batch, for one thread. Native code calls it, so nothing of it raises.

    `began` and `ended` are when the native code did, `first` is when the first token came, 0 before. `last` is the last
    row that is written still, -1 for none, and `open` has the rows of which no end was noted. `trouble` is what went
    wrong.
    """

    __slots__ = (
        "_alive",
        "_at",
        "_batch",
        "_due",
        "_ends",
        "_note",
        "_pays_at",
        "_reader",
        "_rows",
        "_told",
        "_vocabulary",
        "_waiting",
        "began",
        "ended",
        "first",
        "last",
        "open",
        "trouble",
    )

    def __init__(
        self, batch: Batch, reader: Reader, waiting: Waiting, ends: frozenset[int], vocabulary: Sequence[str]
    ) -> None:
        """`ends`: ids of the tokens that end an answer; `vocabulary`: the tokens by id."""
        self._batch = batch
        self._rows = batch.rows
        self._reader = reader
        self._note = reader.note
        self._waiting = waiting
        self._ends = ends
        self._vocabulary = vocabulary
        self.began = self._at = perf_counter()
        self.ended = 0.0
        self._told = self._pays_at = 0.0
        self._due = False
        self._alive = set(range(len(batch.rows)))
        self.last = len(batch.rows) - 1
        self.first = 0.0
        self.open = set(self._alive)
        self.trouble: list[Exception] = []

    def took(self, index: int, token: int, at: float) -> bool:
        """Take one token of one row, written at this time; tell whether the row is to end."""
        if index not in self._alive:
            return True
        self._at = at
        self.first = self.first or at
        try:
            over = self._took(index, token)
        except Exception as problem:
            self.trouble.append(problem)
            over = True
        if over:
            self._batch.over += 1
            self._due = True
            self._alive.discard(index)
            self.last = max(self._alive, default=-1)
        return over

    def stepped(self) -> None:
        """Let the event loop read what came, at the end of a step, if it is worth its while."""
        if self._due or self._at - self._told >= GATHER:
            self.tell()

    def tell(self) -> None:
        """Let the event loop read what came."""
        self._told = self._at
        self._due = False
        self._reader.hand_over()

    def lost(self) -> None:
        """Have written elsewhere what was open when its process died, unless that has happened to it too often."""
        for index in sorted(self.open):
            row = self._rows[index]
            row.lost += 1
            tokens = self._batch.tokens[index]
            goes_on = not (row.cancelled or row.lost > LIVES or (tokens and row.sampling.alone))
            if goes_on and self._waiting.pause(self._batch, index, self.words(index), must=True):
                self.open.discard(index)

    def _took(self, index: int, token: int) -> bool:
        row = self._rows[index]
        if row.cancelled:
            return True
        row.last = self._at
        if token in self._ends:
            return self._ended(index, row, STOPPED)
        if not row.first:
            row.first = self._at
            self._due = True
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
            self._pays_at = self.began + PAYS * self._waiting.rereading(self._batch)
        if row.last < self._pays_at:
            return False
        if not self._waiting.pause(self._batch, index, self.words(index)):
            return False
        self.open.discard(index)
        return True

    def words(self, index: int) -> list[str]:
        """Return what was written of a row, as its prompt would say it."""
        return [self._vocabulary[token] for token in self._batch.tokens[index]]
