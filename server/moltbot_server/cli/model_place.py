"""The models of a workspace as the commands see them: its library, its configuration, and the core that may run."""

from __future__ import annotations

import argparse
import difflib
import json
import os
from collections.abc import Callable
from functools import cached_property, wraps
from pathlib import Path

from moltbot import MoltBotClientError

from moltbot_server.cli.asking import Place, failure
from moltbot_server.cli.reaching import find_core, key_for, words_of
from moltbot_server.cli.running import is_held
from moltbot_server.cli.terminal import Exit, Failure, command
from moltbot_server.config import INLINE, Settings, load_settings
from moltbot_server.config_models import DEFAULT_ROUTE
from moltbot_server.errors import InvalidField, ModelNotFound, ModelUnavailable, MoltBotError
from moltbot_server.models.encoder_folder import EncoderFolder
from moltbot_server.models.folder import BUILTIN_ID, SCRIPTED, ModelFolder, configured_folder, families
from moltbot_server.models.library import KnownModel, Library, Origin, default_model
from moltbot_server.workspace import Workspace, find_workspace

_Body = Callable[[argparse.Namespace], int]


class Models:
    """What a command about models needs to know of a workspace."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.library = Library(workspace)

    @classmethod
    def of(cls, given: argparse.Namespace, *, make: bool = False) -> Models:
        """Return those of the workspace that a command names; `make` makes a workspace where there is none."""
        workspace = find_workspace(os.environ, given.workspace)
        if make and not workspace.exists():
            for done in workspace.create():
                if not given.json:
                    print(done[0].upper() + done[1:] + ".", flush=True)
        return cls(workspace)

    @cached_property
    def settings(self) -> Settings:
        """The settings as a start would read them.

        Raises:
            ConfigError: they are wrong.
        """
        return load_settings(self.workspace.folder, os.environ)

    @cached_property
    def configured(self) -> KnownModel | None:
        """The model that the configuration names, None where it names none that is there."""
        kind, path = self.settings.model_type.strip().lower(), str(self.settings.model_path or "")
        if kind == SCRIPTED:
            return KnownModel(name=SCRIPTED, origin=Origin.CONFIGURED, type=SCRIPTED, path=path)
        if not path:
            return None  # the built-in one
        try:
            folder = configured_folder(kind, path)
        except ModelUnavailable:
            return KnownModel(name=Path(path).name.lower(), origin=Origin.CONFIGURED, type=kind, path=path)
        return KnownModel(name=folder.id, origin=Origin.CONFIGURED, type=kind, path=str(folder.path))

    @property
    def all(self) -> list[KnownModel]:
        """The models of the library, and the configured one where it is none of them."""
        known = list(self.library.models)
        if self.configured and self.configured.name not in {model.name for model in known}:
            known.insert(1, self.configured)
        return known

    @property
    def elsewhere(self) -> str:
        """The address of an engine that is not this workspace's, and has a choice of its own; empty without one."""
        engine = self.settings.engine
        return "" if engine in ("", INLINE, f"unix:{self.workspace.engine_socket}") else engine

    @property
    def routed(self) -> bool:
        """Whether the configuration has a route for turns that name no model: it goes before any choice."""
        return bool(self.settings.models.primary)

    @property
    def at_start(self) -> str:
        """The name of the model that would answer after a start; empty where an engine elsewhere decides that."""
        if self.elsewhere:
            return ""
        if self.routed:
            return DEFAULT_ROUTE
        try:
            chosen = default_model(self.settings)
        except ModelUnavailable:
            return self.library.default
        return chosen.name if chosen else self.configured.name if self.configured else BUILTIN_ID

    def find(self, name: str) -> KnownModel:
        """Return a model of the library, or the configured one, by name.

        Raises:
            ModelNotFound: there is none of this name.
        """
        if not self.library.knows(name) and self.configured and self.configured.name == name:
            return self.configured
        try:
            return self.library.find(name)
        except ModelNotFound as problem:
            raise ModelNotFound(
                f"{problem.message} `moltbot model add` and `moltbot model pull` bring others."
            ) from None

    def open(self, model: KnownModel) -> ModelFolder | EncoderFolder:
        """Read a model's folder.

        Raises:
            ModelUnavailable: it cannot be used; the text says what was found and what was expected.
        """
        if model.type == SCRIPTED:
            raise ModelUnavailable("The scripted model is for tests and has no folder.")
        if self.is_raw(model):
            way = command(f"model convert {model.name}", self.workspace)
            raise ModelUnavailable(f"It holds weights for Transformers, which have to be converted first: {way}")
        return self.library.open(model)

    def is_raw(self, model: KnownModel) -> bool:
        """Return whether a model's folder holds weights that `moltbot model convert` takes, and none that run."""
        folder = self.library.path(model)
        raw = (path for pattern in ("*.safetensors", "pytorch_model*.bin") for path in folder.glob(pattern))
        return not (folder / "model.bin").exists() and next(raw, None) is not None

    def running_core(self, why: str) -> Place:
        """Return the core that runs; `why` it is needed stands in the message where none does.

        Raises:
            Failure: none runs.
        """
        if (place := self.core()) is None:
            start = command("start", self.workspace)
            text = f"MoltBot is not running, and {why}: start it with `{start}`."
            raise Failure(f"{text} A core that was started by itself is named by MOLTBOT_ADDRESS.", Exit.UNAVAILABLE)
        return place

    def core(self) -> Place | None:
        """Return where the core of the workspace is, or None when none runs.

        Raises:
            Failure: one should be there and does not answer.
        """
        if not os.environ.get("MOLTBOT_ADDRESS") and not is_held(self.workspace):
            return None
        key = key_for(self.workspace)
        address = find_core(self.workspace, "")
        return Place(address=address, key=key, words=words_of(self.workspace, address))


def check_family(kind: str) -> None:
    """Refuse a family that is none of those known, before anything is fetched for it; empty is for the folder to say.

    Raises:
        Failure: with all families, and the nearest one.
    """
    expected = sorted(families())
    if kind and kind.lower() not in expected:
        near = difflib.get_close_matches(kind.lower(), expected, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]}?" if near else ""
        text = f"--type: found {kind[:64]!r}, expected one of {', '.join(expected)}; or leave it to the folder.{hint}"
        raise Failure(text, Exit.USAGE)


def by_option(text: str) -> str:
    """Return what is wrong with a family, told of the option that was or may be typed and not of the environment."""
    return text.replace("leave MODEL_TYPE empty", "leave --type out").replace("MODEL_TYPE", "--type")


def told(body: _Body) -> _Body:
    """Let a command say in words, or as JSON where that was asked for, what went wrong."""

    @wraps(body)
    def run(given: argparse.Namespace) -> int:
        try:
            return _in_words(body, given)
        except Failure as problem:
            if not given.json:
                raise
            print(
                json.dumps({"error": {"message": problem.message, "status": int(problem.status)}}, ensure_ascii=False)
            )
            return int(problem.status)

    return run


def _in_words(body: _Body, given: argparse.Namespace) -> int:
    try:
        return body(given)
    except InvalidField as problem:
        raise Failure(problem.message, Exit.USAGE) from None
    except MoltBotError as problem:
        raise Failure(problem.message) from None
    except MoltBotClientError as problem:
        raise failure(problem) from None
