"""The keys that open providers: first those of the vault, then those of the environment, by their usual names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from moltbot_server.auth.vault import Vault, VaultError, check_text, tail
from moltbot_server.auth.vault_master import KEY, KEY_FILE, NEW_KEY
from moltbot_server.config_keys import is_provider_key
from moltbot_server.config_models import Provider
from moltbot_server.config_sources import read_env_file
from moltbot_server.workspace import Workspace

SWITCH = "MOLTBOT_PROVIDER_ENV"
_OFF = frozenset({"off", "false", "no", "0"})
_OURS = frozenset({KEY, KEY_FILE, NEW_KEY, SWITCH})

K = TypeVar("K")
KCo = TypeVar("KCo", covariant=True)


class MakeKey(Protocol[KCo]):
    """Makes of an id that may be shown and a secret what engines take; this floor and theirs do not know each other."""

    def __call__(self, *, id: str, text: str) -> KCo:
        """Return the key."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldKey:
    """A key and where it is from: `vault`, `environment` or `.env`. `created` in Unix seconds, None where not known."""

    id: str
    provider: str
    source: str
    label: str = ""
    created: int | None = None
    text: str = field(repr=False)

    @property
    def tail(self) -> str:
        """The last four characters, by which its owner knows it; nothing of a short key."""
        return tail(self.text)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldKeys(Generic[K]):
    """All keys at one moment. `problems` tells, in a sentence each, which variables hold none."""

    all: tuple[HeldKey, ...] = ()
    problems: tuple[str, ...] = ()
    by_provider: Mapping[str, tuple[K, ...]] = field(default_factory=dict)


class ProviderKeys(Generic[K]):
    """The key ring of a core. What it holds changes by `use` alone, in one step."""

    def __init__(self, workspace: Workspace, environ: Mapping[str, str], *, make: MakeKey[K]) -> None:
        """`environ` is the process environment; the workspace's `.env` is read besides.

        Raises:
            VaultError: the environment names two places for the vault's master key.
            ConfigError: `.env` cannot be read.
        """
        self._workspace = workspace
        self._environ = environ
        self._make = make
        self.vault = Vault(workspace, _environ(workspace, environ)[0])
        self.held: HeldKeys[K] = HeldKeys()

    def keys(self, provider: str) -> Sequence[K]:
        """Return the keys of a provider in the order in which they are to be tried."""
        return self.held.by_provider.get(provider, ())

    def read(self, variables: Mapping[str, Sequence[str]]) -> HeldKeys[K]:
        """Return the keys as they are now. `variables` are the names under which the environment has a provider's.

        Raises:
            VaultError: the vault cannot be opened.
            ConfigError: `.env` cannot be read.
        """
        self.vault.reload()
        found = [
            HeldKey(
                id=key.id, provider=key.provider, source="vault", label=key.label, created=key.created, text=key.text
            )
            for key in self.vault.keys
        ]
        environ, sources = _environ(self._workspace, self._environ)
        problems = []
        if environ.get(SWITCH, "").strip().lower() not in _OFF:
            for provider, name in ((provider, name) for provider, names in variables.items() for name in names):
                text = environ.get(name, "").strip()
                if not text or any(key.provider == provider and key.text == text for key in found):
                    continue
                try:
                    check_text(text)
                except VaultError as problem:
                    problems.append(f"the variable {name} is not used: {problem}")
                else:
                    found.append(HeldKey(id=f"env:{name}", provider=provider, source=sources[name], text=text))
        return HeldKeys(all=tuple(found), problems=tuple(problems), by_provider=self._sorted(found))

    def use(self, held: HeldKeys[K]) -> None:
        """Let keys that were read be the ones that are used."""
        self.held = held

    def _sorted(self, found: Iterable[HeldKey]) -> Mapping[str, tuple[K, ...]]:
        by_provider: dict[str, tuple[K, ...]] = {}
        for key in found:
            by_provider[key.provider] = (*by_provider.get(key.provider, ()), self._make(id=key.id, text=key.text))
        return by_provider


class Known(Protocol):
    """What is known of a provider; its preset is one, of which this floor does not know."""

    @property
    def key_env(self) -> Sequence[str]:
        """The variables in which its own tools look for its key."""

    @property
    def base_url(self) -> str:
        """Its address; empty where everybody has one of their own."""


def variables_of(providers: Iterable[Provider], presets: Mapping[str, Known]) -> Mapping[str, Sequence[str]]:
    """Return the names under which the environment may have the keys of each provider.

    A provider that is at another address than a preset is not given that preset's key, whatever its own name is: it
    would be told to whoever is there. Otherwise its own name with `_API_KEY` is one of the names.
    """
    found: dict[str, Sequence[str]] = {name: known.key_env for name, known in presets.items()}
    owners = {variable: known.base_url for known in presets.values() for variable in known.key_env}
    for provider in providers:
        own = re.sub(r"[^A-Z0-9]", "_", provider.name.upper()) + "_API_KEY"
        preset = provider.preset or provider.name
        known = presets.get(preset)
        variables, address = (known.key_env, known.base_url) if known else ((), "")
        is_there = not provider.base_url or _same(provider.base_url, address)
        theirs = variables if is_there or (provider.name == preset and not address) else ()
        is_told = bool(provider.base_url and owners.get(own)) and not _same(provider.base_url, owners[own])
        found[provider.name] = tuple(dict.fromkeys((*theirs, *(() if is_told else (own,)))))
    return found


def _same(one: str, other: str) -> bool:
    return one.rstrip("/") == other.rstrip("/")


def _environ(workspace: Workspace, environ: Mapping[str, str]) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Return the variables that matter here, and where each is from; the environment goes before the `.env`."""
    lines = read_env_file(workspace.folder / ".env", [])
    own = {name: str(line.value) for name, line in lines.items() if name in _OURS or is_provider_key(name)}
    both = {**own, **{name: text for name, text in environ.items() if text}}
    return both, {name: ".env" if name in own and not environ.get(name) else "environment" for name in both}
