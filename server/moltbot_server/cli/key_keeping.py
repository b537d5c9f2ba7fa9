"""`moltbot key add | list | remove | rotate-master`: what changes in the vault, and what a running core hears of it."""

from __future__ import annotations

import argparse
import getpass
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, wraps

from moltbot_server.auth.provider_keys import HeldKey, HeldKeys, ProviderKeys, variables_of
from moltbot_server.auth.vault import StoredKey, UnknownKey, Vault, VaultError, check_text
from moltbot_server.cli.model_place import told
from moltbot_server.cli.reloading import Reloaded, reload_routes
from moltbot_server.cli.tables import table
from moltbot_server.cli.terminal import Exit, Failure, as_typed, command, harmless
from moltbot_server.config import ConfigError, Settings, load_settings
from moltbot_server.config_spelling import nearest
from moltbot_server.models.providers import ProviderKey, presets
from moltbot_server.workspace import Workspace, WorkspaceError, find_workspace

_LONGEST_LABEL = 64
_MOST_READ = 8192


@dataclass(frozen=True)
class Keys:
    """What a command about keys needs to know of a workspace."""

    workspace: Workspace

    @classmethod
    def of(cls, given: argparse.Namespace, *, make: bool = False) -> Keys:
        """Return those of the workspace that a command names; `make` makes a workspace where there is none."""
        workspace = find_workspace(os.environ, given.workspace)
        if make and not workspace.exists():
            for done in workspace.create():
                if not given.json:
                    print(done[0].upper() + done[1:] + ".", flush=True)
        workspace.read_key()
        return cls(workspace)

    @cached_property
    def settings(self) -> Settings:
        """The settings as a start would read them.

        Raises:
            ConfigError: they are wrong.
        """
        return load_settings(self.workspace.folder, os.environ)

    @cached_property
    def ring(self) -> ProviderKeys[ProviderKey]:
        """The key ring, as a core of this workspace and this environment would have it."""
        return ProviderKeys(self.workspace, os.environ, make=ProviderKey)

    @property
    def vault(self) -> Vault:
        """The vault."""
        return self.ring.vault

    def held(self) -> HeldKeys[ProviderKey]:
        """Return all keys as they are now.

        Raises:
            VaultError: the vault cannot be opened.
        """
        return self.ring.read(variables_of(self.settings.providers, presets()))

    def check_provider(self, name: str) -> None:
        """Refuse a name that is neither a preset nor configured.

        Raises:
            Failure: with the name that was probably meant.
        """
        known = sorted({*presets(), *(provider.name for provider in self.settings.providers)})
        if name not in known:
            near = nearest(name, known)
            # What is nothing like a name may be a key in the wrong place, and is not repeated.
            known_are = f"of this name; known are {', '.join(known)}."
            hint = f"{harmless(name)!r}; did you mean {near}?" if near else known_are
            others = "Others are set up under `providers:` in moltbot.yaml."
            raise Failure(f"there is no provider {hint} {others}", Exit.USAGE)


def vault_problem(workspace: Workspace) -> str:
    """Return why the vault of a workspace cannot be opened, such as that its master key is lost; empty when it can."""
    try:
        Keys(workspace).vault.reload()
    except (WorkspaceError, ConfigError) as problem:
        return str(problem)
    return ""


def in_words(body: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Let a command say in words, or as JSON where that was asked for, what went wrong; the vault's troubles too."""

    @told
    @wraps(body)
    def run(given: argparse.Namespace) -> int:
        try:
            return body(given)
        except UnknownKey as problem:
            raise Failure(as_typed(str(problem), find_workspace(os.environ, given.workspace))) from None
        except WorkspaceError as problem:
            raise Failure(str(problem), Exit.CONFIG) from None

    return run


@in_words
def keep_key(given: argparse.Namespace) -> int:
    """Ask for a key or read it, and keep it; return the exit status."""
    if given.spilled:
        raise Failure(
            "a key is never an argument, where other users and the shell's history see it: give the provider alone, "
            "and type the key or pipe it in. What was typed just now is best replaced at the provider.",
            Exit.USAGE,
        )
    label = given.label.strip()
    if len(label) > _LONGEST_LABEL or label != harmless(label) or "\n" in label or "\t" in label:
        raise Failure(f"a label has up to {_LONGEST_LABEL} characters on one line.", Exit.USAGE)
    keys = Keys.of(given, make=True)
    keys.check_provider(given.provider)
    kept = keys.vault.add(given.provider, _typed_or_piped(given.provider), label=label)
    outcome = reload_routes(keys.workspace)
    if given.json:
        print(json.dumps({**_as_json(_held(kept)), "core": outcome.state, "message": outcome.text}, ensure_ascii=False))
    else:
        print(f"{given.provider} has the key {kept.id}{_shown_tail(kept.tail)}, encrypted in the vault. {outcome.text}")
        print(f"Try it: {command(f'key test {given.provider}', keys.workspace)}")
    return int(Exit.OK)


def _typed_or_piped(provider: str) -> str:
    if not sys.stdin.isatty():
        text = sys.stdin.buffer.read(_MOST_READ + 1).decode("utf-8", "replace").strip()
        if not text:
            raise Failure("nothing was piped in; pipe the key in, or run the command in a terminal.", Exit.USAGE)
    else:
        with warnings.catch_warnings():
            # Where a terminal cannot hide what is typed, a key is better not typed.
            warnings.simplefilter("error", getpass.GetPassWarning)
            try:
                text = getpass.getpass(f"Key of {provider} (it is not shown): ").strip()
            except (getpass.GetPassWarning, EOFError):
                raise Failure("the key could not be asked for here; pipe it in instead.", Exit.USAGE) from None
            except UnicodeDecodeError:
                raise Failure("what was typed is no text, and so no key.", Exit.USAGE) from None
    try:
        check_text(text)
    except VaultError as problem:
        raise Failure(str(problem), Exit.USAGE) from None
    return text


@in_words
def list_keys(given: argparse.Namespace) -> int:
    """Print the keys without what they are; return the exit status."""
    keys = Keys.of(given)
    held = keys.held()
    if given.json:
        print(json.dumps({"keys": [_as_json(key) for key in held.all], "problems": held.problems}, ensure_ascii=False))
        return int(Exit.OK)
    for problem in held.problems:
        print(f"moltbot: {problem}", file=sys.stderr)
    if not held.all:
        print(f"There is no key yet. Add one: {command('key add PROVIDER', keys.workspace)}")
        return int(Exit.OK)
    rows = [("PROVIDER", "ID", "KEY", "SOURCE", "ADDED", "LABEL")]
    rows += [
        (key.provider, key.id, f"…{key.tail}" if key.tail else "…", key.source, _day(key.created), harmless(key.label))
        for key in held.all
    ]
    print(table(rows))
    return int(Exit.OK)


@in_words
def remove_key(given: argparse.Namespace) -> int:
    """Forget a key; return the exit status."""
    keys = Keys.of(given)
    if given.id.startswith("env:"):
        name = given.id.removeprefix("env:")
        raise Failure(
            f"{harmless(given.id)} comes from the environment or from `.env`: take {harmless(name)} out there."
        )
    gone = keys.vault.remove(given.id)
    outcome = reload_routes(keys.workspace, "The running core does without it now.")
    if given.json:
        print(json.dumps({**_as_json(_held(gone)), "core": outcome.state, "message": outcome.text}, ensure_ascii=False))
    else:
        print(f"The key {gone.id} of {gone.provider} is forgotten. {outcome.text}")
        print("It still opens the provider to whoever has it; withdraw it there if it is not to be used any more.")
    return int(Exit.OK)


@in_words
def rotate_master(given: argparse.Namespace) -> int:
    """Encrypt the vault under a new master key; return the exit status."""
    keys = Keys.of(given)
    name = keys.vault.rotate_master()
    if keys.vault.master_told:
        text = "Now set MOLTBOT_VAULT_KEY to what MOLTBOT_VAULT_KEY_NEW is, and start MoltBot again."
        outcome = Reloaded(state="next_start", text=text)
    else:
        outcome = reload_routes(keys.workspace)
    if given.json:
        print(json.dumps({"master": name, "core": outcome.state, "message": outcome.text}, ensure_ascii=False))
    else:
        print(f"The vault is encrypted under a new master key ({keys.vault.master_place}). {outcome.text}")
    return int(Exit.OK)


def _held(key: StoredKey) -> HeldKey:
    return HeldKey(
        id=key.id, provider=key.provider, source="vault", label=key.label, created=key.created, text=key.text
    )


def _as_json(key: HeldKey) -> dict[str, object]:
    created = None if key.created is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(key.created))
    return {
        "id": key.id,
        "provider": key.provider,
        "label": key.label,
        "last4": key.tail,
        "created": created,
        "source": key.source,
    }


def _shown_tail(tail: str) -> str:
    return f" (…{tail})" if tail else ""


def _day(created: int | None) -> str:
    return "" if created is None else time.strftime("%Y-%m-%d", time.localtime(created))
