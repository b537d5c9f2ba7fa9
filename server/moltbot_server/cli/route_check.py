"""Looks at providers and routes before anything starts, as cores do once their models are there."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from moltbot_server.config import INLINE, ConfigError, Problem, Settings
from moltbot_server.config_sources import place_of
from moltbot_server.workspace import Workspace


def check_routes(settings: Settings, *, engine_runs: bool = False) -> None:
    """Refuse providers that nobody knows and routes to models that nobody has.

    An engine that runs may have models that are written down nowhere: then cores say who serves the routes.

    Raises:
        ConfigError: with each of them at its place.
    """
    if not (settings.providers or settings.models.primary or settings.routes):
        return  # nothing to load for it here
    problems = [
        Problem(where=place_of(settings.origins, key), text=text) for key, text in _wrong(settings, engine_runs)
    ]
    if problems:
        raise ConfigError(*problems)


def _wrong(settings: Settings, engine_runs: bool) -> Iterator[tuple[str, str]]:
    # Late: it costs the supervisor 7 MB, which the model of this machine alone should not.
    from moltbot_server.models.plan_check import provider_problems, route_problems

    found = [*provider_problems(settings.providers)]
    routes = ((settings.models,) if settings.models.primary else ()) + settings.routes
    if not found and not engine_runs and any(route_problems(routes, settings.providers, ())):
        local = _local(settings)
        found += route_problems(routes, settings.providers, local) if local is not None else ()
    yield from found


def _local(settings: Settings) -> Collection[str] | None:
    """Return the names of the models that the engine has or may load; None where only the engine itself can tell."""
    from moltbot_server.errors import ModelUnavailable
    from moltbot_server.models.library import Library

    workspace = Workspace(folder=settings.workspace)
    if settings.engine not in ("", INLINE, f"unix:{workspace.engine_socket}"):
        return None
    try:
        return {*(model.name for model in Library(workspace).models), *_configured(settings)}
    except ModelUnavailable:
        return None  # it stops the start: the process that needs it says why


def _configured(settings: Settings) -> Iterator[str]:
    """Yield the name of the model that the configuration names, if it names one."""
    from moltbot_server.models.folder import SCRIPTED, configured_folder

    kind, path = settings.model_type.strip().lower(), settings.model_path
    if kind == SCRIPTED:
        from moltbot_server.models.engines.scripted import Script, load_script

        yield (load_script(path) if path else Script()).id
    elif path:
        yield configured_folder(kind, str(path)).id
