"""The models of a route: in which order a turn comes to them, and what keeps it from one of them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

from moltbot_server.config_models import ModelRoute
from moltbot_server.errors import ModelUnavailable, MoltBotError, QueueFull
from moltbot_server.models.catalog import CatalogEntry, ModelState
from moltbot_server.models.engine import NOBODY, Asker
from moltbot_server.models.routing.breaker import Breaker, BreakerState, Limits
from moltbot_server.models.routing.breakers import Breakers

Find = Callable[[str], CatalogEntry]
"""Finds a model by the name that a route has for it; raises a MoltBotError that says why there is none to ask."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOfRoute:
    """A model of a route, and how it is; see the contract's `RouteModel`. Times are seconds.

    `attempts` are all since its breaker remembers, `recent_attempts` those of late.
    """

    model: str
    state: BreakerState
    reason: str
    error_rate: float
    recent_attempts: int
    rest: float
    first_token: float | None
    attempts: int


class Obstacle(NamedTuple):
    """Why a turn passes a model over; `last_resort` where it may come back to it when nobody else is left."""

    error: MoltBotError
    last_resort: bool = False


class Candidate:
    """One model of one route."""

    def __init__(self, name: str, spec: ModelRoute, route: str, find: Find, breakers: Breakers) -> None:
        self.name = name
        self._find = find
        self._route = route
        self._breakers = breakers
        self._limits = Limits(spec.error_rate, spec.window, spec.min_attempts, spec.cooldown)
        self._breaker: Breaker | None = None
        self._model = ""

    @property
    def model(self) -> str:
        """The id of the model that last went by the candidate's name, or else the name."""
        return self._model or self.name

    def entry(self) -> CatalogEntry:
        """Return the model as it is now.

        Raises:
            MoltBotError: there is none by this name, or nobody here may ask it.
        """
        entry = self._find(self.name)
        if entry.engine.is_route:
            raise ModelUnavailable(f"{entry.engine.id} is a route; a route leads to models only.")
        return entry

    def breaker(self, model: str) -> Breaker:
        """Return what is remembered of the model by this id that goes by the candidate's name now."""
        if self._breaker is None or model != self._model or not self._breakers.has(self._route, model):
            self._breaker, self._model = self._breakers.of(self._route, model, self._limits), model
        return self._breaker

    def obstacle(self, now: float, *, anyway: bool = False) -> Obstacle | CatalogEntry:
        """Return what keeps any turn from this model now, or else the model; `anyway` even where it should rest."""
        try:
            entry = self.entry()
        except MoltBotError as problem:
            return Obstacle(problem)
        if entry.state is not ModelState.READY:
            told = f"{entry.engine.id} cannot answer: {entry.message}"
            own = _own_words(entry) if entry.state is ModelState.FAILED else None
            return Obstacle(own or ModelUnavailable(told))
        if (rest := entry.engine.rest) > 0:
            told = f"{entry.engine.id} asked not to be called for {rest:.0f} s more."
            return Obstacle(_own_words(entry) or QueueFull(told, retry_after=rest))
        breaker = self.breaker(entry.engine.id)
        if not anyway and not breaker.may_ask(now):
            told = f"{entry.engine.id} rests: {breaker.reason}"
            error = ModelUnavailable(told, retry_after=breaker.rest(now))
            return Obstacle(error, last_resort=breaker.is_last_resort)
        return entry

    def shown(self, now: float) -> ModelOfRoute:
        """Return how the model is, for people."""
        try:
            entry = self.entry()
        except MoltBotError as problem:
            return ModelOfRoute(
                model=self.name, state=BreakerState.OPEN, reason=problem.message,
                error_rate=0.0, recent_attempts=0, rest=0.0, first_token=None, attempts=0,
            )  # fmt: skip
        breaker = self.breaker(entry.engine.id)
        obstacle = self.obstacle(now)
        state = breaker.state(now)
        reason, rest = breaker.reason, max(breaker.rest(now), entry.engine.rest)
        if isinstance(obstacle, Obstacle) and state is BreakerState.CLOSED:
            state, reason = BreakerState.OPEN, obstacle.error.message
        return ModelOfRoute(
            model=entry.engine.id,
            state=state,
            reason=reason,
            error_rate=breaker.error_rate(now),
            recent_attempts=breaker.recent_attempts(now),
            rest=rest,
            first_token=breaker.first_token,
            attempts=breaker.attempts,
        )


def _own_words(entry: CatalogEntry) -> MoltBotError | None:
    """Return what a model itself says of why it takes no turns, such as that it has no key, if it says anything."""
    try:
        entry.engine.admit(NOBODY)
    except MoltBotError as problem:
        return problem
    return None


class Order:
    """In which order turns come to the candidates: the route's own, but those with weights share their place.

    Which of them a session comes to first is drawn once and for all from its name and the weights: a conversation stays
    with its model, whose provider may have it cached, and when a model is taken out only its own conversations move.
    """

    def __init__(self, candidates: Sequence[Candidate], weights: Sequence[tuple[str, int]]) -> None:
        self._candidates = tuple(candidates)
        shares = dict(weights)
        self._sharing = [(candidate, shares[candidate.name]) for candidate in candidates if candidate.name in shares]
        self._at = next((at for at, candidate in enumerate(candidates) if candidate.name in shares), 0)
        self._others = tuple(candidate for candidate in candidates if candidate.name not in shares)

    def __call__(self, asker: Asker) -> tuple[Candidate, ...]:
        """Return the candidates in the order for a turn of this asker."""
        if not self._sharing:
            return self._candidates
        seed = f"{asker.workspace}/{asker.session}" if asker.session else str(random.random())
        drawn = sorted(self._sharing, key=lambda shared: _draw(seed, *shared), reverse=True)
        return (*self._others[: self._at], *(candidate for candidate, _ in drawn), *self._others[self._at :])


def _draw(seed: str, candidate: Candidate, weight: int) -> float:
    """Return a number that is the highest of all candidates' as often as the weight says (rendezvous hashing)."""
    if not weight:
        return -math.inf
    digest = blake2b(f"{seed}/{candidate.name}".encode(), digest_size=8).digest()
    return math.log((int.from_bytes(digest, "big") + 1) / (2**64 + 1)) / weight
