"""What is wrong with the providers and the routes of a configuration, each told by its key."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from moltbot_server.config_models import ModelRoute, Provider
from moltbot_server.config_spelling import nearest
from moltbot_server.errors import ModelNotFound
from moltbot_server.models.providers import presets, resolve

LOCAL = frozenset({"local", "builtin", "built-in"})
"""What a route may call the engine's own default model."""


def provider_problems(providers: Iterable[Provider]) -> Iterator[tuple[str, str]]:
    """Yield a key such as `providers.opnai` and what is wrong there: nobody knows where the provider is."""
    known = presets()
    for provider in providers:
        key = f"providers.{provider.name}"
        if provider.preset and provider.preset not in known:
            yield f"{key}.preset", f"{key}.preset: there is no preset `{provider.preset}`; {_hint(provider.preset)}"
        elif not provider.preset and provider.name not in known and not provider.base_url:
            own = "One of your own needs a `base_url`, the address that it is at"
            yield key, f"{key}: no provider of this name is known; {_hint(provider.name)} {own}"


def route_problems(
    routes: Iterable[ModelRoute], providers: Sequence[Provider], local: Collection[str]
) -> Iterator[tuple[str, str]]:
    """Yield a key such as `models.fallback.0` and what is wrong there: nobody serves the model. `local` are ours.

    The providers are without problems.
    """
    for key, title, name in _named(routes):
        if name in LOCAL or name in local:
            continue
        try:
            resolve(name, providers)
        except ModelNotFound as problem:
            near = nearest(name, local)
            meant = f" Did you mean {near!r}?" if near else ""
            yield key, f"{title}: {problem.message}{meant} Local models: {_listed(local)}."


def budget_notice(model: str, known: Collection[str]) -> str:
    """Return what to say of a budget for a model, which may come later; nothing where the model is `known`."""
    if model in known:
        return ""
    near = nearest(model, known)
    hint = f"; did you mean `{near}`?" if near else "."
    return f"a budget is for the model `{model}`, which is not here now: nothing counts for it{hint}"


def model_names(routes: Iterable[ModelRoute]) -> Iterator[str]:
    """Yield each name that routes have for a model."""
    yield from (name for _, _, name in _named(routes))


def named_models(routes: Iterable[ModelRoute]) -> Iterator[tuple[str, str]]:
    """Yield a key such as `models.fallback.0` and the name that it has for a model."""
    yield from ((key, name) for key, _, name in _named(routes))


def _named(routes: Iterable[ModelRoute]) -> Iterator[tuple[str, str, str]]:
    """Yield the key of each place in which a route names a model, how to call the place, and the name."""
    for route in routes:
        section = f"routes.{route.name}" if route.name else "models"
        yield f"{section}.primary", f"{section}.primary", route.primary
        for number, name in enumerate(route.fallback):
            yield f"{section}.fallback.{number}", f"{section}.fallback", name


def _hint(name: str) -> str:
    near = nearest(name, presets())
    return f"did you mean `{near}`?" if near else f"known are {_listed(presets())}."


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none is loaded"
