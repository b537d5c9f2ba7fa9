"""Engines from what a configuration says: this is where the model's native code is imported."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec

from moltbot_server.config import Settings
from moltbot_server.models.catalog import Catalog
from moltbot_server.models.engine import Engine
from moltbot_server.models.engines.local import MAX_WAITING, LocalEngine
from moltbot_server.models.engines.scripted import Script, ScriptedEngine, load_script
from moltbot_server.models.folder import SCRIPTED, check_context, configured_folder, is_encoder
from moltbot_server.models.library import chosen_is_broken, default_model
from moltbot_server.models.manager import ModelSpec, Progress
from moltbot_server.models.memory import available_memory, check_room, give_back
from moltbot_server.models.replica.nursery import Nursery
from moltbot_server.models.tuning import tuning_for
from moltbot_server.workspace import Workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What each model of a process may use.

    `workspace` keeps what `moltbot model tune` measured. `threads`: so many replicas of one thread, whatever was
    measured; 0 for what fits the machine. `queue_limit`: how many answers may wait for a model before more are refused.
    `shares`: how workspaces share a model, 1 for those not named. With a `nursery`, replicas of small models are
    processes.
    """

    workspace: Workspace | None = None
    threads: int = 0
    queue_limit: int = MAX_WAITING
    shares: Mapping[str, float] = field(default_factory=dict)
    nursery: Nursery | None = None

    @classmethod
    def of(cls, settings: Settings, nursery: Nursery | None = None) -> Resources:
        """Return what the settings give."""
        return cls(
            workspace=Workspace(folder=settings.workspace),
            threads=settings.threads or 0,
            queue_limit=settings.queue_limit,
            shares=dict(settings.shares),
            nursery=nursery,
        )


class LocalLoader:
    """Loads models into this process; a `Loader` of `ModelManager`."""

    def __init__(self, resources: Resources) -> None:
        """`resources` are those of each model."""
        self._resources = resources

    async def load(self, spec: ModelSpec, progress: Progress) -> Engine:
        """Return an engine that has answered once; see `Loader.load`."""
        progress("reading", 0.0)
        engine = await asyncio.to_thread(
            build_engine,
            model_type=spec.type,
            model_path=spec.path,
            context_length=spec.context_length,
            model_id=spec.name,
            resources=self._resources,
        )
        check_room(spec.name, engine.memory_bytes, available_memory())
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


def configured_catalog(settings: Settings, nursery: Nursery | None = None) -> Catalog:
    """Make the catalog of the one model that is to answer: the configured one, or the one that was chosen since.

    Nothing is loaded before `Catalog.start`. For the `nursery` see `Resources`.

    Raises:
        ModelUnavailable: there is no such model; the text says what was found and what was expected.
    """
    resources = Resources.of(settings, nursery)
    chosen = default_model(settings)
    if chosen is not None:
        engine = build_engine(
            model_type=chosen.type,
            model_path=chosen.path,
            model_id=chosen.name,
            context_length=settings.context_length,
            resources=resources,
        )
        return Catalog([engine], advise=partial(chosen_is_broken, chosen.name))
    engine = build_engine(
        model_type=settings.model_type,
        model_path=str(settings.model_path or ""),
        context_length=settings.context_length,
        resources=resources,
    )
    return Catalog([engine])


def build_engine(
    *,
    model_type: str = "",
    model_path: str = "",
    context_length: int | None = None,
    model_id: str = "",
    resources: Resources = Resources(),
) -> Engine:
    """Make an engine that is not started yet.

    `model_type`: empty for the built-in model or for what the folder says of itself; `builtin`, `scripted`, a family.
    `model_path`: the model's folder; for `scripted` a YAML file, or nothing. `context_length` in tokens, at most the
    model's own. `model_id`: the id to give it; empty for what the folder says.

    Raises:
        ModelUnavailable: there is no such model; the text says what was found and what was expected.
    """
    kind = model_type.strip().lower()
    if kind == SCRIPTED:
        script = load_script(Path(model_path)) if model_path else Script()
        engine = ScriptedEngine(msgspec.structs.replace(script, id=model_id) if model_id else script)
        if context_length is not None:
            check_context(context_length, engine.capabilities.context_length, engine.id)
        return engine
    if model_path and is_encoder(Path(model_path)):
        return _embedding_engine(Path(model_path), model_id, resources)
    folder = configured_folder(kind, model_path)
    if model_id:
        folder = msgspec.structs.replace(folder, id=model_id)
    if context_length is not None:
        check_context(context_length, folder.context_length, folder.id)
    return LocalEngine(
        folder,
        context_length=context_length or 0,
        tuning=tuning_for(resources.workspace, folder.path, resources.threads),
        max_waiting=resources.queue_limit,
        weights=resources.shares,
        nursery=resources.nursery,
    )


def _embedding_engine(path: Path, model_id: str, resources: Resources) -> Engine:
    # Late: few embed, and numpy takes its time.
    from moltbot_server.models.encoder_folder import read_encoder_folder
    from moltbot_server.models.engines.embedding import EmbeddingEngine

    return EmbeddingEngine(read_encoder_folder(path, model_id=model_id), threads=max(1, resources.threads))
