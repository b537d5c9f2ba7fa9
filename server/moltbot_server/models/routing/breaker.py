"""What a route remembers of how each of its models did of late, and whether it should ask it again now.

A model is put to rest when too large a share of its attempts failed, or several in a row. After a pause one turn tries
it again; if that fails the next pause is longer, up to the route's cooldown. Pauses are counted from when the trial
began, so that a model that is well again is back within the cooldown however long its last trial took to fail.

A model that rests is one of two kinds. *Ill*: it fails now and then, or is slow; it is still worth asking when nobody
else is left. *Dead*: everything that was asked of it of late broke at once; asking it is a waste of everybody's time,
and it is not tried again before five seconds have passed.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Callable
from enum import StrEnum
from statistics import median
from typing import NamedTuple

import msgspec

_log = logging.getLogger(__name__)

IN_A_ROW = 5
"""So many failures in a row put a model to rest, whatever its rate."""

_FIRST_PAUSE = 1.0
_FIRST_PAUSE_OF_DEAD = 6.7  # five seconds at least, as long as the cooldown allows that
_BUCKETS = 12
_FIRST_TOKENS_KEPT = 50


class BreakerState(StrEnum):
    """Whether a model is asked."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Limits(NamedTuple):
    """From when on a model rests, and for how long. `window` and `cooldown` are seconds, `error_rate` a share of 1."""

    error_rate: float = 0.05
    window: float = 60.0
    min_attempts: int = 10
    cooldown: float = 10.0


class Trial(NamedTuple):
    """One attempt, as its breaker knows it: when it began, in which state of things, and whether much hangs on it."""

    start: float
    epoch: int
    probe: bool


class Resting(msgspec.Struct, array_like=True, frozen=True):
    """What other workers are told of a model of a route that rests; see the attributes of `Breaker`."""

    route: str
    model: str
    until: float
    level: int
    dead: bool
    probing: bool
    reason: str


class Breaker:
    """The memory of one model in one route."""

    def __init__(
        self,
        limits: Limits,
        draw: Callable[[], float] = random.random,
        *,
        route: str = "",
        model: str = "",
        changed: Callable[[Breaker], None] = lambda _: None,
    ) -> None:
        """`draw` returns numbers from 0 to 1, so that pauses of several cores do not end together. The names are for
        the log, and for those to whom `changed` tells what becomes of the model's rest.
        """
        self.limits = limits
        self.route, self.model = route, model
        self._names = {"route": route, "model": model}
        self._changed = changed
        self.reason = ""
        self.attempts = 0
        self._draw = draw
        self._lately = _Window(limits.window)
        self._first_tokens: deque[float] = deque(maxlen=_FIRST_TOKENS_KEPT)
        self._epoch = 0
        self._open = self._dead = self._probing = False
        self._until = 0.0
        self._level = 0
        self._closed_at = -1e9
        self._silent_in_row = self._errors_in_row = self._cuts_in_row = 0

    def follow(self, limits: Limits) -> None:
        """Go by other limits from now on."""
        if limits.window != self.limits.window:
            self._lately = _Window(limits.window)
        self.limits = limits

    # --- asked before an attempt -----------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether the model rests, or is being tried."""
        return self._open

    def may_ask(self, now: float) -> bool:
        """Tell whether a turn that comes now may ask the model: any turn, or as the one that tries it.

        When nobody has tried it for long although its pause was over, what is known of it is worth nothing any more.
        """
        if not self._open:
            return True
        return now >= self._until and (not self._probing or now - self._until > self.limits.cooldown)

    @property
    def is_last_resort(self) -> bool:
        """Whether a model that should rest may be asked all the same by a turn that has nobody else."""
        return not self._dead

    def rest(self, now: float) -> float:
        """Return the seconds until the model is tried again; 0 when it may be asked."""
        return 0.0 if self.may_ask(now) else max(self._until - now, _FIRST_PAUSE if self._probing else 0.0)

    def state(self, now: float) -> BreakerState:
        """Return the state to show."""
        if not self._open:
            return BreakerState.CLOSED
        return BreakerState.HALF_OPEN if self._probing or now >= self._until else BreakerState.OPEN

    def error_rate(self, now: float) -> float:
        """Return the share of lately asked times that failed, 0 to 1."""
        attempts, failures = self._lately.sums(now)
        return failures / attempts if attempts else 0.0

    def recent_attempts(self, now: float) -> int:
        """Return how many times of late it was asked and is known how that went."""
        return self._lately.sums(now)[0]

    @property
    def first_token(self) -> float | None:
        """The median time of late to the first token, in seconds; None when it has not said any."""
        return median(self._first_tokens) if self._first_tokens else None

    # --- told of an attempt ----------------------------------------------------------------------------------------

    def begin(self, now: float) -> Trial:
        """Take note that the model is asked."""
        self.attempts += 1
        probe = self._open and now >= self._until and not self._probing
        if probe:
            self._probing = True
            self._changed(self)
        return Trial(now, self._epoch, probe)

    def spoke(self, trial: Trial, now: float, *, in_time: bool) -> None:
        """Take note of the first token. One that was slow has been counted as a failure already."""
        self._first_tokens.append(now - trial.start)
        if not in_time or trial.epoch != self._epoch:
            return
        self._lately.add(now, attempts=1, failures=0)
        self._silent_in_row = self._errors_in_row = 0
        if self._open:
            self._close(now)

    def finished(self, trial: Trial) -> None:
        """Take note of a good end."""
        if trial.epoch == self._epoch:
            self._cuts_in_row = 0

    def failed(self, trial: Trial, now: float, why: str, *, slow: bool = False, spoke: bool = False) -> None:
        """Take note of an attempt that broke, was `slow` to speak, or broke after it `spoke`; `why` is for people."""
        if trial.epoch != self._epoch:
            return  # the model was put to rest since; what was under way then says nothing new
        self._lately.add(now, attempts=0 if spoke else 1, failures=1)
        if spoke:
            self._cuts_in_row += 1
        else:
            self._silent_in_row += 1
            self._errors_in_row = 0 if slow else self._errors_in_row + 1
        if trial.probe or (not self._open and self._is_too_much(now)):
            self._put_to_rest(trial.start if trial.probe and not spoke else now, why)
        elif self._open and self._dead is not self._is_dead():
            self._dead = not self._dead
            self._changed(self)

    def unknown(self, trial: Trial) -> None:
        """Take note that an attempt ended without telling anything of the model's health."""
        if trial.probe and trial.epoch == self._epoch:
            self._probing = False
            self._changed(self)

    def put_to_rest(self, now: float, why: str, *, dead: bool = False, long: bool = False) -> None:
        """Put the model to rest for a reason that its route knows; `long` for as long as the cooldown."""
        if not self._open:
            self._put_to_rest(now, why)
        if long:
            self._until = max(self._until, now + self._pause(self.limits.cooldown))
            self.reason = why
        self._dead = self._dead or dead
        self._changed(self)

    # --- shared with other workers ---------------------------------------------------------------------------------

    @property
    def resting(self) -> Resting | None:
        """What others should know of it; None when it does not rest."""
        if not self._open:
            return None
        return Resting(self.route, self.model, self._until, self._level, self._dead, self._probing, self.reason)

    def hear(self, found: Resting | None, now: float) -> None:
        """Take over what another worker has found of the model; None that it does not rest, or not any more."""
        if found is None:
            if self._open:
                self._back(now)
            return
        if not self._open:
            self._open = True
            self._epoch += 1
        self._until, self._level, self._dead = found.until, found.level, found.dead
        self._probing, self.reason = found.probing, found.reason
        if found.dead:
            self._errors_in_row = max(self._errors_in_row, IN_A_ROW)  # one more makes it no livelier

    # --- inside ----------------------------------------------------------------------------------------------------

    def _is_too_much(self, now: float) -> bool:
        if max(self._silent_in_row, self._cuts_in_row) >= IN_A_ROW:
            return True
        attempts, failures = self._lately.sums(now)
        return attempts >= self.limits.min_attempts and failures > self.limits.error_rate * attempts

    def _is_dead(self) -> bool:
        return max(self._errors_in_row, self._cuts_in_row) >= IN_A_ROW

    def _put_to_rest(self, since: float, why: str) -> None:
        soon = self._open or since - self._closed_at <= self.limits.cooldown
        self._level = self._level + 1 if soon else 0
        first = _FIRST_PAUSE_OF_DEAD if self._is_dead() else _FIRST_PAUSE
        pause = self._pause(first * 2.0 ** min(self._level, 16))
        if not self._open:
            _log.warning("a model rests", extra={**self._names, "reason": why, "seconds": round(pause, 3)})
        self._until = since + pause
        self._open, self._probing = True, False
        self._dead = self._is_dead()
        self._epoch += 1
        self.reason = why
        self._changed(self)

    def _pause(self, seconds: float) -> float:
        # Never the whole of it: the turn that tries the model has to come, and the model has to speak.
        return min(seconds, self.limits.cooldown) * (0.75 + 0.15 * self._draw())

    def _close(self, now: float) -> None:
        # The same epoch goes on: a probe that spoke and breaks later is still the one that much hangs on.
        _log.info("a model is back", extra=self._names)
        self._back(now)
        self._lately.add(now, attempts=1, failures=0)
        self._changed(self)

    def _back(self, now: float) -> None:
        self._open = self._dead = self._probing = False
        self._closed_at = now
        self.reason = ""
        self._silent_in_row = self._errors_in_row = 0
        self._lately = _Window(self.limits.window)


class _Window:
    """Attempts and failures of the last seconds, in a dozen buckets."""

    __slots__ = ("_attempts", "_buckets", "_failures", "_width")

    def __init__(self, seconds: float) -> None:
        self._width = seconds / _BUCKETS
        self._buckets: deque[list[int]] = deque()  # [number, attempts, failures]
        self._attempts = self._failures = 0

    def add(self, now: float, *, attempts: int, failures: int) -> None:
        self._forget(now)
        number = int(now / self._width)
        if not self._buckets or self._buckets[-1][0] != number:
            self._buckets.append([number, 0, 0])
        bucket = self._buckets[-1]
        bucket[1] += attempts
        bucket[2] += failures
        self._attempts += attempts
        self._failures += failures

    def sums(self, now: float) -> tuple[int, int]:
        self._forget(now)
        # An answer may have broken in the window that began before it.
        return self._attempts, min(self._failures, self._attempts)

    def _forget(self, now: float) -> None:
        oldest = int(now / self._width) - _BUCKETS
        while self._buckets and self._buckets[0][0] <= oldest:
            _, attempts, failures = self._buckets.popleft()
            self._attempts -= attempts
            self._failures -= failures
