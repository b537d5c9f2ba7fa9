"""Engines from what a configuration says: this is where the model's native code is imported."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec

from moltbot_server.models.catalog import Catalog
from moltbot_server.models.engine import Engine
from moltbot_server.models.engines.local import MAX_WAITING, LocalEngine
from moltbot_server.models.engines.scripted import Script, ScriptedEngine, load_script
from moltbot_server.models.folder import SCRIPTED, check_context, configured_folder
from moltbot_server.models.manager import ModelSpec, Progress
from moltbot_server.models.memory import available_memory, check_room, give_back


class LocalLoader:
    """Loads models into this process; a `Loader` of `ModelManager`."""

    def __init__(self, *, threads: int = 0, queue_limit: int = MAX_WAITING) -> None:
        """`threads` and `queue_limit` are those of `build_engine`, for each model."""
        self._threads = threads
        self._queue_limit = queue_limit

    async def load(self, spec: ModelSpec, progress: Progress) -> Engine:
        """Return an engine that has answered once; see `Loader.load`."""
        progress("reading", 0.0)
        engine = await asyncio.to_thread(
            build_engine,
            model_type=spec.type,
            model_path=spec.path,
            context_length=spec.context_length,
            threads=self._threads,
            queue_limit=self._queue_limit,
            model_id=spec.name,
        )
        weights = Path(spec.path) / "model.bin"
        if weights.is_file():
            check_room(spec.name, weights.stat().st_size, available_memory())
        progress("loading", 0.1)
        try:
            await engine.start()
        except BaseException:
            give_back()
            raise
        progress("ready", 1.0)
        return engine

    async def prefer(self, engine: Engine) -> None:
        """Do nothing: what answers by default is not known down here."""

    async def unload(self, engine: Engine) -> None:
        """Free a model, and give its memory back to the machine."""
        await engine.close()
        give_back()


def build_catalog(
    *,
    model_type: str = "",
    model_path: str = "",
    context_length: int | None = None,
    threads: int = 0,
    queue_limit: int = MAX_WAITING,
) -> Catalog:
    """Make the catalog of one model that the configuration names; nothing is loaded before `Catalog.start`.

    `model_type`: empty for the built-in model or for what the folder says of itself; `builtin`, `scripted`, a family.
    `model_path`: the model's folder; for `scripted` a YAML file, or nothing. `context_length` in tokens, at most the
    model's own. `threads`: replicas of the model; 0 is what fits the machine. `queue_limit`: how many
    turns may wait for a replica before more are refused.

    Raises:
        ModelUnavailable: the configuration cannot be met; the text says what was found and what was expected.
    """
    return Catalog(
        [
            build_engine(
                model_type=model_type,
                model_path=model_path,
                context_length=context_length,
                threads=threads,
                queue_limit=queue_limit,
            )
        ]
    )


def build_engine(
    *,
    model_type: str = "",
    model_path: str = "",
    context_length: int | None = None,
    threads: int = 0,
    queue_limit: int = MAX_WAITING,
    model_id: str = "",
) -> Engine:
    """Make an engine that is not started yet; the arguments and what is raised are those of `build_catalog`.

    `model_id`: the id to give it; empty for what the folder says.
    """
    kind = model_type.strip().lower()
    if kind == SCRIPTED:
        script = load_script(Path(model_path)) if model_path else Script()
        engine = ScriptedEngine(msgspec.structs.replace(script, id=model_id) if model_id else script)
        if context_length is not None:
            check_context(context_length, engine.capabilities.context_length, engine.id)
        return engine
    folder = configured_folder(kind, model_path)
    if model_id:
        folder = msgspec.structs.replace(folder, id=model_id)
    if context_length is not None:
        check_context(context_length, folder.context_length, folder.id)
    return LocalEngine(folder, context_length=context_length or 0, threads=threads, max_waiting=queue_limit)
