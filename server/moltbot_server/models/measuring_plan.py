"""What a measurement is asked for and what it answers, for those who have it made: it needs no model's native code."""

from __future__ import annotations

from moltbot_server.models.tuning import Tuning
from moltbot_server.turns import Value

STREAMS = 16
"""Answers that are written at the same time in a measurement."""


class Plan(Value, frozen=True, kw_only=True):
    """What to measure: a model's folder, its family where the folder does not say, quickly or thoroughly."""

    folder: str
    type: str = ""
    quick: bool = False


class Trial(Value, frozen=True, kw_only=True):
    """What one tuning did: with `STREAMS` at a time and, of a thorough measurement, with one alone."""

    tuning: Tuning
    tokens_per_second: float
    first_token_ms: float
    lone_tokens_per_second: float = 0.0
    lone_first_token_ms: float = 0.0

    @property
    def score(self) -> float:
        """How good it is: one answer alone, which is most of the day of most installations, counts for a third."""
        return float((self.tokens_per_second**2 * (self.lone_tokens_per_second or 1.0)) ** (1 / 3))


class Outcome(Value, frozen=True, kw_only=True):
    """The best tuning, all trials in the order of how good they were, and why something was not tried.

    The first trial is the best one's, next to which the others of its kind were tried.
    """

    best: Tuning
    trials: tuple[Trial, ...]
    notes: tuple[str, ...] = ()
    prompt_tokens: int = 0
    new_tokens: int = 0
