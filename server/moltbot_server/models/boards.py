"""Which boards there are: what the workers of one machine have found out about models that others serve."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from moltbot_server.models.board import Board
from moltbot_server.models.providers.cooldowns import Rest
from moltbot_server.models.routing.breaker import Resting

log = logging.getLogger(__name__)


class Boards(NamedTuple):
    """`rests`: which providers and keys are to be left alone. `breakers`: which models of routes rest."""

    rests: Board[Rest]
    breakers: Board[Resting]

    @classmethod
    def at(cls, place: Callable[[str], Path]) -> Boards | None:
        """Open the boards at their places by name; None where that cannot be, and each worker knows its own."""
        try:
            return cls(Board(place("rests"), Rest), Board(place("breakers"), Resting))
        except OSError as problem:
            told = {"problem": problem.strerror, "file": problem.filename}
            log.warning("the workers cannot tell each other which models rest", extra=told)
            return None
