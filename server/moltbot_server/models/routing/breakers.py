"""The breakers of all routes, and what the workers of one machine tell each other of them.

Each worker judges by what it has seen itself. What comes of that holds for all: a model that one of them puts to rest
is asked by none, and while one of them tries it the others wait for how that goes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection

from moltbot_server.models.board import Board
from moltbot_server.models.routing.breaker import Breaker, Limits, Resting

_Name = tuple[str, str]


class Breakers:
    """The breakers of all routes. They outlive the routes, so that a new configuration forgets nothing."""

    def __init__(self, draw: Callable[[], float] = random.random, board: Board[Resting] | None = None) -> None:
        """See `Breaker` for `draw`. What stands on the `board` holds for all workers; times are the system's then."""
        self._draw = draw
        self._board = board
        self._breakers: dict[_Name, Breaker] = {}
        self._resting: dict[_Name, Resting] = {}

    def of(self, route: str, model: str, limits: Limits) -> Breaker:
        """Return the breaker of a model in a route; it goes by these limits from now on."""
        breaker = self._breakers.get((route, model))
        if breaker is None:
            breaker = Breaker(limits, self._draw, route=route, model=model, changed=self._tell)
            self._breakers[route, model] = breaker
            if (found := self._resting.get((route, model))) is not None:
                breaker.hear(found, time.monotonic())
        breaker.follow(limits)
        return breaker

    def has(self, route: str, model: str) -> bool:
        """Tell whether anything is remembered of a model in a route; what other workers have found is heard first."""
        if self._board is not None and self._board.has_news:
            self._hear(self._board)
        return (route, model) in self._breakers

    def forget(self, model: str) -> None:
        """Forget what is known of a model, such as when its key or its address was changed."""
        # Turns under way hold the old one and tell it what nobody asks any more.
        self._drop([name for name in self._names() if name[1] == model])

    def retain(self, routes: Collection[str]) -> None:
        """Forget the routes that are no more."""
        self._drop([name for name in self._names() if name[0] not in routes])

    def _names(self) -> Collection[_Name]:
        return {*self._breakers, *self._resting}

    def _drop(self, names: Collection[_Name]) -> None:
        for name in names:
            self._breakers.pop(name, None)
        if self._board is not None and any(name in self._resting for name in names):
            self._write(self._board, dict.fromkeys(names))

    def _hear(self, board: Board[Resting], *, but: Collection[_Name] = ()) -> None:
        """Take over what others have written, `but` of what is about to be written here."""
        if (found := board.read()) is None:
            return
        before, self._resting = self._resting, {(each.route, each.model): each for each in found}
        now = time.monotonic()
        for name in {*before, *self._resting}:
            breaker = self._breakers.get(name)
            if breaker is not None and name not in but and before.get(name) != self._resting.get(name):
                breaker.hear(self._resting.get(name), now)

    def _tell(self, breaker: Breaker) -> None:
        """Tell the other workers how a model rests, or that it does not."""
        name = (breaker.route, breaker.model)
        if self._board is not None and self._breakers.get(name) is breaker:
            self._write(self._board, {name: breaker.resting})

    def _write(self, board: Board[Resting], told: dict[_Name, Resting | None]) -> None:
        with board.held() as holds:
            if board.has_news:
                self._hear(board, but=told)
            for name, resting in told.items():
                if resting is None:
                    self._resting.pop(name, None)
                else:
                    self._resting[name] = resting
            if holds:
                board.write(tuple(self._resting.values()))
