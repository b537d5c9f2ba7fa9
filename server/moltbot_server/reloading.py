"""What of a running core's configuration can change: providers, their keys, routes, budgets. All of it or nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from moltbot_server.auth.provider_keys import HeldKeys, ProviderKeys, variables_of
from moltbot_server.config import ConfigError, Settings
from moltbot_server.config_keys import KEYS
from moltbot_server.config_sources import Problem, place_of, read_text
from moltbot_server.errors import InvalidConfiguration
from moltbot_server.models.caching.answers import AnswerCache
from moltbot_server.models.caching.building import routing_digest
from moltbot_server.models.lineup import Lineup, Plan
from moltbot_server.models.plan_check import budget_notice
from moltbot_server.models.providers import ProviderKey, presets
from moltbot_server.models.routing import RouteEngine
from moltbot_server.usage import Ledger
from moltbot_server.workspace import Workspace, WorkspaceError

log = logging.getLogger(__name__)

Reread = Callable[[], Settings]
"""Reads the configuration as the core was started with it; raises ConfigError."""

LIVE = frozenset({"providers", "models", "routes", "budgets", "currency"})
"""The keys and sections that a running core reads again; all others hold from its next start on."""


class Reloading:
    """Puts a configuration to use, the first one and those that come while turns run."""

    def __init__(
        self,
        settings: Settings,
        *,
        reread: Reread,
        keys: ProviderKeys[ProviderKey],
        lineup: Lineup,
        ledger: Ledger,
        answers: AnswerCache,
    ) -> None:
        self._started_with = self._settings = settings
        self._reread = reread
        self._keys = keys
        self._lineup = lineup
        self._ledger = ledger
        self._answers = answers
        self._one_at_a_time = asyncio.Lock()

    @property
    def routes(self) -> Sequence[RouteEngine]:
        """The routes that are in use, the default one first."""
        return tuple(self._lineup.routes())

    @property
    def notices(self) -> Sequence[str]:
        """What of the configuration is followed and hardly meant as things are now: a sentence each, with its place."""
        settings, models = self._settings, self._lineup.models
        told = (
            Problem(where=place_of(settings.origins, f"budgets.{number}"), text=notice)
            for number, budget in enumerate(settings.budgets)
            if budget.scope == "model" and (notice := budget_notice(budget.model, models))
        )
        return tuple(map(str, told))

    async def open(self) -> None:
        """Put the configuration to use that the core was started with.

        Raises:
            InvalidConfiguration: a route leads nowhere, or the vault cannot be opened.
        """
        settings = self._started_with
        self._use_keys(self._read_keys(settings))
        await self._lineup.open(_plan(settings))
        self._look_for_slips()
        self.renew_answers()

    def renew_answers(self) -> None:
        """Let no answer be given again that others than those who answer now have said."""
        self._answers.renew(routing_digest(self._settings, self._lineup.default))

    async def reload(self) -> Sequence[str]:
        """Read the configuration and the keys again and put them to use; return what only the next start would use.

        Raises:
            InvalidConfiguration: something is wrong; nothing has changed.
            StorageUnavailable: the budgets cannot be counted now; nothing has changed.
        """
        async with self._one_at_a_time:
            try:
                await asyncio.to_thread(self._check_file)
                settings = await asyncio.to_thread(self._reread)
                held = await asyncio.to_thread(self._read_keys, settings)
            except (ConfigError, WorkspaceError) as problem:
                raise InvalidConfiguration(str(problem)) from None
            lines = self._lineup.prepare(_plan(settings))
            await self._ledger.replace(settings.budgets, settings.currency)
            before = self._keys.held.by_provider
            self._use_keys(held)
            await self._lineup.apply(lines)
            providers = before.keys() | held.by_provider.keys()
            self._lineup.keys_changed([name for name in providers if before.get(name) != held.by_provider.get(name)])
            self._settings = settings
            self.renew_answers()
            self._look_for_slips()
            log.info("the configuration was read again", extra={"routes": len(self.routes)})
            return _needs_restart(self._started_with, settings)

    async def catch_up(self) -> None:
        """Put to use what has changed since the configuration was read, if anything has; raises what `reload` does."""
        try:
            settings = await asyncio.to_thread(self._reread)
        except (ConfigError, WorkspaceError) as problem:
            raise InvalidConfiguration(str(problem)) from None
        held = await asyncio.to_thread(self._read_keys, settings)
        if settings != self._settings or held.by_provider != self._keys.held.by_provider:
            await self.reload()

    def _check_file(self) -> None:
        """Refuse to take a file that was lost, such as by an editor that broke off, for one that asks for nothing."""
        file = Workspace(folder=self._started_with.workspace).config_file
        if not any(place.startswith(f"{file}:") for place in self._settings.origins.values()):
            return
        if (text := read_text(file)) is None:
            raise InvalidConfiguration(f"{file} is gone; what it said holds on until there is one again")
        if not text.strip():
            raise InvalidConfiguration(
                f"{file} is empty, as after a save that broke off; what it said holds on. "
                "To have nothing set, leave a comment in it"
            )

    def _read_keys(self, settings: Settings) -> HeldKeys[ProviderKey]:
        try:
            return self._keys.read(variables_of(settings.providers, presets()))
        except (ConfigError, WorkspaceError) as problem:
            raise InvalidConfiguration(str(problem)) from None

    def _look_for_slips(self) -> None:
        """Warn of budgets that no turn will ever count for, as far as can be told: a model may be loaded later."""
        for notice in self.notices:
            log.warning("a budget is of a model that is not there now", extra={"notice": notice})

    def _use_keys(self, held: HeldKeys[ProviderKey]) -> None:
        for problem in held.problems:
            log.warning("a provider key is not used", extra={"problem": problem})
        self._keys.use(held)


def _plan(settings: Settings) -> Plan:
    return Plan(
        providers=settings.providers,
        default=settings.models,
        routes=settings.routes,
        currency=settings.currency,
        places=settings.origins,
    )


def _needs_restart(before: Settings, now: Settings) -> Sequence[str]:
    """Return the keys that say something else now and hold from the next start on."""
    later = (key for key in KEYS if key.partition(".")[0] not in LIVE)
    return sorted(key for key in later if _said(before, key) != _said(now, key))


def _said(settings: Settings, key: str) -> object:
    if key in settings.beneath:  # what `moltbot start` told its core by a flag hides what the file says
        return settings.beneath[key]
    value: object = settings
    for name in key.split("."):
        value = getattr(value, name, None)  # a section may be None as a whole
    return value
