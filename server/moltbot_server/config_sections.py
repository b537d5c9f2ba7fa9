"""The sections in which people give names of their own: `providers`, `routes`, and the list `budgets`."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from moltbot_server.config_models import Budget, ModelRoute, Price, Provider, ProviderModel
from moltbot_server.config_reading import read, read_mapping
from moltbot_server.config_sources import Given, Problem
from moltbot_server.config_values import (
    PERCENT,
    SHARE,
    TRUTH,
    Kind,
    Misread,
    Unfit,
    amount,
    choice,
    duration,
    several,
    shaped,
    text,
    whole,
)

_NAME = shaped(r"[a-z0-9][a-z0-9._-]{0,62}", "1 to 63 of a-z 0-9 . _ -, first a letter or a digit")
_MODEL = shaped(r"[^\s\x00-\x1f\x7f]{1,128}", "a model's name, 1 to 128 characters without spaces")
_TOKENS = whole(1, 100_000_000, "a number of tokens")
_MONEY = amount(1e9)
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}")
_VALUE = re.compile(r"[\x20-\x7e]{0,1024}")
_KEY_WORDS = frozenset({"api_key", "api_keys", "apikey", "key", "keys", "token", "secret", "password"})
_KEY_HEADERS = frozenset({"authorization", "proxy-authorization", "api-key", "x-api-key", "x-goog-api-key"})
# Names that no name server outside answers for: single words, as in a compose file, and endings of one's own network.
_NEAR = re.compile(
    r"[^.]+|.+\.(localhost|local|localdomain|internal|lan|svc|cluster\.local|home\.arpa|test)", re.IGNORECASE
)


def _near(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return bool(_NEAR.fullmatch(host))
    return address.is_loopback or address.is_private


def _url(given: Given) -> str:
    if not isinstance(given.value, str) or re.search(r"[\s\x00-\x1f\x7f]", given.value.strip()):
        raise ValueError
    parts = urlsplit(given.value.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError
    _ = parts.port  # raises for what is no port
    if parts.username is not None or parts.password is not None:
        raise Unfit("a name and a password are no part of an address; give the key with `moltbot key add`")
    if parts.scheme == "http" and not _near(parts.hostname):
        raise Unfit(f"the key and what users write would travel unencrypted to {parts.hostname}; use https")
    return parts.geturl().rstrip("/")


def _headers(given: Given) -> tuple[tuple[str, str], ...]:
    if not isinstance(given.value, Mapping):
        raise ValueError
    rows = []
    for name, value in given.value.items():
        if name.lower() in _KEY_HEADERS:
            raise Unfit(f"`{name}` holds a key, which is no part of the configuration; use `moltbot key add`")
        if not _HEADER.fullmatch(name) or not isinstance(value.value, str) or not _VALUE.fullmatch(value.value):
            raise Unfit(f"`{name[:64]}` and its value must be what HTTP allows: ASCII, one line")
        rows.append((name, value.value.strip()))
    return tuple(rows)


_MODEL_KEYS: Mapping[str, Kind] = {
    "name": _MODEL,
    "id": text(256),
    "context_length": _TOKENS,
    "max_output_tokens": _TOKENS,
    "vision": TRUTH,
    "tools": TRUTH,
    "reasoning": TRUTH,
    "price.input": _MONEY,
    "price.output": _MONEY,
    "price.cached_input": _MONEY,
}
# `models` is read apart: whose models they are is part of what is said of them.
_PROVIDER_KEYS: Mapping[str, Kind] = {
    "preset": _NAME,
    "dialect": choice("openai", "anthropic"),
    "base_url": Kind(read=_url, expected="an address such as https://api.example.com/v1"),
    "headers": Kind(read=_headers, expected="a mapping of names to texts", secret=True),
    "api_version": shaped(r"[A-Za-z0-9._-]{0,64}", "a version such as 2024-10-21"),
    "connect_timeout": duration(0.01, 60),
    "idle_timeout": duration(0.01, 3600),
    "answer_timeout": duration(0.01, 86400),
    "models": Kind(read=lambda given: given, expected=""),
}


def _named(given: Given, section: str, problems: list[Problem]) -> Iterator[tuple[str, Given]]:
    """Yield the entries of a mapping of names that people choose."""
    if given.value is None:
        return
    if not isinstance(given.value, Mapping):
        told = f"{section}: found {given}, expected names, and under each what it is"
        problems.append(Problem(where=given.where, text=told))
        return
    for name, inside in given.value.items():
        try:
            _NAME.read(Given(value=name, where=inside.where, folder=inside.folder))
        except ValueError:
            told = f"{section}: found {name[:63]!r} as a name, expected {_NAME.expected}"
            problems.append(Problem(where=inside.where, text=told))
        else:
            yield name, inside


def read_providers(given: Given) -> tuple[Provider, ...]:
    """Read the section `providers`: each provider by the name that its keys and its models go by.

    Raises:
        Misread: with all that is wrong.
    """
    problems: list[Problem] = []
    found = [_provider(name, inside, problems) for name, inside in _named(given, "providers", problems)]
    if problems:
        raise Misread(*problems)
    return tuple(found)


def _provider(name: str, given: Given, problems: list[Problem]) -> Provider:
    title = f"providers.{name}"
    if isinstance(given.value, Mapping):
        secrets = {key: value for key, value in given.value.items() if key.lower() in _KEY_WORDS}
        for key, value in secrets.items():
            told = f"{title}: a key is no part of the configuration; take `{key}` out and use `moltbot key add {name}`"
            problems.append(Problem(where=value.where, text=told))
        rest = {key: value for key, value in given.value.items() if key not in secrets}
        given = Given(value=rest, where=given.where, folder=given.folder)
    values = read_mapping(given, _PROVIDER_KEYS, problems, title=title)
    models = values.pop("models", None)
    return Provider(name=name, models=tuple(_models(models, f"{title}.models", problems)) if models else (), **values)


def _models(given: Given, title: str, problems: list[Problem]) -> Iterator[ProviderModel]:
    """Read a provider's models: a list of names or of mappings with a `name`, or a mapping of names."""
    entries: list[tuple[str, Given]] = []
    if isinstance(given.value, Mapping):
        entries = list(given.value.items())
    elif isinstance(given.value, tuple):
        for item in given.value:
            if isinstance(item.value, str):
                entries.append((item.value.strip(), Given(value=None, where=item.where, folder=item.folder)))
            else:
                named = item.value.get("name") if isinstance(item.value, Mapping) else None
                entries.append((str(named.value) if named and isinstance(named.value, str) else "", item))
    elif given.value is not None:
        problems.append(
            Problem(where=given.where, text=f"{title}: found {given}, expected a list or a mapping of models")
        )
    seen: set[str] = set()
    for name, inside in entries:
        if model := _model(name, inside, title, seen, problems):
            yield model


def _model(name: str, given: Given, title: str, seen: set[str], problems: list[Problem]) -> ProviderModel | None:
    before = len(problems)
    values = read_mapping(given, _MODEL_KEYS, problems, title=f"{title}.{name}" if name else title)
    try:
        _MODEL.read(Given(value=name, where=given.where, folder=given.folder))
    except ValueError:
        problems.append(Problem(where=given.where, text=f"{title}: found {name!r}, expected {_MODEL.expected}"))
    if values.setdefault("name", name) != name:
        told = f"{title}.{name}: take `name` out; `id` says what the provider calls it"
        problems.append(Problem(where=given.where, text=told))
    if name in seen:
        problems.append(Problem(where=given.where, text=f"{title}: `{name}` is given twice; keep one"))
    seen.add(name)
    price = {key.removeprefix("price."): values.pop(key) for key in tuple(values) if key.startswith("price.")}
    if price and not {"input", "output"} <= price.keys():
        told = f"{title}.{name}.price: `input` and `output` are needed, each per million tokens"
        problems.append(Problem(where=given.where, text=told))
    if len(problems) > before:
        return None
    return ProviderModel(**values, price=Price(**price) if price else None)


def _read_weights(given: Given) -> tuple[tuple[str, int], ...]:
    if not isinstance(given.value, Mapping):
        raise ValueError
    weight = whole(0, 1000)
    return tuple((name, weight.read(value)) for name, value in given.value.items())


# The keys of a route, below `models` and below each name of `routes`.
ROUTE_KEYS: Mapping[str, Kind] = {
    "primary": text(128),
    "fallback": several(text(128, blank=False)),
    "threshold.latency": duration(0.001, 3600, bare=False),
    "threshold.error_rate": PERCENT,
    "timeout": duration(0.1, 3600),
    "cooldown": duration(0.01, 3600),  # with none a model that is down would be asked by every turn
    "window": duration(1, 3600),
    "min_attempts": whole(1, 100_000),
    "retry_budget": SHARE,
    "on_failure": choice("restart", "continue", "stop"),
    "weights": Kind(
        read=_read_weights, expected="a mapping of models of this route to whole numbers from 0 to 1000", flat=False
    ),
}


def read_routes(given: Given) -> tuple[ModelRoute, ...]:
    """Read the section `routes`: each route by the name that a turn asks for it with.

    Raises:
        Misread: with all that is wrong.
    """
    problems: list[Problem] = []
    found = []
    for name, inside in _named(given, "routes", problems):
        before, title = len(problems), f"routes.{name}"
        one = route(read_mapping(inside, ROUTE_KEYS, problems, title=title), name=name)
        if len(problems) == before:  # what could not be read would be missed as well
            problems += (Problem(where=inside.where, text=f"{title}: {text}") for text in route_problems(one))
        found.append(one)
    if problems:
        raise Misread(*problems)
    return tuple(found)


def route(values: Mapping[str, Any], *, name: str = "") -> ModelRoute:
    """Return the route that values by the keys of `ROUTE_KEYS` describe."""
    return ModelRoute(name=name, **{key.rpartition(".")[2]: value for key, value in values.items()})


def route_problems(one: ModelRoute) -> Iterator[str]:
    """Yield what is wrong with a route as a whole."""
    candidates = [one.primary, *one.fallback]
    if one.name and not one.primary:
        yield "it needs a `primary`, the model that is asked first"
    elif one.fallback and not one.primary:
        yield "`fallback` is for a route, which needs a `primary`: name the model that is asked first"
    for twice in sorted({name for name in candidates if candidates.count(name) > 1}):
        yield f"`{twice}` is named twice; keep one" if twice else "a fallback has no name"
    for name, _ in one.weights:
        if name not in candidates:
            yield f"weights: `{name}` is neither `primary` nor in `fallback`"
    if one.weights and not any(weight for _, weight in one.weights):
        yield "weights: one of them must be above 0"


_BUDGET_KEYS: Mapping[str, Kind] = {
    "scope": choice("workspace", "user", "model"),
    "model": _MODEL,
    "period": choice("day", "month"),
    "max_tokens": whole(1, 10**15 - 1, "a number of tokens"),
    "max_cost": _MONEY,
    "soft": TRUTH,
}


def read_budgets(given: Given) -> tuple[Budget, ...]:
    """Read the list `budgets`.

    Raises:
        Misread: with all that is wrong.
    """
    if given.value is None:
        return ()
    if not isinstance(given.value, tuple):
        raise ValueError
    problems: list[Problem] = []
    found = []
    for item in given.value:
        before = len(problems)
        values = read_mapping(item, _BUDGET_KEYS, problems, title="budgets")
        if len(problems) == before:
            wrong = [Problem(where=item.where, text=f"budgets: {text}") for text in _budget_problems(values)]
            problems += wrong
            found += [] if wrong else [Budget(**values)]
    if problems:
        raise Misread(*problems)
    return tuple(found)


def _budget_problems(values: Mapping[str, Any]) -> Iterator[str]:
    for key in ("scope", "period"):
        if key not in values:
            yield f"`{key}` is missing, expected {_BUDGET_KEYS[key].expected}"
    if not values.get("max_tokens") and not values.get("max_cost"):
        yield "it limits nothing; set `max_tokens` or `max_cost`"
    if values.get("scope") == "model" and "model" not in values:
        yield "`model` is missing: the model that it is for"
    if values.get("scope") in ("workspace", "user") and "model" in values:
        yield "`model` goes with `scope: model` alone"


_BUSY = choice("queue", "interrupt", "join")
_CHANNEL = re.compile(r"[a-z0-9_-]{1,32}")


def read_when_busy(given: Given) -> tuple[tuple[str, str], ...]:
    """Read what becomes of turns in a busy session: one word for all channels, or one for each that is named.

    In one text they are written `slack=join,web=interrupt`.
    """
    named: Mapping[str, Given]
    if isinstance(given.value, Mapping):
        named = given.value
    elif isinstance(given.value, str) and "=" in given.value:
        pairs = (item.partition("=") for item in given.value.split(","))
        named = {name.strip(): Given(value=word, where=given.where, folder=given.folder) for name, _, word in pairs}
    else:
        return (("", _BUSY.read(given)),)
    problems: list[Problem] = []
    found = []
    for name, word in named.items():
        if name != "*" and not _CHANNEL.fullmatch(name):
            text = f"sessions.when_busy: found {name!r}, expected channels of a-z 0-9 _ -, or * for all others"
            problems.append(Problem(where=word.where, text=text))
            continue
        values = read({name: word}, {name: _BUSY}, problems, title="sessions.when_busy.")
        found += [("" if name == "*" else name, told) for told in values.values()]
    if problems:
        raise Misread(*problems)
    return tuple(found)


WHEN_BUSY = Kind(
    read=read_when_busy,
    expected="one of queue, interrupt, join; or a mapping of channels, and * for all others, to these",
)
PROVIDERS = Kind(read=read_providers, expected="a mapping of names to providers", flat=False)
ROUTES = Kind(read=read_routes, expected="a mapping of names to routes", flat=False)
BUDGETS = Kind(read=read_budgets, expected="a list of mappings with `scope` and `period`", flat=False)
