"""The models that a workspace knows: the built-in one, folders that were added, folders that were pulled or converted.

They stand in one small file of the workspace, `models.json`, with the one that was chosen to answer from the start on.
What `moltbot model pull` and `moltbot model convert` make lies in the workspace's folder `models`, one folder each.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from enum import StrEnum
from pathlib import Path

import msgspec

from moltbot_server.config import Settings
from moltbot_server.config_models import DEFAULT_ROUTE
from moltbot_server.demo_model import ARTIFACT
from moltbot_server.errors import InvalidField, ModelExists, ModelInUse, ModelNotFound, ModelUnavailable, MoltBotError
from moltbot_server.models.encoder_folder import EncoderFolder, read_encoder_folder
from moltbot_server.models.folder import (
    BUILTIN_ID,
    BUILTIN_NAMES,
    SCRIPTED,
    ModelFolder,
    families,
    is_encoder,
    read_folder,
)
from moltbot_server.turns import Value
from moltbot_server.workspace import Workspace

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_WORDS = frozenset({"local", DEFAULT_ROUTE})  # which routes and requests have for something else
_TAKEN_NAMES = BUILTIN_NAMES | _WORDS | {SCRIPTED}
_LARGEST_FILE = 1 << 20
_MOST_MODELS = 1000


class Origin(StrEnum):
    """How a model came into a library."""

    BUILT_IN = "built-in"
    CONFIGURED = "configured"  # in no library: MODEL_PATH names it
    ADDED = "added"
    PULLED = "pulled"
    CONVERTED = "converted"


class KnownModel(Value, frozen=True, kw_only=True):
    """A model of a library.

    `path` is an absolute folder; empty where the model lies in the workspace's own folder of its name. `type` is its
    family where the folder does not say. `source` says where it came from, such as `org/name@4f5a…` of a hub.
    """

    name: str
    origin: Origin
    path: str = ""
    type: str = ""
    source: str = ""


class _Kept(Value, frozen=True, kw_only=True):
    """What stands in the file."""

    version: int = 1
    default: str = ""
    models: tuple[KnownModel, ...] = ()


BUILT_IN = KnownModel(name=BUILTIN_ID, origin=Origin.BUILT_IN, path=str(ARTIFACT))


class Library:
    """The models of a workspace. Several processes may read and change it at the same time."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._file = workspace.folder / "models.json"

    @property
    def folder(self) -> Path:
        """Where models lie that MoltBot itself fetched or made."""
        return self._workspace.folder / "models"

    @property
    def models(self) -> tuple[KnownModel, ...]:
        """All models, the built-in one first, then by name.

        Raises:
            ModelUnavailable: the library's file cannot be read.
        """
        return (BUILT_IN, *sorted(self._read().models, key=lambda model: model.name))

    @property
    def default(self) -> str:
        """The name of the model that was chosen to answer from the start on; empty when the configuration decides.

        Raises:
            ModelUnavailable: the library's file cannot be read.
        """
        return self._read().default

    def path(self, model: KnownModel) -> Path:
        """Return the folder of a model."""
        return Path(model.path) if model.path else self.folder / model.name

    def owns(self, model: KnownModel) -> bool:
        """Return whether the model's files are MoltBot's own, to be deleted with it."""
        return model.origin in (Origin.PULLED, Origin.CONVERTED) and not model.path

    def open(self, model: KnownModel) -> ModelFolder | EncoderFolder:
        """Read the folder of a model that answers, or of one that embeds; its id is the name that it has here.

        Raises:
            ModelUnavailable: the folder cannot be used; the text says what was found and what was expected.
        """
        return open_folder(self.path(model), model.type, model.name)

    def find(self, name: str) -> KnownModel:
        """Return a model by name; `builtin` is the built-in one.

        Raises:
            ModelNotFound: there is none.
            ModelUnavailable: the library's file cannot be read.
        """
        if name in BUILTIN_NAMES:
            return BUILT_IN
        models = self.models
        for model in models:
            if model.name == name:
                return model
        raise ModelNotFound(f"There is no model {name[:64]!r}; known are {', '.join(each.name for each in models)}.")

    def knows(self, name: str) -> bool:
        """Return whether a model has this name."""
        return name in BUILTIN_NAMES or any(model.name == name for model in self.models)

    def add(self, model: KnownModel, *, replace: bool = False, folder: Path | None = None) -> None:
        """Take in a model. `folder` becomes the model's own: it is moved to where `path` says.

        A crash in the middle leaves a model without its folder, which the next `moltbot model pull` mends, and never
        a folder that nobody knows.

        Raises:
            InvalidField: its name cannot be one.
            ModelExists: another one has its name and `replace` is false, or something lies where the folder would go.
            ModelUnavailable: the library's file cannot be read or written.
        """
        check_name(model.name)
        with self._changing() as kept:
            others = tuple(each for each in kept.models if each.name != model.name)
            if len(others) < len(kept.models) and not replace:
                raise ModelExists(f"There is a model {model.name} already.")
            if len(others) >= _MOST_MODELS:
                raise ModelUnavailable(f"The library has {_MOST_MODELS} models, which is the most; remove one first.")
            if folder is not None:
                self.check_free(model.name)
            self._write(msgspec.structs.replace(kept, models=(*others, model)))
            if folder is not None:
                folder.rename(self.folder / model.name)

    def check_free(self, name: str) -> None:
        """Refuse when something lies where a model's own folder would go.

        Raises:
            ModelExists: so it is.
        """
        place = self.folder / name
        if place.exists() or place.is_symlink():
            raise ModelExists(f"{place} is there already; move it away, or choose another name.")

    def check_removable(self, model: KnownModel) -> None:
        """Refuse to take a model away that is needed.

        Raises:
            ModelInUse: it is built in, or was chosen to answer from the start on.
        """
        if model == BUILT_IN:
            raise ModelInUse("The built-in model is part of MoltBot and stays.")
        if self.default == model.name:
            raise ModelInUse(
                f"The model {model.name} is to answer from the next start on; choose another one first, or leave it to "
                "the configuration with `moltbot model switch --configured`."
            )

    def remove(self, name: str) -> KnownModel:
        """Forget a model, and delete its folder if it was pulled or converted; return what it was.

        Raises:
            ModelNotFound: there is none.
            ModelInUse: see `check_removable`.
            ModelUnavailable: the library's file cannot be read or written.
        """
        with self._changing() as kept:
            model = self.find(name)
            self.check_removable(model)
            others = tuple(each for each in kept.models if each.name != model.name)
            self._write(msgspec.structs.replace(kept, models=others))
            doomed = self._set_aside(model.name) if self.owns(model) else None
        if doomed is not None:
            shutil.rmtree(doomed)
        return model

    def choose(self, name: str) -> None:
        """Let a model answer from the next start on; the empty name leaves that to the configuration again.

        Raises:
            ModelNotFound: there is none.
            ModelUnavailable: the library's file cannot be read or written.
        """
        chosen = self.find(name).name if name else ""
        with self._changing() as kept:
            self._write(msgspec.structs.replace(kept, default=chosen))

    def _set_aside(self, name: str) -> Path | None:
        """Rename a model's folder, in one step: nobody finds half of it while it is deleted."""
        folder = self.folder / name
        if folder.is_symlink() or not folder.is_dir():
            return None
        return folder.rename(self.folder / f".{name}.removed-{secrets.token_hex(4)}")

    def _read(self) -> _Kept:
        try:
            with self._file.open("rb") as file:
                content = file.read(_LARGEST_FILE + 1)
            if len(content) > _LARGEST_FILE:
                raise ValueError("it is over 1 MiB")
            return msgspec.json.decode(content, type=_Kept)
        except (FileNotFoundError, NotADirectoryError):
            return _Kept()
        except (OSError, ValueError) as problem:
            raise ModelUnavailable(
                f"The list of models {self._file} cannot be read: {problem}. Put it right, or delete it and add your "
                "models again with `moltbot model add`; the models themselves are not in it."
            ) from None

    @contextlib.contextmanager
    def _changing(self) -> Iterator[_Kept]:
        """Hold the library against other writers and give what it says now."""
        try:
            lock = os.open(self._file.with_name(".models.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as problem:
            raise ModelUnavailable(f"{self._file} cannot be written: {problem.strerror}.") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield self._read()
        finally:
            os.close(lock)

    def _write(self, kept: _Kept) -> None:
        draft = self._file.with_name(f".{self._file.name}.draft")  # one writer at a time: the lock is held
        try:
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(kept), indent=2) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self._file)
        except OSError as problem:
            draft.unlink(missing_ok=True)
            raise ModelUnavailable(f"{self._file} cannot be written: {problem.strerror}.") from None


def open_folder(path: Path, model_type: str, model_id: str = "") -> ModelFolder | EncoderFolder:
    """Read a folder by what it holds: a model that writes answers, or one that embeds texts.

    Raises:
        ModelUnavailable: it cannot be used; the text says what was found and what was expected.
    """
    if is_encoder(path):
        encoder = read_encoder_folder(path, model_id=model_id)
        if model_type and model_type.lower() != encoder.family.lower():
            raise ModelUnavailable(
                f"MODEL_TYPE is {model_type!r}, but {path} holds an encoder of the family {encoder.family!r}; leave "
                f"MODEL_TYPE empty. The families of models that write are {', '.join(sorted(families()))}."
            )
        return encoder
    return read_folder(path, model_type, model_id=model_id)


def check_name(name: str) -> None:
    """Refuse a name that a model cannot have.

    Raises:
        InvalidField: it has other characters than a-z 0-9 . _ -, is too long, or means a model of MoltBot's own.
    """
    _check_name(name, _TAKEN_NAMES)


def check_loaded_name(name: str) -> None:
    """Refuse a name under which no model can be loaded.

    Those of MoltBot's own models can be: they are loaded under them again.

    Raises:
        InvalidField: it has other characters than a-z 0-9 . _ -, is too long, or is a word for the built-in model.
    """
    _check_name(name, (BUILTIN_NAMES | _WORDS) - {BUILTIN_ID})


def _check_name(name: str, taken: Collection[str]) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidField("name", f"found {name[:80]!r}, expected 1 to 63 of a-z 0-9 . _ - that begin with a-z 0-9")
    if name in taken:
        raise InvalidField("name", f"{name} is MoltBot's own; choose another one")


def name_of(text: str) -> str:
    """Return the name for a model that a folder or a repository suggests, such as `qwen2.5-0.5b` for `Qwen2.5-0.5B`."""
    return re.sub(r"[^a-z0-9._]+", "-", text.lower()).strip("-._")[:63].rstrip("-._") or "model"


def overruled_by(settings: Settings) -> str:
    """Return where a model is named that goes before the one chosen with `moltbot model switch`, such as `.env:3`.

    That is the environment, an environment file or a flag; empty when nothing there names one. What `moltbot.yaml`
    names is older than a choice, so the choice goes before it.
    """
    written = f"{settings.workspace / 'moltbot.yaml'}:"
    places = (settings.origins.get(key, "") for key in ("model_type", "model_path"))
    return next((place for place in places if place and not place.startswith(written)), "")


def default_model(settings: Settings) -> KnownModel | None:
    """Return the model that was chosen with `moltbot model switch` to answer from the start on, `path` filled in.

    None where nobody chose, or where something names a model that goes before the choice (`overruled_by`): then
    `model_type` and `model_path` of the settings say which model answers. Its name is the id to load it under.

    Raises:
        ModelUnavailable: the chosen model cannot be used any more; the text says why and what to do.
    """
    library = Library(Workspace(folder=settings.workspace))
    name = library.default
    if not name or overruled_by(settings):
        return None
    try:
        model = library.find(name)
        read_folder(library.path(model), model.type)
    except (ModelNotFound, ModelUnavailable) as problem:
        raise chosen_is_broken(name, problem) from None
    return msgspec.structs.replace(model, path=str(library.path(model)))


def chosen_is_broken(name: str, problem: MoltBotError) -> ModelUnavailable:
    """Return what is told when the model that was chosen cannot answer: why, and how to choose another one."""
    return ModelUnavailable(
        f"The chosen model {name} cannot answer: {problem.message} Choose another one with `moltbot model switch "
        "NAME`, or go back with `moltbot model switch --configured`."
    )


def default_folder(settings: Settings) -> ModelFolder | None:
    """Return the folder of `default_model`, None where there is none; raises what that does."""
    model = default_model(settings)
    return read_folder(Path(model.path), model.type, model_id=model.name) if model else None
