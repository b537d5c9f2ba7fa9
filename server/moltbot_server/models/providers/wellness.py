"""Whether a remote model answers, told in the log when that changes: once, and not for each turn that it fails."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

_log = logging.getLogger(__name__)

_QUIET = 60.0
"""Seconds after a warning in which one that fails now and then is not told again."""


class Wellness:
    """What the log was told of one model."""

    def __init__(self, *, provider: str, model: str, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` returns seconds."""
        self._names = {"provider": provider, "model": model}
        self._clock = clock
        self._ill = False
        self._told_at: float | None = None

    def failed(self, problem: str) -> None:
        """Take note that an answer failed for a reason of the model's own; `problem` repeats nothing that was said."""
        now = self._clock()
        if self._ill or (self._told_at is not None and now - self._told_at < _QUIET):
            return
        self._ill, self._told_at = True, now
        _log.warning("a model fails", extra=self._names | {"problem": problem})

    def worked(self) -> None:
        """Take note that the model speaks."""
        if self._ill:
            self._ill = False
            _log.info("a model answers again", extra=self._names)
