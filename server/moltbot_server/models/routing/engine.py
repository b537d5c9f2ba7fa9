"""The route as an engine: whoever asks it for an answer gets one from any of its models that can give one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec

from moltbot_server.config_models import DEFAULT_ROUTE, ModelRoute
from moltbot_server.errors import ModelCredential, ModelUnavailable, MoltBotError
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
from moltbot_server.models.routing.breakers import Breakers
from moltbot_server.models.routing.budget import RetryBudget
from moltbot_server.models.routing.candidates import Candidate, Find, ModelOfRoute, Obstacle, Order
from moltbot_server.models.routing.clock import Clock
from moltbot_server.models.routing.outcome import Refusal, final_error
from moltbot_server.models.routing.run import RouteRun, Terms
from moltbot_server.models.routing.suitability import Conversation
from moltbot_server.turns import GenerationOptions, Message

_FRESH = 0.05  # seconds


class RouteEngine:
    """Several models behind one name. It owns none of them: they are started, loaded and closed where they belong."""

    type = "route"
    memory_bytes = 0
    is_route = True
    is_free = False

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
        self._clock = clock
        self._terms = Terms(name=self.id, spec=spec, budget=RetryBudget(spec.retry_budget))
        breakers = Breakers() if breakers is None else breakers
        names = (spec.primary, *spec.fallback)
        self._candidates = tuple(Candidate(name, spec, self.id, find, breakers) for name in names)
        self._order = Order(self._candidates, spec.weights)
        self._seen = _seen(())
        self._seen_at = -_FRESH

    # --- what it can do --------------------------------------------------------------------------------------------

    @property
    def capabilities(self) -> Capabilities:
        """What any of its models can do, be it well or not; the longest of their contexts."""
        return self._look().capabilities

    @property
    def overhead(self) -> int:
        """The most that any of its models needs beside the messages of a prompt, in tokens."""
        return self._look().overhead

    @property
    def parallel(self) -> int:
        """How many answers its models write at the same time; 0 when one of them does not know."""
        each = [engine.parallel for engine in self._look().engines]
        return sum(each) if all(each) else 0

    @property
    def healthy(self) -> bool:
        """Whether any of its models can answer."""
        return any(entry.state is ModelState.READY for entry in self._entries())  # the first of them, as a rule

    @property
    def rest(self) -> float:
        """Seconds until any of its models may be asked, as far as their providers said so."""
        return min((engine.rest for engine in self._look().engines), default=0.0)

    @property
    def locked_out(self) -> MoltBotError | None:
        """What the first of its models says, where each lacks a key that works; see `NeedsKeys`."""
        problems = [entry.locked_out or (entry.refuse() if entry.stopped else None) for entry in self._entries()]
        return problems[0] if problems and all(isinstance(one, ModelCredential) for one in problems) else None

    @property
    def names(self) -> tuple[str, ...]:
        """What the configuration calls its models, first choice first."""
        return tuple(candidate.name for candidate in self._candidates)

    @property
    def models(self) -> tuple[ModelOfRoute, ...]:
        """Its models as they are now, first choice first."""
        now = self._now()
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
        for engine in self._look().engines:
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
        now = self._now()
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
        longest = self._look().capabilities.context_length
        run = RouteRun(self._terms, self._time(), self._order(asker), conversation, longest, listener, asker)
        run.begin()
        return run

    def _time(self) -> Clock:
        # A route is made before the loop runs that its turns belong to.
        if self._clock is None:
            self._clock = asyncio.get_running_loop()
        return self._clock

    def _now(self) -> float:
        """Return the time; metrics and health ask for it from a thread without a loop, before there was a turn."""
        return time.monotonic() if self._clock is None else self._clock.time()

    def _look(self) -> _Seen:
        """Return what the models can do, as it was a moment ago at most: it is asked for many times in each turn."""
        now = time.monotonic() if self._clock is None else self._clock.time()  # as `_now`, without a call
        if now - self._seen_at >= _FRESH:
            # Those that are ill count as well: sessions must not be cut to the context of who is well just now.
            engines = tuple(entry.engine for entry in self._entries())
            if engines != self._seen.engines or [engine.capabilities for engine in engines] != self._seen.each:
                self._seen = _seen(engines)
            self._seen_at = now
        return self._seen

    def _entries(self) -> Iterator[CatalogEntry]:
        """Yield those of its models that are there, ready or not, in order."""
        for candidate in self._candidates:
            try:
                entry = candidate.entry()
            except MoltBotError:
                continue
            yield entry

    def _counting(self) -> Engine:
        counting = self._look().counting
        if counting is None:
            raise ModelUnavailable(f"None of the models of the route {self.id} is there.")
        return counting


class _Seen(NamedTuple):
    """The engines of a route, and what comes of them together."""

    engines: tuple[Engine, ...]
    each: list[Capabilities]
    capabilities: Capabilities
    overhead: int
    counting: Engine | None


def _seen(engines: tuple[Engine, ...]) -> _Seen:
    each = [engine.capabilities for engine in engines]
    counting = next((engine for engine in engines if engine.capabilities.token_counts), None)
    overhead = max((engine.overhead for engine in engines), default=0)
    return _Seen(engines, each, _united(each), overhead, counting or next(iter(engines), None))


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
        if name not in ("context_length", "embeddings", "continuation")
    }
    context = max((one.context_length for one in each), default=0)
    return msgspec.structs.replace(Capabilities(context_length=context), **able)
