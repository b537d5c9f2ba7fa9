"""Models that change while turns run: one is loaded beside the others, proved, chosen in one step, and let go."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from moltbot_server.errors import ModelExists, ModelInUse, ModelNotLoadable, ModelUnavailable
from moltbot_server.models.catalog import Catalog, CatalogEntry
from moltbot_server.models.engine import Engine
from moltbot_server.models.library import check_loaded_name
from moltbot_server.models.limits import can_write
from moltbot_server.turns import Value

_log = logging.getLogger(__name__)

Progress = Callable[[str, float], None]
"""Told of the step under way, such as `probing`, and how far the load is, from 0 to 1."""


class ModelSpec(Value, frozen=True, kw_only=True):
    """What to load: a name for it, its folder, its family where the folder does not say, its context in tokens."""

    name: str
    path: str
    type: str = ""
    context_length: int | None = None


class Loader(Protocol):
    """Where models are loaded: in this process, or by an engine that serves several cores."""

    async def load(self, spec: ModelSpec, progress: Progress) -> Engine:
        """Return an engine that has answered once.

        Raises:
            ModelNotLoadable: it cannot be loaded or did not answer; nothing is left behind.
        """

    async def prefer(self, engine: Engine) -> None:
        """Take note that an engine answers by default from now on."""

    async def unload(self, engine: Engine) -> None:
        """Free an engine that nobody uses any more."""


class ModelManager:
    """Loads, switches and unloads the models of a running core. All methods belong to the event loop's thread.

    A turn is answered by the model that was chosen when it was accepted, whatever happens after that.
    """

    def __init__(
        self,
        catalog: Catalog,
        loader: Loader,
        *,
        on_switch: Callable[[], None] = lambda: None,
        stays: Callable[[str], bool] = lambda model: False,
    ) -> None:
        """`on_switch` is called when another model has become the default; `stays` tells what cannot be unloaded."""
        self._stays = stays
        self._catalog = catalog
        self._on_switch = on_switch
        self._loader = loader
        self._specs: dict[str, ModelSpec] = {}
        self._loading: dict[str, asyncio.Task[CatalogEntry]] = {}

    async def load_model(
        self,
        name: str,
        path: str | Path,
        *,
        type: str = "",
        context_length: int | None = None,
        progress: Progress = lambda stage, share: None,
    ) -> CatalogEntry:
        """Load a model beside those that run and prove it with a real generation; the default stays as it is.

        Safe to repeat with the same arguments. A load goes on when its caller leaves.

        Raises:
            InvalidField: no model can have this name.
            ModelExists: another model has this name.
            ModelNotLoadable: its folder is not right, its probe failed, or memory would not suffice; nothing changed.
        """
        spec = ModelSpec(name=name, path=str(path), type=type, context_length=context_length)
        if name in self._loading or name in {entry.engine.id for entry in self._catalog.entries}:
            if self._specs.get(name) != spec:
                raise ModelExists(f"Another model is named {name}; choose another name or unload that one.")
            if name not in self._loading:
                return self._catalog.ready(name)
        else:
            check_loaded_name(name)
            self._specs[name] = spec
            task = self._loading[name] = asyncio.create_task(self._load(spec, progress))
            # Nobody may be left to hear of a failure; it was logged, and it is told to whoever asks again.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(self._loading[name])

    async def switch_model(self, name: str) -> tuple[CatalogEntry, str]:
        """Make a loaded model the default, in one step; return it and the name of the default before.

        Raises:
            ModelNotFound: no model has this name.
            ModelUnavailable: the model cannot answer.
            InvalidField: the model does not write answers.
        """
        entry = self._catalog.ready(name)
        can_write(entry.engine.capabilities, "name")
        if not self._stays(name):
            await self._loader.prefer(entry.engine)
        previous = self._catalog.default
        self._catalog.choose(name)
        if name != previous:
            self._on_switch()
        _log.info("another model answers by default", extra={"model": entry.engine.id, "previous": previous})
        return entry, previous

    async def unload_model(self, name: str) -> None:
        """Let the turns under way end, then free a model's memory. Goes on when its caller leaves.

        Raises:
            ModelNotFound: no model has this name.
            ModelInUse: it is the default model, or belongs to the configuration.
        """
        self.may_unload(name)
        await asyncio.shield(asyncio.create_task(self._unload(name)))

    def may_unload(self, name: str) -> None:
        """Refuse to unload what has to stay.

        Raises:
            ModelNotFound: no model has this name.
            ModelInUse: it is the default model, or belongs to the configuration.
        """
        if self._stays(name):
            raise ModelInUse(f"{name} is there by the configuration; take it out of moltbot.yaml and reload that.")
        self._catalog.may_drop(name)

    async def _load(self, spec: ModelSpec, progress: Progress) -> CatalogEntry:
        try:
            try:
                engine = await self._loader.load(spec, progress)
            except ModelUnavailable as problem:
                raise ModelNotLoadable(problem.message) from None
            except OSError as problem:  # a folder may change while it is read
                raise ModelNotLoadable(f"{spec.path} cannot be read: {problem.strerror or problem}.") from None
            entry = self._catalog.add(engine)
        except BaseException as problem:
            del self._specs[spec.name]
            _log.warning("a model was not loaded", extra={"model": spec.name, "problem": str(problem)})
            raise
        finally:
            del self._loading[spec.name]
        _log.info("a model was loaded", extra={"model": spec.name})
        return entry

    async def _unload(self, name: str) -> None:
        engine = await self._catalog.drop(name)
        self._specs.pop(engine.id, None)
        await self._loader.unload(engine)
        _log.info("a model was unloaded", extra={"model": engine.id})
