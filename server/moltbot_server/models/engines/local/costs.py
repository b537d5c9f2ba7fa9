"""What a batch costs: a model of a replica's time, learned from the batches that it wrote."""

from __future__ import annotations

from collections.abc import Sequence

Terms = tuple[float, float, float, float, float]
"""What a replica spends time on: tokens read at once, pairs of them that attend to each other, steps, rows in all
steps, and tokens that the rows of all steps look back on."""

_PRIOR: Terms = (0.4e-3, 1.8e-6, 8.3e-3, 0.35e-3, 0.0135e-3)
"""Seconds of each for 100 million parameters in int8 on one core (Intel Xeon, 2 GHz); only the ratios matter."""

_TRUST = 0.03  # of one observation: what the known ratios count against what was measured
_DECAY = 0.997  # how much of what was seen is kept with each observation
_LEAST = 0.02  # of the prior: no term is ever free


class Shape:
    """The sizes of a batch that grows: prompt lengths and the tokens to be written after them.

    CTranslate2 reads the shortest prompt's length of all rows at once. What a longer prompt has more than that it reads
    step by step, while the others already write.
    """

    __slots__ = ("_ends", "_furthest", "_squares", "lead", "rows", "shortest")

    def __init__(self, lead: int = 0) -> None:
        """`lead`: tokens before the prompts that need not be read any more."""
        self.lead = lead
        self.rows = self.shortest = 0
        self._ends = self._squares = self._furthest = 0

    def add(self, prompt: int, new: int) -> None:
        """Take in a row that reads `prompt` tokens and writes `new`."""
        end = prompt + new
        self.shortest = min(self.shortest, prompt) if self.rows else prompt
        self._furthest = max(self._furthest, end)
        self._ends += end
        self._squares += end * end
        self.rows += 1

    def with_row(self, prompt: int, new: int) -> Shape:
        """Return the shape that it would be with one more row."""
        grown = Shape(self.lead)
        grown.rows, grown.shortest, grown._furthest = self.rows, self.shortest, self._furthest
        grown._ends, grown._squares = self._ends, self._squares
        grown.add(prompt, new)
        return grown

    @property
    def terms(self) -> Terms:
        """What the batch spends time on, from its beginning to its last token."""
        rows, read, lead = self.rows, self.shortest, self.lead
        steps = self._ends - rows * read
        looked_back = lead * steps + (self._squares - rows * read * read) / 2
        return rows * read, rows * read * (lead + read / 2), self._furthest - read, steps, looked_back

    @property
    def first_terms(self) -> Terms:
        """What it spends time on until the shortest prompt has its first token."""
        rows, read, lead = self.rows, self.shortest, self.lead
        return rows * read, rows * read * (lead + read / 2), 1, rows, rows * (lead + read + 0.5)


def share(prompt: int, new: int, rows: int, lead: int = 0) -> Terms:
    """Return what one row spends in a batch of `rows` rows like itself, that all come after `lead` known tokens."""
    return prompt, prompt * (lead + prompt / 2), new / rows, new, new * (lead + prompt + new / 2)


class Costs:
    """Seconds of each term, fitted to what was measured; for one thread at a time.

    The fit minimises the relative error. It leans on known ratios of the terms, and it forgets slowly, so that it
    follows a machine that others use too.
    """

    def __init__(self) -> None:
        self._seconds = _PRIOR
        size = len(_PRIOR)
        self._products = [[0.0] * size for _ in range(size)]
        self._sums = [0.0] * size
        self._near = self._near_squared = 0.0

    def __call__(self, terms: Terms) -> float:
        """Return the seconds that these terms take."""
        a, b, c, d, e = self._seconds
        return terms[0] * a + terms[1] * b + terms[2] * c + terms[3] * d + terms[4] * e

    def learn(self, terms: Terms, seconds: float) -> None:
        """Take in how long something took."""
        if seconds <= 0:
            return
        # In these units the sum of all factors times what was seen is 1, and each factor would be 1 on the machine of
        # the known ratios.
        seen = [term * known / seconds for term, known in zip(terms, _PRIOR, strict=True)]
        for row, (products, value) in enumerate(zip(self._products, seen, strict=True)):
            for column, other in enumerate(seen):
                products[column] = products[column] * _DECAY + value * other
            self._sums[row] = self._sums[row] * _DECAY + value
        near = sum(seen)
        self._near = self._near * _DECAY + near
        self._near_squared = self._near_squared * _DECAY + near * near

    def fit(self) -> None:
        """Use what was learned from here on."""
        if not self._near_squared:
            return
        scale = self._near / self._near_squared  # the factor that fits best if all terms have the same
        trust = _TRUST / scale
        products = [
            [value + trust / scale * (row == column) for column, value in enumerate(values)]
            for row, values in enumerate(self._products)
        ]
        factors = _solve(products, [value + trust for value in self._sums])
        a, b, c, d, e = (max(factor, _LEAST * scale) * known for factor, known in zip(factors, _PRIOR, strict=True))
        self._seconds = (a, b, c, d, e)


def _solve(matrix: Sequence[Sequence[float]], right: Sequence[float]) -> list[float]:
    """Solve a system of equations whose matrix is symmetric and positive (Gauss, no pivots needed)."""
    rows = [[*values, last] for values, last in zip(matrix, right, strict=True)]
    size = len(rows)
    for at in range(size):
        pivot = rows[at]
        for below in rows[at + 1 :]:
            factor = below[at] / pivot[at]
            for column in range(at, size + 1):
                below[column] -= factor * pivot[column]
    solved = [0.0] * size
    for at in reversed(range(size)):
        known = sum(rows[at][column] * solved[column] for column in range(at + 1, size))
        solved[at] = (rows[at][size] - known) / rows[at][at]
    return solved
