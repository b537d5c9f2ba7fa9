"""What `moltbot route` does: asks the core that runs, and prints a table or JSON."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import grpc
from google.protobuf.duration_pb2 import Duration
from moltbot import MoltBotClientError
from moltbot.channel import open_channel
from moltbot.errors import from_status
from moltbot.v1 import route_pb2, route_pb2_grpc

from moltbot_server.cli.asking import Place
from moltbot_server.cli.model_looking import loaded_models
from moltbot_server.cli.model_place import Models, told
from moltbot_server.cli.tables import table
from moltbot_server.cli.terminal import Exit, Failure, harmless
from moltbot_server.cli.usage_telling import ask_budgets
from moltbot_server.models.plan_check import budget_notice

_Answer = TypeVar("_Answer")
_PATIENCE = 30.0
_STATES = {"CLOSED": "in use", "OPEN": "rests", "HALF_OPEN": "on trial"}


@told
def list_routes(given: argparse.Namespace) -> int:
    """Print the routes; return the exit status."""

    async def ask(service: Any, metadata: Any) -> route_pb2.ListRoutesResponse:
        answer: route_pb2.ListRoutesResponse = await service.ListRoutes(
            route_pb2.ListRoutesRequest(), metadata=metadata, timeout=_PATIENCE
        )
        return answer

    models = Models.of(given)
    core = _core(models)
    routes = [_entry(route) for route in asyncio.run(_asked(core, ask)).routes]
    if given.json:
        print(json.dumps({"routes": routes}, ensure_ascii=False))
    elif routes:
        print(_table(routes, core.words))
    else:
        place = models.workspace.config_file
        print(
            f"There is no route: the model that a turn names answers, or the default. `models:` in {place} makes one."
        )
    return int(Exit.OK)


@told
def reload_routes(given: argparse.Namespace) -> int:
    """Let the core read its configuration again; return the exit status."""

    async def ask(service: Any, metadata: Any) -> route_pb2.ReloadRoutesResponse:
        answer: route_pb2.ReloadRoutesResponse = await service.ReloadRoutes(
            route_pb2.ReloadRoutesRequest(), metadata=metadata, timeout=_PATIENCE
        )
        return answer

    core = _core(Models.of(given))
    try:
        answer = asyncio.run(_asked(core, ask))
    except MoltBotClientError as error:
        if error.reason != "INVALID_CONFIGURATION":
            raise
        raise Failure(
            f"nothing was changed, the core goes on as before:\n{_problems(error.message)}", Exit.CONFIG
        ) from None
    routes = [_entry(route) for route in answer.routes]
    notices = _notices(core, {route["name"] for route in routes})
    if given.json:
        found = {"routes": routes, "needs_restart": list(answer.needs_restart), "notices": notices}
        print(json.dumps(found, ensure_ascii=False))
        return int(Exit.OK)
    count = "1 route is" if len(routes) == 1 else f"{len(routes) or 'no'} routes are"
    print(f"The configuration and the keys were read again; {count} in use.")
    if answer.needs_restart:
        print(f"A restart is needed for what else was changed: {', '.join(answer.needs_restart)}.")
    for notice in notices:
        print(f"Take note: {harmless(notice)}")
    if routes:
        print(_table(routes, core.words))
    return int(Exit.OK)


def _notices(core: Place, routes: Collection[str]) -> list[str]:
    """Return what is followed and hardly meant: budgets for models that the core does not have now."""
    scopes = {budget.scope for budget in asyncio.run(ask_budgets(core)).budgets}
    named = {scope.removeprefix("models/") for scope in scopes if scope.startswith("models/")}
    if not named:
        return []
    models = loaded_models(core).keys() - routes
    return [notice for name in sorted(named) if (notice := budget_notice(name, models))]


def _problems(message: str) -> str:
    """Return what is wrong with a configuration, each in a line of its own."""
    return "\n".join(f"  {harmless(line.strip())}" for line in message.splitlines() if line.strip())


def _core(models: Models) -> Place:
    return models.running_core("only it has routes")


async def _asked(place: Place, ask: Callable[[Any, Any], Awaitable[_Answer]]) -> _Answer:
    channel = open_channel(place.address, None)
    try:
        return await ask(route_pb2_grpc.RouteServiceStub(channel), (("authorization", f"Bearer {place.key}"),))
    except grpc.aio.AioRpcError as error:
        raise from_status(error, place.address) from None
    finally:
        await channel.close()


def _entry(route: route_pb2.Route) -> dict[str, Any]:
    """Return a route as JSON; times in milliseconds."""
    return {
        "name": route.name.removeprefix("routes/"),
        "default": route.is_default,
        "models": [
            {
                "model": model.model.removeprefix("models/"),
                "state": route_pb2.BreakerState.Name(model.state).removeprefix("BREAKER_STATE_").lower(),
                "reason": model.reason,
                "error_rate": round(model.error_rate, 4),
                "recent_attempts": model.recent_attempts,
                "attempts": model.attempts,
                "first_token_ms": _ms(model.first_token) if model.HasField("first_token") else None,
                "rest_ms": _ms(model.rest) if model.HasField("rest") else 0.0,
            }
            for model in route.models
        ],
    }


def _ms(span: Duration) -> float:
    return round(span.ToNanoseconds() / 1e6, 1)


def _table(routes: Sequence[Mapping[str, Any]], words: Callable[[str], str]) -> str:
    rows = [("ROUTE", "MODEL", "STATE", "FAILED", "OF", "FIRST TOKEN", "RESTS", "WHY"), *_rows(routes, words)]
    return table(rows)


def _rows(routes: Sequence[Mapping[str, Any]], words: Callable[[str], str]) -> Iterator[tuple[str, ...]]:
    for route in routes:
        name = f"{route['name']} *" if route["default"] else route["name"]
        for model in route["models"]:
            first = model["first_token_ms"]
            yield (
                name,
                harmless(model["model"]),
                _state(model),
                f"{model['error_rate']:.0%}" if model["recent_attempts"] else "-",
                str(model["recent_attempts"]),
                "-" if first is None else f"{first:,.0f} ms",
                f"{model['rest_ms'] / 1000:.1f} s" if model["rest_ms"] else "-",
                harmless(words(model["reason"])),
            )
            name = ""


def _state(model: Mapping[str, Any]) -> str:
    if model["state"] == "closed" and not model["attempts"]:
        return "not asked yet"
    if model["state"] == "half_open" and not model["rest_ms"]:
        return "to be tried"
    return _STATES.get(model["state"].upper(), str(model["state"]))
