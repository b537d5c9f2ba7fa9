"""ModelService: the models that can answer, loaded and switched while turns run."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from moltbot.v1 import model_pb2, model_pb2_grpc

from moltbot_server.errors import InvalidField, ModelNotFound
from moltbot_server.models.catalog import Catalog, CatalogEntry
from moltbot_server.models.manager import ModelManager
from moltbot_server.rpc import convert, names
from moltbot_server.rpc.interceptors import Call
from moltbot_server.rpc.siblings import Siblings

_LIST = ("models",)
_LONGEST_PATH = 4095  # bytes, as Linux has it


class ModelService(model_pb2_grpc.ModelServiceServicer):
    """Serves models; what changes them holds for all workers when it is answered."""

    def __init__(self, catalog: Catalog, manager: ModelManager, siblings: Siblings | None = None) -> None:
        self._siblings = siblings or Siblings({}, "")
        self._catalog = catalog
        self._manager = manager

    async def GetModel(self, request: model_pb2.GetModelRequest, call: Call) -> model_pb2.GetModelResponse:  # type: ignore[override]
        """Answer one model."""
        return model_pb2.GetModelResponse(model=self._as_message(self._catalog.entry(_named(request.name))))

    async def ListModels(self, request: model_pb2.ListModelsRequest, call: Call) -> model_pb2.ListModelsResponse:  # type: ignore[override]
        """Answer the models, the default one first."""
        size = names.page_size(request.page_size, default=50, most=200)
        start, _ = names.read_place_token(_LIST, request.page_token)
        entries = self._catalog.entries
        more = start + size < len(entries)
        return model_pb2.ListModelsResponse(
            models=[self._as_message(entry) for entry in entries[start : start + size]],
            next_page_token=names.write_token(_LIST, (start + size, 0)) if more else "",
        )

    async def LoadModel(self, request: model_pb2.LoadModelRequest, call: Call) -> None:  # type: ignore[override]
        """Load a model beside the others and stream how far it got."""
        name = _named(request.name)
        if not request.path and not request.type:
            raise InvalidField("path", "name the model's folder on the core's machine")
        if len(request.path.encode()) > _LONGEST_PATH or "\0" in request.path:
            raise InvalidField("path", f"is no path: it has at most {_LONGEST_PATH} bytes, and none of them is NUL")
        if not request.context_length >= 0:
            raise InvalidField("context_length", "must be a number of tokens, or 0 for what the folder says")
        steps: asyncio.Queue[tuple[str, float]] = asyncio.Queue()
        loading = asyncio.ensure_future(
            self._manager.load_model(
                name,
                request.path,
                type=request.type,
                context_length=request.context_length or None,
                progress=lambda stage, share: steps.put_nowait((stage, share)),
            )
        )
        loading.add_done_callback(lambda _: steps.put_nowait(("", 1.0)))
        try:
            while (step := await steps.get())[0]:
                await call.context.write(model_pb2.LoadModelResponse(stage=step[0], progress=step[1]))
        finally:
            if not loading.done():
                loading.cancel()  # the load itself goes on; nobody waits for it here any more
        entry = await loading
        await self._siblings.carry(call, lambda channel, common: _load(channel, request, common))
        await call.context.write(
            model_pb2.LoadModelResponse(stage="ready", progress=1.0, model=self._as_message(entry))
        )

    async def SwitchModel(self, request: model_pb2.SwitchModelRequest, call: Call) -> model_pb2.SwitchModelResponse:  # type: ignore[override]
        """Make a loaded model the default."""
        entry, previous = await self._manager.switch_model(_named(request.name))
        await self._siblings.carry(
            call, lambda channel, common: model_pb2_grpc.ModelServiceStub(channel).SwitchModel(request, **common)
        )
        return model_pb2.SwitchModelResponse(model=self._as_message(entry), previous=f"models/{previous}")

    async def UnloadModel(self, request: model_pb2.UnloadModelRequest, call: Call) -> model_pb2.UnloadModelResponse:  # type: ignore[override]
        """Free a model once its last turn has ended."""
        name = _named(request.name)
        self._manager.may_unload(name)
        # At the same time: while the last turns end here, the others take no more of them.
        await asyncio.gather(
            self._manager.unload_model(name),
            self._siblings.carry(
                call,
                lambda channel, common: model_pb2_grpc.ModelServiceStub(channel).UnloadModel(request, **common),
                fine=(ModelNotFound.reason,),
            ),
        )
        return model_pb2.UnloadModelResponse()

    def _as_message(self, entry: CatalogEntry) -> model_pb2.Model:
        engine, can = entry.engine, entry.engine.capabilities
        state = model_pb2.ModelState.Value(f"MODEL_STATE_{entry.state.upper()}")
        return model_pb2.Model(
            name=f"models/{engine.id}",
            display_name=engine.display_name,
            state=state,
            is_default=engine.id == self._catalog.default,
            type=engine.type,
            capabilities=model_pb2.ModelCapabilities(
                context_length=can.context_length,
                streaming=can.streaming,
                sampling=can.sampling,
                stop=can.stop,
                seed=can.seed,
                repetition_penalty=can.repetition_penalty,
                image_input=can.image_input,
                audio_input=can.audio_input,
                tools=can.tools,
                token_counts=can.token_counts,
                cancellation=can.cancellation,
                generation=can.generation,
                embeddings=can.embeddings,
                continuation=can.continuation,
            ),
            state_message=entry.message,
            load_time=convert.timestamp(entry.load_time) if entry.load_time else None,
            memory_bytes=engine.memory_bytes,
            parallel=engine.parallel,
        )


async def _load(channel: Any, request: model_pb2.LoadModelRequest, common: Mapping[str, Any]) -> None:
    """Have a model loaded by another worker, and wait until it is there."""
    async for _ in model_pb2_grpc.ModelServiceStub(channel).LoadModel(request, **common):
        pass  # how far it is was told of the first load


def _named(name: str) -> str:
    model = names.read_model(name, "name")
    if not model:
        raise InvalidField("name", "use `models/{model}`")
    return model
