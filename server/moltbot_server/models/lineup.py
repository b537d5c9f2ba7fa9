"""The models that the configuration adds to those of the engine: of providers, and the routes over all of them.

What a configuration comes to is prepared whole, so that all that is wrong is found before anything changes, and then
put into the catalog in one step. Turns under way keep the engine that they began with; one that is of no use any more
is closed when its last turn has ended. What stays the same stays: its connections, what is known of its health.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from moltbot_server.config_models import DEFAULT_ROUTE, ModelRoute, Price, Provider, ProviderModel
from moltbot_server.config_sources import Problem, place_of
from moltbot_server.errors import BudgetExceeded, InvalidConfiguration
from moltbot_server.models.boards import Boards
from moltbot_server.models.caching.metadata import MetadataCache
from moltbot_server.models.catalog import Catalog, CatalogEntry
from moltbot_server.models.engine import Engine
from moltbot_server.models.plan_check import LOCAL, model_names, provider_problems, route_problems
from moltbot_server.models.providers import Cooldowns, KeyRing, Pools, ProviderEngine, resolve
from moltbot_server.models.routing import Breakers, RouteEngine

_log = logging.getLogger(__name__)

_OTHER = re.compile(r"[^A-Za-z0-9._~:/-]+")

_PRESETS_ARE_IN = "USD"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a configuration asks for. `default`, the route of turns that name no model, counts if it has a primary.

    `places` has where keys stand, such as `providers.office`, for messages.
    """

    providers: tuple[Provider, ...]
    default: ModelRoute
    routes: tuple[ModelRoute, ...]
    currency: str = _PRESETS_ARE_IN
    places: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def all_routes(self) -> tuple[ModelRoute, ...]:
        """All routes that lead somewhere, the default one first."""
        return ((self.default,) if self.default.primary else ()) + self.routes


@dataclass(frozen=True, slots=True)
class _Lines:
    """A plan that was found to be sound: who serves which name, and the engines for it."""

    plan: Plan
    served: Mapping[str, str]
    """The catalog's id of each name that a route uses."""
    engines: Mapping[str, Engine]
    sources: Mapping[str, object]
    """What each engine was made from, by its id: one made from the same is kept."""
    prices: Mapping[str, Price] = field(default_factory=dict)


class Lineup:
    """Keeps a catalog's remote models and routes as the configuration says. Belongs to the event loop's thread."""

    def __init__(
        self,
        catalog: Catalog,
        keys: KeyRing,
        *,
        exhausted: Callable[[str], str] = lambda model: "",
        metadata: MetadataCache | None = None,
        boards: Boards | None = None,
    ) -> None:
        """`exhausted` tells why a model must not be asked now for what it has cost; empty when it may.

        `metadata` keeps what providers say of their models; without it they are not asked. On the `boards` stands which
        models rest, for all workers of a machine.
        """
        self._metadata = metadata
        self._catalog = catalog
        self._keys = keys
        self._exhausted = exhausted
        self._local = ""
        self._lines = _Lines(Plan(providers=(), default=ModelRoute(), routes=()), {}, {}, {})
        self._breakers = Breakers(board=boards and boards.breakers)
        self._cooldowns = Cooldowns(board=boards and boards.rests)
        self._pools = Pools()
        self._leaving: set[asyncio.Task[None]] = set()

    def prepare(self, plan: Plan) -> _Lines:
        """Return what a plan comes to; nothing changes.

        Raises:
            InvalidConfiguration: a provider is not known, a route names a model that nobody serves, or two models want
                one name.
        """
        local = {entry.engine.id for entry in self._catalog.entries} - set(self._lines.engines)
        _refuse(plan, provider_problems(plan.providers))
        _refuse(plan, route_problems(plan.all_routes, plan.providers, local))
        problems: list[str] = []
        served: dict[str, str] = {}
        remote: dict[str, tuple[Provider, ProviderModel]] = {}
        for name in model_names(plan.all_routes):
            if name in served:
                continue
            if name in LOCAL or name in local:
                served[name] = self._local if name in LOCAL else name
                continue
            provider, model = resolve(name, plan.providers)
            # `provider/model` is a model that the provider lists under a name of its own.
            listed = next((each for each in provider.models if f"{provider.name}/{each.name}" == name), None)
            model = listed or model
            served[name] = _slug(model.name)
            remote.setdefault(served[name], (provider, replace(model, name=served[name], id=model.id or model.name)))
        for provider in plan.providers:
            for model in provider.models:
                source = (provider, replace(model, name=_slug(model.name), id=model.id or model.name))
                if remote.setdefault(source[1].name, source) != source:
                    problems.append(
                        f"providers: two of them have a model {model.name}; give one another name and an id"
                    )
        routes = {route.name or DEFAULT_ROUTE: route for route in plan.all_routes}
        for name in sorted((routes.keys() & remote.keys()) | ((routes.keys() | remote.keys()) & local)):
            problems.append(f"{name} is the name of two models; give one of them another name")
        if problems:
            raise InvalidConfiguration("; ".join(problems))
        return self._made(plan, served, remote, routes)

    def _made(
        self,
        plan: Plan,
        served: Mapping[str, str],
        remote: Mapping[str, tuple[Provider, ProviderModel]],
        routes: Mapping[str, ModelRoute],
    ) -> _Lines:
        """Make the engines, keeping those that would be made from the same."""
        sources: dict[str, object] = {**remote, **routes}
        engines: dict[str, Engine] = {}
        for name, source in sources.items():
            old = self._lines.engines.get(name)
            if old is not None and self._lines.sources.get(name) == source:
                engines[name] = old
            elif isinstance(source, ModelRoute):
                engines[name] = RouteEngine(source, self._find, breakers=self._breakers)
            else:
                engines[name] = ProviderEngine(
                    *remote[name],
                    keys=self._keys,
                    cooldowns=self._cooldowns,
                    pools=self._pools,
                    metadata=self._metadata,
                )
        prices = {
            # What a preset knows is of use in its own currency only.
            name: engine.price if plan.currency == _PRESETS_ARE_IN else remote[name][1].price
            for name, engine in engines.items()
            if isinstance(engine, ProviderEngine)
        }
        return _Lines(plan, served, engines, sources, {name: price for name, price in prices.items() if price})

    async def open(self, plan: Plan) -> None:
        """Put the first plan into the catalog, beside the engine's own models; raises what `prepare` does."""
        self._local = self._catalog.default
        await self.apply(self.prepare(plan))

    async def apply(self, lines: _Lines) -> None:
        """Put what was prepared in the place of what there is, in one step."""
        fresh = [engine for name, engine in lines.engines.items() if self._lines.engines.get(name) is not engine]
        for engine in fresh:
            await engine.start()
        old, self._lines = self._lines, lines
        had_route = bool(old.plan.default.primary)
        for name in old.engines:
            if lines.engines.get(name) is not old.engines[name]:
                self._let_go(self._catalog.take_out(name))
        self._catalog.aliases = {name: model for name, model in lines.served.items() if name != model}
        for engine in fresh:
            self._catalog.add(engine)
            if not engine.is_route:
                self._breakers.forget(engine.id)  # what is at another address, say, is not what failed before
        self._breakers.retain([route.id for route in self.routes()])
        # Whoever switched to another model by hand keeps it for as long as it is there.
        gone = self._catalog.default not in self._catalog
        if lines.plan.default.primary and (gone or not had_route):
            self._catalog.prefer(DEFAULT_ROUTE)
        elif gone:
            self._catalog.prefer(self._local)

    def keys_changed(self, providers: Collection[str]) -> None:
        """Forget how the models of providers did with the keys that they had before, and which keys were refused."""
        for engine in self._lines.engines.values():
            if isinstance(engine, ProviderEngine) and (engine.type in providers or engine.locked_out):
                self._breakers.forget(engine.id)
        self._cooldowns.forget_refusals()

    async def close(self) -> None:
        """Close what is leaving; what is in the catalog is closed with that."""
        leaving = tuple(self._leaving)
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)

    @property
    def default(self) -> str:
        """The id of the model or route that answers when a turn names none."""
        return self._catalog.default

    def price(self, model: str) -> Price | None:
        """Return what a model costs; None when nothing is known of it or it is local."""
        return self._lines.prices.get(model)

    @property
    def models(self) -> Collection[str]:
        """The ids of the models that answer, of the engine and of providers, without the routes to them."""
        return {entry.engine.id for entry in self._catalog.entries if not entry.engine.is_route}

    def owns(self, model: str) -> bool:
        """Tell whether a model is there by the configuration, and so cannot be unloaded."""
        return model in self._lines.engines

    def routes(self) -> Iterator[RouteEngine]:
        """Yield the routes, the default one first."""
        yield from (engine for engine in self._lines.engines.values() if isinstance(engine, RouteEngine))

    def _find(self, name: str) -> CatalogEntry:
        """Return the model that a route means by a name."""
        model = self._lines.served.get(name, name)
        if why := self._exhausted(model):
            raise BudgetExceeded(why)
        return self._catalog.entry(model)

    def _let_go(self, entry: CatalogEntry) -> None:
        task = asyncio.create_task(_leave(entry))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)


async def _leave(entry: CatalogEntry) -> None:
    """Close an engine that is in the catalog no longer when its last turn has ended."""
    try:
        await entry.drain()
    finally:
        await entry.engine.close()
        _log.info("a model of the configuration was let go", extra={"model": entry.engine.id})


def _refuse(plan: Plan, problems: Iterable[tuple[str, str]]) -> None:
    told = [str(Problem(where=place_of(plan.places, key), text=text)) for key, text in problems]
    if told:
        raise InvalidConfiguration("\n".join(told))


def _slug(name: str) -> str:
    """Return a name as a resource id: what it has of characters beyond those of names becomes a dash."""
    return _OTHER.sub("-", name)[:128]
