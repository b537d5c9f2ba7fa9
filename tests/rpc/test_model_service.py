"""Models and plugins as callers see them, and models that change while turns run."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from moltbot.v1 import model_pb2, plugin_pb2
from moltbot_server.demo_model import ARTIFACT
from moltbot_server.testing import RunningServer, Script, ScriptedEngine, running_server
from rpc_calls import Api, WatchedEngine, reason_of, refused, turn, until


async def test_the_only_model_is_listed_as_the_default_with_what_it_can_do(api: Api) -> None:
    answer = await api.models.ListModels(model_pb2.ListModelsRequest(), metadata=api.metadata)
    one = await api.models.GetModel(model_pb2.GetModelRequest(name="models/scripted"), metadata=api.metadata)

    assert [model.name for model in answer.models] == ["models/scripted"]
    assert answer.models[0] == one.model
    assert one.model.is_default
    assert one.model.state == model_pb2.MODEL_STATE_READY
    assert one.model.state_message == ""
    assert one.model.capabilities.context_length == 8192
    assert one.model.capabilities.streaming
    assert not one.model.capabilities.image_input
    assert one.model.load_time.seconds > 0


@pytest.mark.parametrize(
    ("name", "reason"), [("", "INVALID_FIELD"), ("x", "INVALID_FIELD"), ("models/x", "MODEL_NOT_FOUND")]
)
async def test_a_model_that_there_is_not_is_told(api: Api, name: str, reason: str) -> None:
    request = model_pb2.GetModelRequest(name=name)

    assert reason_of(await refused(api.models.GetModel(request, metadata=api.metadata))) == reason


async def test_a_model_is_loaded_while_turns_run_chosen_and_let_go(api: Api) -> None:
    load = model_pb2.LoadModelRequest(name="models/demo", path=str(ARTIFACT))
    steps = [step async for step in api.models.LoadModel(load, metadata=api.metadata)]
    before = await api.run(turn("Who are you?", session="sessions/s"))
    switched = await api.models.SwitchModel(model_pb2.SwitchModelRequest(name="models/demo"), metadata=api.metadata)
    after = await api.run(turn("Who are you?", session="sessions/s"))
    await api.models.UnloadModel(model_pb2.UnloadModelRequest(name="models/scripted"), metadata=api.metadata)
    again = await refused(api.run(turn(model="models/scripted")))

    assert [(step.stage, step.HasField("model")) for step in steps][-1] == ("ready", True)
    assert [step.progress for step in steps] == sorted(step.progress for step in steps)
    assert steps[-1].model.memory_bytes > 1_000_000
    assert (before.completed.model, after.completed.model) == ("models/scripted", "models/demo")
    assert (switched.model.name, switched.model.is_default, switched.previous) == (
        "models/demo",
        True,
        "models/scripted",
    )
    assert reason_of(again) == "MODEL_NOT_FOUND"


@pytest.mark.parametrize(
    ("method", "request_", "reason"),
    [
        ("LoadModel", model_pb2.LoadModelRequest(name="models/x", path="/nowhere"), "MODEL_NOT_LOADABLE"),
        ("LoadModel", model_pb2.LoadModelRequest(name="models/x"), "INVALID_FIELD"),
        ("LoadModel", model_pb2.LoadModelRequest(path="/nowhere"), "INVALID_FIELD"),
        ("LoadModel", model_pb2.LoadModelRequest(name="models/x", path="/", context_length=-1), "INVALID_FIELD"),
        ("LoadModel", model_pb2.LoadModelRequest(name="models/scripted", path="/nowhere"), "MODEL_EXISTS"),
        ("SwitchModel", model_pb2.SwitchModelRequest(name="models/x"), "MODEL_NOT_FOUND"),
        ("SwitchModel", model_pb2.SwitchModelRequest(name="x"), "INVALID_FIELD"),
        ("UnloadModel", model_pb2.UnloadModelRequest(name="models/x"), "MODEL_NOT_FOUND"),
        ("UnloadModel", model_pb2.UnloadModelRequest(name="models/scripted"), "MODEL_IN_USE"),
    ],
)
async def test_a_change_of_models_that_cannot_be_made_says_why(
    api: Api, method: str, request_: Any, reason: str
) -> None:
    call = getattr(api.models, method)(request_, metadata=api.metadata)
    problem = await refused(_last(call) if method == "LoadModel" else call)

    assert reason_of(problem) == reason
    assert (await api.run(turn("hello"))).completed.text == "You said: hello"


@pytest.mark.parametrize(
    "name", ["Tiny", "office/tiny", "tiny:8b", ".tiny", "-", "t~y", "t" * 64, "builtin", "built-in", "local", "default"]
)
async def test_a_name_that_the_command_line_refuses_is_refused_by_the_service(api: Api, name: str) -> None:
    load = model_pb2.LoadModelRequest(name=f"models/{name}", path=str(ARTIFACT))
    problem = await refused(_last(api.models.LoadModel(load, metadata=api.metadata)))

    assert (problem.code(), reason_of(problem)) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert (problem.details() or "").startswith("name: ")


async def test_the_built_in_model_is_loaded_under_its_own_name_and_a_taken_name_is_told_as_taken(
    tmp_path: Path,
) -> None:
    async with running_server(tmp_path, engine=WatchedEngine(Script(id="office/Large:8b"))) as server:
        api = Api.of(server)
        built_in = model_pb2.LoadModelRequest(name="models/moltbot-demo", path=str(ARTIFACT))
        loaded = await _last(api.models.LoadModel(built_in, metadata=api.metadata))
        taken = model_pb2.LoadModelRequest(name="models/office/Large:8b", path=str(ARTIFACT))
        problem = await refused(_last(api.models.LoadModel(taken, metadata=api.metadata)))
        await api.channel.close()

    assert loaded.model.name == "models/moltbot-demo"
    assert reason_of(problem) == "MODEL_EXISTS"


async def test_a_model_that_has_failed_says_so_and_refuses_turns_until_it_is_back(
    api: Api, engine: WatchedEngine
) -> None:
    engine.healthy = False
    error = await refused(api.run(turn(request_id="one", session="sessions/s")))
    request = model_pb2.GetModelRequest(name="models/scripted")
    model = (await api.models.GetModel(request, metadata=api.metadata)).model

    assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "MODEL_UNAVAILABLE")
    assert model.state == model_pb2.MODEL_STATE_FAILED
    assert model.state_message
    engine.healthy = True
    assert (await api.run(turn(request_id="one", session="sessions/s"))).turn == "sessions/s/turns/1"


async def test_a_turn_names_its_model_with_or_without_being_the_default(tmp_path: Path) -> None:
    async with running_server(tmp_path, engine=WatchedEngine(Script(id="org/some-model:8b"))) as server:
        api = Api.of(server)
        answer = await api.run(turn(model="models/org/some-model:8b"))
        await api.channel.close()

    assert answer.completed.model == "models/org/some-model:8b"


async def test_there_are_no_plugins_yet(api: Api, core: RunningServer) -> None:
    answer = await api.plugins.ListPlugins(plugin_pb2.ListPluginsRequest(), metadata=api.metadata)
    calls: list[Any] = [
        api.plugins.GetPlugin(plugin_pb2.GetPluginRequest(name="plugins/weather"), metadata=api.metadata),
        api.plugins.CallPlugin(plugin_pb2.CallPluginRequest(name="plugins/weather"), metadata=api.metadata),
    ]

    assert list(answer.plugins) == []
    for call in calls:
        assert reason_of(await refused(call)) == "PLUGIN_NOT_FOUND"
    bad = api.plugins.GetPlugin(plugin_pb2.GetPluginRequest(name="weather"), metadata=api.metadata)
    assert reason_of(await refused(bad)) == "INVALID_FIELD"


async def _last(call: Any) -> Any:
    return [step async for step in call][-1]


async def test_turns_that_wait_in_their_session_are_answered_by_the_model_that_was_chosen_when_they_came(
    api: Api, core: RunningServer
) -> None:
    other = ScriptedEngine(Script(id="other"))
    await other.start()
    core.core.catalog.add(other)
    first = asyncio.create_task(api.run(turn("#1 wait=2", session="sessions/s")))
    await until(lambda: core.core.catalog.entry("scripted").turns == 1)
    second = asyncio.create_task(api.run(turn("#1", session="sessions/s", request_id="second")))
    await until(lambda: core.core.catalog.entry("scripted").turns == 2)
    await api.models.SwitchModel(model_pb2.SwitchModelRequest(name="models/other"), metadata=api.metadata)
    unload = model_pb2.UnloadModelRequest(name="models/scripted")
    unloading = asyncio.ensure_future(api.models.UnloadModel(unload, metadata=api.metadata))
    third = await api.run(turn("#1"))
    answers = [await first, await second, third]
    await unloading

    models = [answer.completed.model for answer in answers]
    assert models == ["models/scripted", "models/scripted", "models/other"]


async def test_after_a_switch_the_history_is_cut_to_the_new_context_and_grows_again_with_the_old_one(
    tmp_path: Path,
) -> None:
    short = ScriptedEngine(Script(id="short", context_length=64))
    await short.start()
    async with running_server(tmp_path, engine=WatchedEngine()) as server:
        api = Api.of(server)
        server.core.catalog.add(short)
        for _ in range(10):
            await api.run(turn("some words of a talk", session="sessions/s"))
        trimmed = []
        for model in ("short", "scripted"):
            await api.models.SwitchModel(model_pb2.SwitchModelRequest(name=f"models/{model}"), metadata=api.metadata)
            answer = await api.run(turn("more", session="sessions/s"))
            trimmed.append(answer.completed.timings.trimmed_messages)
        await api.channel.close()

    assert trimmed[0] > 0
    assert trimmed[1] == 0
