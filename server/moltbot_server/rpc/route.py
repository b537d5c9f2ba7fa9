"""RouteService: which models answer, how they are, and the configuration read again."""

from __future__ import annotations

from collections.abc import Sequence

from moltbot.v1 import route_pb2, route_pb2_grpc

from moltbot_server.models.catalog import Catalog
from moltbot_server.models.routing import BreakerState, ModelOfRoute, RouteEngine
from moltbot_server.reloading import Reloading
from moltbot_server.rpc import convert
from moltbot_server.rpc.interceptors import Call
from moltbot_server.rpc.siblings import Siblings

_WORSE = (
    route_pb2.BREAKER_STATE_UNSPECIFIED,
    route_pb2.BREAKER_STATE_CLOSED,
    route_pb2.BREAKER_STATE_HALF_OPEN,
    route_pb2.BREAKER_STATE_OPEN,
)
_STATES = {state: route_pb2.BreakerState.Value(f"BREAKER_STATE_{state.value.upper()}") for state in BreakerState}


class RouteService(route_pb2_grpc.RouteServiceServicer):
    """Serves routes: how their models are is what all workers together have seen of them."""

    def __init__(self, reloading: Reloading, catalog: Catalog, siblings: Siblings) -> None:
        self._reloading = reloading
        self._siblings = siblings
        self._catalog = catalog

    async def ListRoutes(self, request: route_pb2.ListRoutesRequest, call: Call) -> route_pb2.ListRoutesResponse:  # type: ignore[override]
        """Answer the routes and how their models are."""
        others = await self._siblings.hear(
            call, lambda channel, common: route_pb2_grpc.RouteServiceStub(channel).ListRoutes(request, **common)
        )
        seen = [[*self._routes()], *([*answer.routes] for answer in others)]
        return route_pb2.ListRoutesResponse(routes=together(seen))

    async def ReloadRoutes(self, request: route_pb2.ReloadRoutesRequest, call: Call) -> route_pb2.ReloadRoutesResponse:  # type: ignore[override]
        """Read the configuration and the keys again, here and by the other workers."""
        needs_restart = await self._reloading.reload()
        await reload_others(self._siblings, call)
        return route_pb2.ReloadRoutesResponse(routes=self._routes(), needs_restart=needs_restart)

    def _routes(self) -> list[route_pb2.Route]:
        default = self._catalog.default
        return [_route(engine, is_default=engine.id == default) for engine in self._reloading.routes]


async def reload_others(siblings: Siblings, call: Call | None) -> None:
    """Let the other workers read the configuration again, once it was found to be right.

    Raises:
        NotServing: some of them could not.
    """
    request = route_pb2.ReloadRoutesRequest()
    await siblings.carry(
        call, lambda channel, common: route_pb2_grpc.RouteServiceStub(channel).ReloadRoutes(request, **common)
    )


def together(seen: Sequence[Sequence[route_pb2.Route]]) -> list[route_pb2.Route]:
    """Return the routes of the first worker with what all of them have seen of their models."""
    by_worker = [{(route.name, model.model): model for route in routes for model in route.models} for routes in seen]
    return [
        route_pb2.Route(
            name=route.name,
            is_default=route.is_default,
            models=[
                _sum([found[key] for found in by_worker if (key := (route.name, model.model)) in found])
                for model in route.models
            ],
        )
        for route in seen[0]
    ]


def _sum(seen: Sequence[route_pb2.RouteModel]) -> route_pb2.RouteModel:
    """Return what workers have seen of one model: it is as it is for the one for whom it is worst."""
    worst = max(seen, key=lambda model: (_WORSE.index(model.state), model.rest.ToNanoseconds()))
    found = route_pb2.RouteModel()
    found.CopyFrom(worst)
    concerned = sum(model.state != route_pb2.BREAKER_STATE_CLOSED for model in seen)
    if found.reason and concerned < len(seen):
        found.reason = f"{found.reason} (for {concerned} of {len(seen)} workers)"
    found.attempts = sum(model.attempts for model in seen)
    found.recent_attempts = sum(model.recent_attempts for model in seen)
    failures = sum(model.error_rate * model.recent_attempts for model in seen)
    found.error_rate = failures / found.recent_attempts if found.recent_attempts else worst.error_rate
    told = max(seen, key=lambda model: (model.HasField("first_token"), model.recent_attempts))
    if told.HasField("first_token"):
        found.first_token.CopyFrom(told.first_token)
    return found


def _route(engine: RouteEngine, *, is_default: bool) -> route_pb2.Route:
    return route_pb2.Route(
        name=f"routes/{engine.id}", is_default=is_default, models=[_model(model) for model in engine.models]
    )


def _model(model: ModelOfRoute) -> route_pb2.RouteModel:
    return route_pb2.RouteModel(
        model=f"models/{model.model}",
        state=_STATES[model.state],
        reason=model.reason,
        error_rate=model.error_rate,
        recent_attempts=model.recent_attempts,
        rest=convert.duration(model.rest) if model.rest else None,
        first_token=None if model.first_token is None else convert.duration(model.first_token),
        attempts=model.attempts,
    )
