"""The route as an engine: whoever asks it for an answer gets one from any of its models that can give one."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import msgspec

from moltbot_server.config_models import ModelRoute
from moltbot_server.errors import ModelUnavailable, MoltBotError
from moltbot_server.models.catalog import CatalogEntry, ModelState
from moltbot_server.models.engine import (
    NOBODY,
    Asker,
    Capabilities,
    Embedded,
    Engine,
    Generation,
    Listener,
    no_embeddings,
)
from moltbot_server.models.routing.breaker import Breakers
from moltbot_server.models.routing.budget import RetryBudget
from moltbot_server.models.routing.candidates import Candidate, Find, ModelOfRoute, Obstacle, Order
from moltbot_server.models.routing.clock import Clock, LoopClock
from moltbot_server.models.routing.outcome import Refusal, final_error
from moltbot_server.models.routing.run import RouteRun, Terms
from moltbot_server.models.routing.suitability import Conversation
from moltbot_server.turns import GenerationOptions, Message

DEFAULT_ROUTE = "default"
"""The id of the route that has no name: the one for turns that name no model."""


class RouteEngine:
    """Several models behind one name. It owns none of them: they are started, loaded and closed where they belong."""

    type = "route"
    memory_bytes = 0
    is_route = True

    def __init__(
        self,
        spec: ModelRoute,
        find: Find,
        breakers: Breakers | None = None,
        *,
        name: str = "",
        clock: Clock | None = None,
    ) -> None:
        """`find` returns the model that goes by a name of `spec` now. `breakers` outlive the route, so that one that
        takes its place remembers what it knew. `name` is the route's id, where that is not the one of `spec`.
        """
        self.id = name or spec.name or DEFAULT_ROUTE
        self.display_name = f"Route {self.id}"
        self._clock = clock or LoopClock()
        self._terms = Terms(name=self.id, spec=spec, clock=self._clock, budget=RetryBudget(spec.retry_budget))
        breakers = Breakers() if breakers is None else breakers
        names = (spec.primary, *spec.fallback)
        self._candidates = tuple(Candidate(name, spec, self.id, find, breakers) for name in names)
        self._order = Order(self._candidates, spec.weights)
        self._union: tuple[tuple[Capabilities, ...], Capabilities] = ((), Capabilities(context_length=0))

    # --- what it can do --------------------------------------------------------------------------------------------

    @property
    def capabilities(self) -> Capabilities:
        """What any of its models can do; the longest of their contexts."""
        each = tuple(engine.capabilities for engine in self._engines())
        if each != self._union[0]:
            self._union = (each, _united(each))
        return self._union[1]

    @property
    def overhead(self) -> int:
        """The most that any of its models needs beside the messages of a prompt, in tokens."""
        return max((engine.overhead for engine in self._engines()), default=0)

    @property
    def parallel(self) -> int:
        """How many answers its models write at the same time; 0 when one of them does not know."""
        each = [engine.parallel for engine in self._engines()]
        return sum(each) if all(each) else 0

    @property
    def healthy(self) -> bool:
        """Whether any of its models can answer."""
        return any(entry.state is ModelState.READY for entry in self._entries())

    @property
    def rest(self) -> float:
        """Seconds until any of its models may be asked, as far as their providers said so."""
        return min((engine.rest for engine in self._engines()), default=0.0)

    @property
    def models(self) -> tuple[ModelOfRoute, ...]:
        """Its models as they are now, first choice first."""
        now = self._clock.time()
        return tuple(candidate.shown(now) for candidate in self._candidates)

    @property
    def numbers(self) -> Mapping[str, float]:
        """What it counted since it was made: see `Counts`."""
        counts = self._terms.counts
        return {
            "route_turns": counts.turns,
            "route_attempts": counts.attempts,
            "route_passed_over": counts.passed_over,
            "route_switches": counts.switches,
            "route_hedges": counts.hedges,
            "route_failed": counts.failed,
            "route_models_resting": sum(model.state != "closed" for model in self.models),
        }

    async def start(self) -> None:
        """Do nothing: its models are started where they belong."""

    async def close(self) -> None:
        """Do nothing: its models are closed where they belong."""

    # --- what is asked of one of its models ------------------------------------------------------------------------

    def check(self, options: GenerationOptions) -> None:
        """Refuse options that none of its models would honour; see `Engine.check`."""
        problems: list[MoltBotError] = []
        for engine in self._engines():
            try:
                engine.check(options)
                return
            except MoltBotError as problem:
                problems.append(problem)
        if problems:
            raise problems[0]

    def count(self, message: Message) -> int:
        """Count as the first of its models that counts exactly, or else as its first."""
        return self._counting().count(message)

    async def tokens(self, content: str | Sequence[Message]) -> int:
        """Return how many tokens a text or a conversation takes for the first of its models that counts exactly."""
        return await self._counting().tokens(content)

    async def embed(self, texts: Sequence[str]) -> Embedded:
        """Refuse: vectors of different models do not compare."""
        raise no_embeddings(self)

    # --- an answer -------------------------------------------------------------------------------------------------

    def admit(self, asker: Asker) -> None:
        """Refuse a turn that none of its models would take now; see `Engine.admit`."""
        now = self._clock.time()
        refusals: list[Refusal] = []
        hope: list[CatalogEntry] = []
        for candidate in self._candidates:
            found = candidate.obstacle(now)
            if isinstance(found, Obstacle):
                refusals.append(Refusal(candidate.model, found.error, asked=False))
                if not found.last_resort:
                    continue
                found = candidate.obstacle(now, anyway=True)
                if isinstance(found, CatalogEntry):
                    hope.append(found)
                continue
            try:
                found.engine.admit(asker)
                return
            except MoltBotError as problem:
                refusals.append(Refusal(candidate.model, problem, asked=False))
        if not any(_admits(entry, asker) for entry in hope):
            raise final_error(refusals)

    def begin(
        self, messages: Sequence[Message], options: GenerationOptions, listener: Listener, asker: Asker = NOBODY
    ) -> Generation:
        """Begin an answer by whichever of its models can give one; see `Engine.begin`."""
        conversation = Conversation(messages, options)
        longest = self.capabilities.context_length
        run = RouteRun(self._terms, self._order(asker), conversation, longest, listener, asker)
        run.begin()
        return run

    def _entries(self) -> list[CatalogEntry]:
        """Return those of its models that are there, ready or not, in order."""
        entries = []
        for candidate in self._candidates:
            with contextlib.suppress(MoltBotError):
                entries.append(candidate.entry())
        return entries

    def _engines(self) -> list[Engine]:
        # What a route can do must not change with the health of its models: sessions are cut to its context.
        return [entry.engine for entry in self._entries()]

    def _counting(self) -> Engine:
        engines = self._engines()
        if not engines:
            raise ModelUnavailable(f"None of the models of the route {self.id} is there.")
        return next((engine for engine in engines if engine.capabilities.token_counts), engines[0])


def _admits(entry: CatalogEntry, asker: Asker) -> bool:
    try:
        entry.engine.admit(asker)
    except MoltBotError:
        return False
    return True


def _united(each: Sequence[Capabilities]) -> Capabilities:
    """Return what any of several models can do."""
    able = {
        name: any(getattr(one, name) for one in each)
        for name in Capabilities.__struct_fields__
        if name not in ("context_length", "embeddings")
    }
    context = max((one.context_length for one in each), default=0)
    return msgspec.structs.replace(Capabilities(context_length=context), **able)
