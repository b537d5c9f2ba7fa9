"""Which rows are written together: those that cost little more in one batch than among their like."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

from moltbot_server.models.engines.local.costs import Costs, Shape, share
from moltbot_server.models.engines.local.rows import Row

LOOKED_AT = 64
"""Most rows that are looked at for one batch, from the front of the queue."""

DEARER = 1.2
"""How much more than among its like a row may cost. Simulated with prompts of 16 to 512 tokens, 64 answers of 64 tokens
at a time, batches of 8: 208 tokens/s, with 1.1 207, with 1.5 192; any 8 rows as they come 87, equal lengths 249."""


SLOWER = 1.2
"""How much longer a batch may take for the sake of rows of somebody who crowds those that it is for."""


_TOGETHER = 1
"""Processes that may have died with a row before it is written alone: nobody else shall suffer if it was the reason."""


class Batch:
    """Rows that are written together; `lead` is the beginning that they share and that the model keeps.

    `sizes` are the tokens that it reads of each row, `tokens` what it has written of each. `charged` is what its rows
    are expected to cost, `crowded` whether others were left waiting. `paused` has the indices of the rows that left it
    before their end, and `over` counts those that are written no more.
    """

    __slots__ = ("charged", "crowded", "lead", "over", "paused", "rows", "sizes", "tokens")

    def __init__(self, rows: list[Row], lead: tuple[str, ...] = ()) -> None:
        self.rows = rows
        self.lead = lead
        self.charged = sum(row.cost for row in rows)
        self.sizes = [len(row.prompt) - len(lead) for row in rows]
        self.crowded = False
        self.over = 0
        self.paused: set[int] = set()
        self.tokens: list[list[int]] = [[] for _ in rows]

    def shape(self) -> Shape:
        """Return the sizes of what was written by now."""
        shape = Shape(len(self.lead))
        for size, tokens in zip(self.sizes, self.tokens, strict=True):
            shape.add(size, max(1, len(tokens)))
        return shape


def together(rows: Iterable[Row], most: int, costs: Costs, typical: int) -> Batch:
    """Return the first row and those of the next that are best written with it, at most `most`.

    `typical`: tokens that an answer has, as far as its limit lets it.
    """
    looked_at = iter(rows)
    first = next(looked_at)
    near = [row for row in islice(looked_at, LOOKED_AT - 1) if _may_join(row, first)]
    plain, seconds = _gathered([first, *near], most, costs, typical, ())
    if not first.lead:
        return plain
    alike = [row for row in near if row.lead is first.lead]
    kept, kept_seconds = _gathered([first, *alike], most, costs, typical, first.lead)
    # The better one takes less time for what its rows would cost in full batches of their equals.
    new = min(first.left, typical)
    worth, kept_worth = (sum(costs(share(len(row.prompt), new, most)) for row in batch.rows) for batch in (plain, kept))
    return kept if kept_seconds * worth <= seconds * kept_worth else plain


def joined_by(riders: Iterable[Row], batch: Batch, most: int, costs: Costs, typical: int) -> Batch:
    """Return a batch with those rows of others added that make it at most `SLOWER` times as long."""
    first, known, new = batch.rows[0], len(batch.lead), min(batch.rows[0].left, typical)
    shape, taken = Shape(known), list(batch.rows)
    for row in taken:
        shape.add(len(row.prompt) - known, new)
    budget = SLOWER * costs(shape.terms)
    for row in islice(riders, LOOKED_AT):
        if len(taken) >= most:
            break
        if not _may_join(row, first) or (batch.lead and row.lead is not first.lead):
            continue
        grown = shape.with_row(len(row.prompt) - known, new)
        if costs(grown.terms) <= budget:
            shape = grown
            taken.append(row)
    return Batch(taken, batch.lead) if len(taken) > len(batch.rows) else batch


def _may_join(row: Row, first: Row) -> bool:
    if row.sampling != first.sampling or max(row.lost, first.lost) > _TOGETHER:
        return False
    # A prompt of a single token is not read before the steps, and what longer ones read in them would be told.
    alone = first.sampling.alone or len(first.prompt) < 2 or len(row.prompt) < 2
    return not alone or len(row.prompt) == len(first.prompt)


def _gathered(rows: Sequence[Row], most: int, costs: Costs, typical: int, lead: tuple[str, ...]) -> tuple[Batch, float]:
    """Return a batch that begins with the first row, and the seconds that it takes."""
    known, new = len(lead), min(rows[0].left, typical)
    shape = Shape(known)
    shape.add(len(rows[0].prompt) - known, new)
    seconds = costs(shape.terms)
    taken, left = [rows[0]], list(rows[1:])
    # What is left over is looked at again if it is too little to become a good batch of its own.
    for again in (False, True):
        among = min(most, len(left) + (not again))
        passed = []
        for row in left:
            if len(taken) == most:
                return Batch(taken, lead), seconds
            size = len(row.prompt) - known
            grown = shape.with_row(size, new)
            after = costs(grown.terms)
            if after - seconds <= DEARER * costs(share(size, new, among, known)):
                shape, seconds = grown, after
                taken.append(row)
            else:
                passed.append(row)
        left = passed
    return Batch(taken, lead), seconds
