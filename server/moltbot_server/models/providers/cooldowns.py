"""When a provider may be asked again: one clock for each model and key; no healthy one rests with a tired one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import NamedTuple

import msgspec

from moltbot_server.models.board import Board

LONGEST_REST = 86_400.0
"""Seconds that a provider may ask us to stay away; more is taken as this."""

_SHORTEST = 0.2  # a provider that says 0 and means it is asked again soon enough
_FIRST = {"limit": 1.0, "credential": 5.0, "outage": 1.0}
# A healed provider is to be back within ten seconds; only what it asked for itself, or a refused key, rests longer.
_LONGEST = {"limit": 8.0, "credential": 300.0, "outage": 8.0}
_FORGOTTEN = 600.0  # seconds after its rest in which another failure still counts as the next one in a row
_MANY = 4096


class Place(NamedTuple):
    """What rests: a model of a provider with one key; an empty key is the model with all of them."""

    provider: str
    model: str
    key: str = ""


class Cause(Enum):
    """Why something rests."""

    LIMIT = "limit"
    """Too much was asked."""
    CREDENTIAL = "credential"
    """The key was refused."""
    OUTAGE = "outage"
    """The provider said that it is down, and for how long."""


class Rest(msgspec.Struct, array_like=True, frozen=True):
    """Why a place rests, until when, and how many failures in a row it had."""

    place: Place
    cause: Cause
    until: float
    in_a_row: int


class Cooldowns:
    """The rests of all providers. Engines come and go with the configuration; what they learned stays here."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, board: Board[Rest] | None = None) -> None:
        """`clock` counts seconds and never goes back. What stands on the `board` holds for all workers of a machine,
        whose clock is the system's.
        """
        self._clock = clock
        self._board = board
        self._rests: dict[Place, Rest] = {}

    @property
    def is_quiet(self) -> bool:
        """Whether nothing is known to rest, as nearly always; while it is False, a place may still be free."""
        return not self._now_known()

    def rest(self, place: Place) -> float:
        """Return the seconds until the place may be asked again; 0 for now."""
        found = self._now_known().get(place)
        return max(0.0, found.until - self._clock()) if found is not None else 0.0

    def cause(self, place: Place) -> Cause | None:
        """Return why the place rests; None when it does not."""
        found = self._now_known().get(place)
        return found.cause if found is not None and found.until > self._clock() else None

    def failed(self, place: Place, cause: Cause, after: float | None = None) -> float:
        """Let a place rest and return for how long, in seconds.

        `after` is what the provider asked for, and is obeyed. Without it the rest doubles with each failure in a row:
        from 1 s to 8 s after a limit, from 5 s to five minutes after a refused key.
        """
        with self._changing():
            return self._failed(place, cause, after)

    def worked(self, place: Place) -> None:
        """Forget the failures of a place that answered; what answers while it rests was asked before."""
        found = self._now_known().get(place)
        if found is not None and found.until <= self._clock():
            with self._changing():
                self._rests.pop(place, None)

    def forget_refusals(self) -> None:
        """Let keys be tried again that were refused: somebody has changed them, or their rights at the provider."""
        if any(rest.cause is Cause.CREDENTIAL for rest in self._now_known().values()):
            with self._changing():
                self._rests = {place: rest for place, rest in self._rests.items() if rest.cause is not Cause.CREDENTIAL}

    def __len__(self) -> int:
        """How many places rest now."""
        now = self._clock()
        return sum(rest.until > now for rest in self._now_known().values())

    def _failed(self, place: Place, cause: Cause, after: float | None) -> float:
        now = self._clock()
        earlier = self._rests.get(place)
        row = 0
        if earlier is not None and earlier.cause is cause and now < earlier.until + _FORGOTTEN:
            row = earlier.in_a_row
        if after is None:
            seconds = min(_FIRST[cause.value] * (1 << min(row, 16)), _LONGEST[cause.value])
        else:
            seconds = min(max(after, _SHORTEST), LONGEST_REST)
        if earlier is not None and earlier.cause is cause and now < earlier.until:
            # Calls under way when the rest began fail a moment later: they neither shorten it nor lengthen the row.
            seconds, row = max(seconds if after is not None else 0.0, earlier.until - now), row - 1
        if len(self._rests) >= _MANY:
            self._rests = {each: rest for each, rest in self._rests.items() if rest.until > now}
        self._rests[place] = Rest(place, cause, now + seconds, row + 1)
        return seconds

    def _now_known(self) -> dict[Place, Rest]:
        if self._board is not None and self._board.has_news:
            self._look(self._board)
        return self._rests

    def _look(self, board: Board[Rest]) -> None:
        if (found := board.read()) is not None:
            self._rests = {rest.place: rest for rest in found}

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Change what all workers know: what others have written before comes first."""
        if self._board is None:
            yield
            return
        with self._board.held() as holds:
            if self._board.has_news:
                self._look(self._board)
            yield
            if holds:
                self._board.write(tuple(self._rests.values()))
