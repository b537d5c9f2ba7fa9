"""One attempt: a model is asked, and what it says is heard on behalf of a turn of a route."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from moltbot_server.models.catalog import CatalogEntry
from moltbot_server.models.engine import Finished, Generation
from moltbot_server.models.routing.breaker import Breaker, Trial
from moltbot_server.turns import Attempt, Notice, Reset, Routed


class Hearer(Protocol):
    """Who hears of attempts: a turn, which `began` at a time of its route's clock."""

    began: float

    def spoken(self, attempt: AttemptUnderWay, text: str, tokens: int) -> None:
        """Hear a piece of an answer."""

    def mused(self, attempt: AttemptUnderWay, text: str) -> None:
        """Hear more of what a model thinks."""

    def placed(self, attempt: AttemptUnderWay, position: int) -> None:
        """Hear of an attempt's place in a queue."""

    def over(self, attempt: AttemptUnderWay, end: Finished | Exception) -> None:
        """Hear of an attempt's end."""


class AttemptUnderWay:
    """A model that was asked, as its listener; the engine knows it by the methods of `Listener`."""

    __slots__ = (
        "_breaker",
        "_entry",
        "_generation",
        "_judged",
        "_over",
        "_straight",
        "_time",
        "_trial",
        "began",
        "first_token",
        "is_slow",
        "last_sign",
        "model",
        "said",
        "tokens",
        "trimmed",
        "turn",
    )

    def __init__(
        self, turn: Hearer, entry: CatalogEntry, breaker: Breaker, now: float, time: Callable[[], float]
    ) -> None:
        """`now` is when it begins, on the route's clock; `time` asks that clock."""
        entry.hold()
        self.turn = turn
        self.model = entry.engine.id
        self.began = self.last_sign = now
        self.first_token: float | None = None
        self.is_slow = self.said = False
        self.tokens = self.trimmed = 0
        self._entry = entry
        self._breaker = breaker
        self._trial: Trial = breaker.begin(now)
        self._generation: Generation | None = None
        self._judged = self._over = False
        self._time = time
        self._straight: Callable[[str, int], None] | None = None

    @property
    def counts_all(self) -> bool:
        """Whether the model counts what of an answer was there before it among what it wrote."""
        return self._entry.engine.capabilities.continuation

    # --- what the engine tells -------------------------------------------------------------------------------------

    def queued(self, position: int) -> None:
        """Hear of the place in the engine's queue."""
        if not self._over:
            self.turn.placed(self, position)

    def wrote(self, text: str, tokens: int) -> None:
        """Hear a piece of the answer."""
        self.tokens += tokens
        if self._straight is not None:
            self.last_sign = self._time()
            self._straight(text, tokens)
        elif not self._over:
            self.turn.spoken(self, text, tokens)

    def thought(self, text: str) -> None:
        """Hear more of what the model thinks."""
        if not self._over:
            self.turn.mused(self, text)

    def noted(self, what: Routed | Notice | Reset) -> None:
        """Hear nothing: a model of a route is no route."""

    def ended(self, end: Finished | Exception) -> None:
        """Hear of the end."""
        if not self._over:
            self._generation = None  # there is nothing left to stop
            self.turn.over(self, end)

    # --- what the turn tells ---------------------------------------------------------------------------------------

    def began_as(self, generation: Generation) -> None:
        """Take what is to be stopped when the attempt is not needed any more; at once if that is so already."""
        if self._over:
            generation.stop()
        else:
            self._generation = generation

    def speak_to(self, hear: Callable[[str, int], None]) -> None:
        """Pass all pieces on from now on without asking the turn: most of what a turn costs is its many pieces."""
        self._straight = hear

    def speaks(self, now: float) -> None:
        """Take note of the first token."""
        self.first_token = now - self.began
        self._breaker.spoke(self._trial, now, in_time=not self._judged)

    def slow(self, now: float, why: str, *, judged: bool) -> None:
        """Take note that the turn looks for another model meanwhile; `judged` where it was long enough to blame it."""
        self.is_slow = True
        if judged:
            self._judged = True
            self._breaker.failed(self._trial, now, why, slow=True)

    def finish(self, now: float) -> Attempt:
        """Take note of a good end."""
        self._breaker.finished(self._trial)
        return self._close(now, "ANSWERED", "")

    def fail(self, now: float, outcome: str, why: str) -> Attempt:
        """Take note that the model broke; it is stopped where it has not stopped by itself."""
        if not self._judged:
            self._breaker.failed(self._trial, now, why, spoke=self.first_token is not None)
        return self._close(now, outcome, why)

    def leave(self, now: float, outcome: str, why: str, *, refused: bool = False) -> Attempt:
        """End without a judgement on the model; `refused` where it will go on to refuse everybody."""
        if refused:
            self._breaker.put_to_rest(now, why, dead=True, long=True)
        self._breaker.unknown(self._trial)
        return self._close(now, outcome, why)

    def rests(self, now: float, why: str) -> None:
        """Have the model rest for a while, whatever became of this attempt."""
        self._breaker.put_to_rest(now, why)

    def _close(self, now: float, outcome: str, why: str) -> Attempt:
        self._over = True
        self._straight = None
        self._entry.release()
        if self._generation is not None:
            self._generation.stop()
            self._generation = None
        return Attempt(
            model=self.model,
            outcome=outcome,
            reason=why,
            start=self.began - self.turn.began,
            first_token=self.first_token,
            total=now - self.began,
        )
