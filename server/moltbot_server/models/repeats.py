"""What is said over and over, cut down to what a small model can follow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

_LONGEST = 32
"""Tokens of the longest run that is looked for: a sentence that somebody pastes again and again."""


def without_repeats(tokens: Sequence[str], most: int) -> tuple[str, ...]:
    """Return tokens of which nothing, alone or as a run of up to 32, stands more than `most` times in a row."""
    # Nearly all texts leave here: where no token is that frequent, no run is.
    while len(tokens) > most and max(Counter(tokens).values()) > most:
        kept: list[str] = []
        at = 0
        while at < len(tokens):
            size, times = _run(tokens, at, most)
            kept += tokens[at : at + size * min(times, most)]
            at += size * times
        if len(kept) == len(tokens):
            break
        tokens = kept  # where a run was cut, what is left may repeat what comes behind it
    return tuple(tokens)


def _run(tokens: Sequence[str], at: int, most: int) -> tuple[int, int]:
    """Return the shortest run that begins here and is repeated too often, and how often; else one token, once."""
    for size in range(1, min(_LONGEST, (len(tokens) - at) // (most + 1)) + 1):
        if tokens[at] != tokens[at + size]:
            continue
        times, run = 1, tokens[at : at + size]
        while tokens[at + times * size : at + (times + 1) * size] == run:
            times += 1
        if times > most:
            return size, times
    return 1, 1
