"""Answers being written: the seam between the event loop and native threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from time import perf_counter
from typing import NamedTuple

STOPPED, FULL, GONE, EXPIRED = -1, -2, -3, -4
"""What ends a row instead of a token id: an end token, its token limit, the model itself, its deadline."""

_numbers = count(1)


class Sampling(NamedTuple):
    """Options that all rows of a batch share, in CTranslate2's terms."""

    topk: int = 1
    topp: float = 1.0
    temperature: float = 1.0
    repetition_penalty: float = 1.0

    @property
    def alone(self) -> bool:
        """Whether what a row says would depend on its batch mates' prompts.

        What a longer prompt has beyond the shortest one is read step by step, and the penalty takes such tokens for
        written ones.
        """
        return self.repetition_penalty != 1.0


class Row:
    """One answer: its prompt, what was written of it, and who reads that.

    The native thread reads `cancelled` and counts; the queue has `waits`; all else belongs to the event loop. Times are
    `perf_counter`'s. `lead` is the beginning of the prompt that the model may keep for other rows too, and `cached` how
    much of it was kept already. `prompt` grows by what was written when the row has to wait again. `end_at` is where a
    process that writes the row looks whether it is to end, and what it looks for; `lost` counts the processes that died
    while they wrote it.
    """

    __slots__ = (
        "arrived",
        "asked",
        "began",
        "cached",
        "cancelled",
        "charged",
        "cost",
        "deadline",
        "end_at",
        "ended",
        "first",
        "inbox",
        "last",
        "lead",
        "left",
        "limit",
        "lost",
        "named",
        "number",
        "place",
        "prompt",
        "read",
        "sampling",
        "session",
        "told",
        "waits",
        "workspace",
    )

    def __init__(
        self,
        prompt: Sequence[str],
        sampling: Sampling,
        limit: int,
        *,
        lead: tuple[str, ...] = (),
        workspace: str = "",
        session: str = "",
        deadline: float | None = None,
    ) -> None:
        self.number = next(_numbers)
        self.prompt = prompt
        self.asked = len(prompt)
        self.sampling = sampling
        self.limit = limit
        self.left = limit
        self.lead = lead
        self.workspace = workspace
        self.named = bool(session)
        self.session = session or f"#{self.number}"  # who names no session shares none
        self.deadline = deadline
        self.cost = self.charged = 0.0
        self.cached = self.lost = 0
        self.end_at: tuple[memoryview[int], int, int] | None = None
        self.cancelled = self.ended = self.waits = False
        self.inbox: list[int] = []
        self.read: Callable[[list[int]], None] = unread
        self.told: Callable[[int], None] = untold
        self.place = 0
        self.arrived = perf_counter()
        self.began = self.first = self.last = 0.0

    def cancel(self) -> None:
        """Let nothing more be written; whoever writes it ends it with the next step."""
        self.cancelled = True
        if self.end_at is not None:
            cells, index, batch = self.end_at
            cells[index] = batch

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


def untold(place: int) -> None:
    """Stand in for the reader of a row that nobody tells its place."""
