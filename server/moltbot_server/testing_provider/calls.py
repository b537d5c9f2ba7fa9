"""What a mock provider was asked, and the draw of what each call meets."""

from __future__ import annotations

import random
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moltbot_server.testing_provider.script import Fault, Script

_KEPT = 1000


class Calls:
    """The calls so far: how many had which outcome, and the last 1000 of them."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._last: deque[dict[str, Any]] = deque(maxlen=_KEPT)

    def add(self, *, model: str, key: str, outcome: str, pictures: int = 0) -> None:
        """Take note of a call as soon as it is known what it meets; of its key only the end is kept.

        `pictures` is how many its messages hold.
        """
        self._counts[outcome] += 1
        at = round(time.time(), 3)
        # Of a key as short as its end nothing is shown: that would be the whole of it.
        shown = key[-4:] if len(key) > 4 else ""
        self._last.append({"time": at, "model": model, "key": shown, "outcome": outcome, "pictures": pictures})

    def clear(self) -> None:
        """Forget all."""
        self._counts.clear()
        self._last.clear()

    def shown(self) -> dict[str, Any]:
        """Return counts and calls, oldest first, as JSON; times are seconds since 1970."""
        return {"total": self._counts.total(), "outcomes": dict(self._counts), "calls": list(self._last)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lot:
    """What one call meets: a fault or none, and the seconds to its first word."""

    number: int
    fault: Fault | None
    wait: float


class Draw:
    """Draws lots for one script. The same script and the same order of calls give the same lots."""

    def __init__(self, script: Script, clock: Callable[[], float] = time.monotonic) -> None:
        self.script = script
        self._clock = clock
        self._since = clock()
        self._faults = random.Random(script.seed)
        # A generator of its own: with another first_token the same calls fail.
        self._waits = random.Random(script.seed)
        self._number = 0

    def next(self) -> Lot:
        """Return the lot of the next call: the first fault of the list that it meets."""
        self._number += 1
        wait = self._waits.uniform(*self.script.first_token)
        fault = self._fault(self._faults.random())
        late = fault.by if fault is not None and fault.kind == "slow" else 0.0
        return Lot(number=self._number, fault=fault, wait=wait + late)

    def _fault(self, drawn: float) -> Fault | None:
        edge = 0.0
        for fault in self.script.faults:
            if fault.share is not None:
                # One number for the whole list, so that each share is exact whatever stands before it.
                begin, edge = edge, edge + fault.share
                met = begin <= drawn < edge
            elif fault.every is not None:
                met = self._number % fault.every == 0
            elif fault.until_calls is not None:
                met = self._number <= fault.until_calls
            elif fault.until_seconds is not None:
                met = self._clock() - self._since < fault.until_seconds
            else:
                met = True
            if met:
                return fault
        return None
