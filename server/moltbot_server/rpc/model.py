"""ModelService: the models that can answer. Loading and switching while the core runs come with a later release."""

from __future__ import annotations

from moltbot.v1 import model_pb2, model_pb2_grpc

from moltbot_server.errors import InvalidField, Unimplemented
from moltbot_server.models.catalog import Catalog, CatalogEntry
from moltbot_server.rpc import convert, names
from moltbot_server.rpc.interceptors import Call

_LATER = "this release answers with the model it was started with; set MODEL_PATH and start again"
_LIST = ("models",)


class ModelService(model_pb2_grpc.ModelServiceServicer):
    """Serves models."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    async def GetModel(self, request: model_pb2.GetModelRequest, call: Call) -> model_pb2.GetModelResponse:  # type: ignore[override]
        """Answer one model."""
        model = names.read_model(request.name, "name")
        if not model:
            raise InvalidField("name", "use `models/{model}`")
        return model_pb2.GetModelResponse(model=self._as_message(self._catalog.entry(model)))

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
        """Refuse: this release cannot load while it runs."""
        raise Unimplemented(_LATER)

    async def SwitchModel(self, request: model_pb2.SwitchModelRequest, call: Call) -> model_pb2.SwitchModelResponse:  # type: ignore[override]
        """Refuse: this release cannot switch while it runs."""
        raise Unimplemented(_LATER)

    async def UnloadModel(self, request: model_pb2.UnloadModelRequest, call: Call) -> model_pb2.UnloadModelResponse:  # type: ignore[override]
        """Refuse: this release cannot unload while it runs."""
        raise Unimplemented(_LATER)

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
            ),
            state_message=entry.message,
            load_time=convert.timestamp(entry.load_time) if entry.load_time else None,
        )
