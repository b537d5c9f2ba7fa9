"""Models of providers and routes: the configuration has them, no folder of the workspace, and commands say so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moltbot.v1 import model_pb2

from moltbot_server.cli.model_place import Models
from moltbot_server.cli.terminal import shown
from moltbot_server.config_models import DEFAULT_ROUTE
from moltbot_server.config_sources import place_of
from moltbot_server.errors import InvalidConfiguration, ModelExists, ModelNotFound


@dataclass(frozen=True, slots=True)
class Configured:
    """A name that the configuration has for a route, or for a model of a provider, which is empty for a route.

    `where` is the place of it, such as `~/.moltbot/moltbot.yaml:3`; empty where it is written down nowhere.
    """

    name: str
    provider: str
    where: str

    @property
    def is_route(self) -> bool:
        """Whether it leads to models, and is none."""
        return not self.provider

    def __str__(self) -> str:
        what = "a route" if self.is_route else f"a model of the provider {self.provider}"
        return f"{self.name} is {what}" + (f", set up in {self.where}" if self.where else "")


def configured_as(models: Models, name: str, loaded: Mapping[str, model_pb2.Model]) -> Configured | None:
    """Return what a name is that the workspace has no folder for; None where the configuration does not have it either.

    `loaded` are the models of the core that runs, which may be another workspace's.

    Raises:
        ConfigError: the configuration is wrong.
    """
    if name in {model.name for model in models.all} or models.library.knows(name):
        return None
    settings = models.settings
    if models.routed and name == DEFAULT_ROUTE:
        return Configured(name, "", _place(models, "models.primary"))
    if name in {route.name for route in settings.routes}:
        return Configured(name, "", _place(models, f"routes.{name}"))
    kind = loaded[name].type if name in loaded else ""
    if kind == "route":
        return Configured(name, "", "")
    for provider in settings.providers:
        for number, model in enumerate(provider.models):
            if name in (model.name, f"{provider.name}/{model.name}"):
                return Configured(name, provider.name, _place(models, f"providers.{provider.name}.models.{number}"))
    if found := _routed(models, name):
        return found
    owner = {kind, name.partition("/")[0]} & {provider.name for provider in settings.providers}
    return Configured(name, owner.pop(), "") if owner else None


def check_free(models: Models, name: str) -> None:
    """Refuse a name for a new folder that the configuration has for something else.

    Raises:
        ModelExists: it has; the text says for what, and where.
    """
    if (found := configured_as(models, name, {})) is not None:
        raise ModelExists(f"{found}; choose another name with --name.")


def _routed(models: Models, name: str) -> Configured | None:
    """Return the model of a provider that only a route names."""
    from moltbot_server.models.plan_check import named_models  # late: most models lie in a folder
    from moltbot_server.models.providers import resolve

    settings = models.settings
    key = next((key for key, found in named_models((settings.models, *settings.routes)) if found == name), "")
    if not key:
        return None
    try:
        provider, _ = resolve(name, settings.providers)
    except (ModelNotFound, InvalidConfiguration):
        return None  # a route may be wrong: the start tells that
    return Configured(name, provider.name, _place(models, key))


def _place(models: Models, key: str) -> str:
    return shown(Path(place_of(models.settings.origins, key) or models.workspace.config_file))
