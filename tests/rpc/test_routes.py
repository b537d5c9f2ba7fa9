"""Routes through the whole core: providers on loopback that answer and fail, switches, reloads, budgets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from moltbot.v1 import (
    chat_pb2,
    chat_pb2_grpc,
    message_pb2,
    model_pb2,
    model_pb2_grpc,
    route_pb2,
    route_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
    usage_pb2,
    usage_pb2_grpc,
)
from moltbot_server.app import Core
from moltbot_server.auth.vault import Vault
from moltbot_server.config import Settings
from moltbot_server.config_models import Budget, ModelRoute, Price, Provider, ProviderModel
from moltbot_server.models.catalog import Catalog
from moltbot_server.testing import RunningServer, ScriptedEngine
from moltbot_server.testing_provider import MockProvider, Script
from moltbot_server.workspace import Workspace
from rpc_calls import until

WELL = {"text": "I am well.", "chunks": 3}
DOWN = {"faults": [{"kind": "error", "status": "500"}]}


def provider(name: str, mock: MockProvider, **fields: Any) -> Provider:
    models = (ProviderModel(name=f"{name}-model", price=Price(input=1.0, output=2.0)),)
    return Provider(**{"name": name, "dialect": "openai", "base_url": f"{mock.address}/v1", "models": models, **fields})


class Rig:
    """A core between two providers, whose configuration can be changed."""

    def __init__(self, core: Core, server: RunningServer, mocks: list[MockProvider], settings: list[Settings]) -> None:
        self.core, self.server, self.mocks, self._settings = core, server, mocks, settings
        self.channel = server.channel()
        self.chat: Any = chat_pb2_grpc.ChatServiceStub(self.channel)
        self.routes: Any = route_pb2_grpc.RouteServiceStub(self.channel)
        self.models: Any = model_pb2_grpc.ModelServiceStub(self.channel)

    def configure(self, **changed: Any) -> None:
        """Change what the next reload reads."""
        self._settings[0] = replace(self._settings[0], **changed)

    async def reload(self) -> Any:
        return await self.routes.ReloadRoutes(route_pb2.ReloadRoutesRequest(), metadata=self.server.metadata)

    async def events(self, text: str = "hello", **turn: Any) -> list[Any]:
        request = chat_pb2.StreamTurnRequest(turn=chat_pb2.TurnInput(parts=[message_pb2.Part(text=text)], **turn))
        return [response.event async for response in self.chat.StreamTurn(request, metadata=self.server.metadata)]

    async def answer(self, text: str = "hello", **turn: Any) -> Any:
        request = chat_pb2.RunTurnRequest(turn=chat_pb2.TurnInput(parts=[message_pb2.Part(text=text)], **turn))
        return (await self.chat.RunTurn(request, metadata=self.server.metadata)).completed


@asynccontextmanager
async def rig(folder: Path, first: dict[str, Any], second: dict[str, Any], **settings: Any) -> AsyncIterator[Rig]:
    workspace = Workspace(folder=folder)
    workspace.create()
    async with AsyncExitStack() as stack:
        mocks = [
            await stack.enter_async_context(MockProvider(Script.read(script)).running()) for script in (first, second)
        ]
        values: dict[str, Any] = {
            "providers": (provider("first", mocks[0]), provider("second", mocks[1])),
            "models": ModelRoute(primary="first-model", fallback=("second-model",)),
        } | settings
        held = [Settings(workspace=folder, port=0, grpc_port=0, metrics_port=0, **values)]
        environ = {"FIRST_API_KEY": "first-key-1234567890", "SECOND_API_KEY": "second-key-1234567890"}
        core = Core(
            held[0],
            key=workspace.read_key(),
            catalog=Catalog([ScriptedEngine()]),
            reread=lambda: held[0],
            environ=environ,
        )
        await core.start()
        stack.push_async_callback(core.stop, 5.0)
        made = Rig(core, RunningServer(core, workspace.read_key()), mocks, held)
        stack.push_async_callback(made.channel.close)
        yield made


def kinds(events: list[Any]) -> list[str]:
    return [event.WhichOneof("kind") for event in events]


async def test_the_first_model_of_the_route_answers_while_it_can(tmp_path: Path) -> None:
    async with rig(tmp_path, WELL, WELL) as core:
        events = await core.events()

    assert [event.routed.model for event in events if event.WhichOneof("kind") == "routed"] == ["models/first-model"]
    assert "notice" not in kinds(events)
    done = events[-1].completed
    assert (done.model, done.timings.attempts, list(done.timings.attempt_log)) == ("models/first-model", 1, [])


async def test_a_model_that_fails_before_its_first_word_is_stood_in_for_and_the_turn_says_so(tmp_path: Path) -> None:
    async with rig(tmp_path, DOWN, WELL) as core:
        events = await core.events()
        listed = await core.routes.ListRoutes(route_pb2.ListRoutesRequest(), metadata=core.server.metadata)

    notice = next(event.notice for event in events if event.WhichOneof("kind") == "notice")
    assert (notice.code, getattr(notice, "from"), notice.to) == (
        "FAILOVER",
        "models/first-model",
        "models/second-model",
    )
    done = events[-1].completed
    assert done.model == "models/second-model"
    assert "".join(event.text_delta.text for event in events).startswith("I am well.")
    assert done.timings.attempts == 2
    assert [(tried.model, tried.outcome) for tried in done.timings.attempt_log] == [
        ("models/first-model", "MODEL_UNAVAILABLE"), ("models/second-model", "ANSWERED"),
    ]  # fmt: skip
    (route,) = listed.routes
    assert (route.name, route.is_default) == ("routes/default", True)
    assert [(model.model, model.recent_attempts) for model in route.models] == [
        ("models/first-model", 1), ("models/second-model", 1),
    ]  # fmt: skip


async def test_a_caller_in_a_hurry_has_the_next_model_asked_before_the_threshold(tmp_path: Path) -> None:
    hangs = {"faults": [{"kind": "hang"}]}
    async with rig(tmp_path, hangs, WELL) as core:  # the threshold is three seconds
        request = chat_pb2.RunTurnRequest(turn=chat_pb2.TurnInput(parts=[message_pb2.Part(text="hello")]))
        answer = await core.chat.RunTurn(request, metadata=core.server.metadata, timeout=1.5)

    assert answer.completed.model == "models/second-model"


async def test_a_model_that_breaks_in_mid_answer_is_begun_anew_by_another_one(tmp_path: Path) -> None:
    cut = {"text": "Half of this is lost.", "chunks": 4, "pace": "20ms", "faults": [{"kind": "cut", "after": 2}]}
    async with rig(tmp_path, cut, WELL) as core:
        events = await core.events(flush_interval={"seconds": 0})
        session = next(event.accepted.session for event in events if event.WhichOneof("kind") == "accepted")
        again = await core.answer("and now?", session=session)

    assert "reset" in kinds(events)
    shown = ""
    for event in events:
        shown = event.reset.text if event.WhichOneof("kind") == "reset" else shown + event.text_delta.text
    assert shown == events[-1].completed.text == again.text
    assert "Half" not in shown


async def test_an_answer_that_broke_off_is_kept_as_it_is_where_the_route_says_so(tmp_path: Path) -> None:
    cut = {"text": "Half of this is lost.", "chunks": 4, "pace": "20ms", "faults": [{"kind": "cut", "after": 2}]}
    route = ModelRoute(primary="first-model", fallback=("second-model",), on_failure="stop")
    async with rig(tmp_path, cut, WELL, models=route) as core:
        events = await core.events(flush_interval={"seconds": 0}, request_id="once")
        again = await core.answer(request_id="once")
        session = next(event.accepted.session for event in events if event.WhichOneof("kind") == "accepted")
        sessions: Any = session_pb2_grpc.SessionServiceStub(core.channel)
        asked = session_pb2.ListMessagesRequest(parent=session)
        kept = (await sessions.ListMessages(asked, metadata=core.server.metadata)).messages

    done = events[-1].completed
    assert done.finish_reason == message_pb2.FINISH_REASON_UPSTREAM_ERROR
    assert "".join(event.text_delta.text for event in events) == done.text == again.text
    assert done.text
    assert "Half of this is lost.".startswith(done.text)
    assert (done.model, done.usage.output_tokens, core.mocks[1].calls.shown()["calls"]) == ("models/first-model", 2, [])
    (notice,) = [event.notice for event in events if event.WhichOneof("kind") == "notice"]
    assert (notice.code, getattr(notice, "from"), notice.to) == ("UPSTREAM_ERROR", "models/first-model", "")
    assert [attempt.outcome for attempt in done.timings.attempt_log] == ["MODEL_UNAVAILABLE"]
    assert [message.parts[0].text for message in kept] == ["hello", done.text]


async def test_how_much_a_model_reads_is_learned_from_its_provider(tmp_path: Path) -> None:
    tells = {**WELL, "context_length": 5000}
    models = (ProviderModel(name="mock-model"),)
    async with MockProvider(Script.read(tells)).running() as mock:
        where = (provider("first", mock, models=models),)
        async with rig(tmp_path, WELL, WELL, providers=where, models=ModelRoute(primary="mock-model")) as core:

            async def reads(model: str) -> int:
                asked = model_pb2.GetModelRequest(name=f"models/{model}")
                found = (await core.models.GetModel(asked, metadata=core.server.metadata)).model
                return int(found.capabilities.context_length)

            assert await reads("mock-model") == 32_768
            await core.answer()
            await until(lambda: core.core.caches.metadata.entries == 1)
            assert await reads("mock-model") == 5000


async def test_a_model_that_is_named_is_the_one_that_answers_or_nobody(tmp_path: Path) -> None:
    async with rig(tmp_path, DOWN, WELL) as core:
        named = await core.answer(model="models/second-model")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await core.answer(model="models/first-model")
        local = await core.answer(model="models/scripted")

    assert named.model == "models/second-model"
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert local.text == "You said: hello"


async def test_a_model_without_a_key_says_what_to_do(tmp_path: Path) -> None:
    keyless = (Provider(name="openai"),)
    async with rig(tmp_path, WELL, WELL, providers=keyless, models=ModelRoute(primary="openai/gpt-4o")) as core:
        refusals = []
        for model in ("models/openai/gpt-4o", ""):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await core.answer(model=model)
            refusals.append((refused.value.code(), "moltbot key add openai" in (refused.value.details() or "")))

    assert refusals == [(grpc.StatusCode.FAILED_PRECONDITION, True)] * 2


async def test_a_model_goes_by_each_of_its_names(tmp_path: Path) -> None:
    budget = Budget(scope="model", model="first-model", period="day", max_tokens=1)
    route = ModelRoute(primary="first/first-model", fallback=("second/anything",))
    async with rig(tmp_path, WELL, WELL, models=route, budgets=(budget,)) as core:
        by_route = await core.answer()
        second = await core.answer(model="models/second/anything")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await core.answer(model="models/first/first-model")

    assert (by_route.model, second.model) == ("models/first-model", "models/second/anything")
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_what_a_turn_used_before_it_was_stopped_is_on_the_account_of_the_model_that_wrote(tmp_path: Path) -> None:
    slow = {"chunks": 200, "pace": "10ms"}
    async with rig(tmp_path, slow, WELL) as core:
        request = chat_pb2.StreamTurnRequest(
            turn=chat_pb2.TurnInput(parts=[message_pb2.Part(text="hello")], cancel_on_disconnect=True)
        )
        call = core.chat.StreamTurn(request, metadata=core.server.metadata)
        async for response in call:
            if response.event.HasField("text_delta"):
                break
        call.cancel()
        for _ in range(500):
            if not len(core.core.pipeline):
                break
            await asyncio.sleep(0.01)
        usage: Any = usage_pb2_grpc.UsageServiceStub(core.channel)
        used = await usage.ListUsage(usage_pb2.ListUsageRequest(), metadata=core.server.metadata)

    assert [record.model for record in used.records] == ["models/first-model"]
    assert used.total.cost_micros > 0


async def test_a_route_of_its_own_is_taken_by_its_name(tmp_path: Path) -> None:
    routes = (ModelRoute(name="careful", primary="second-model", fallback=("local",)),)
    async with rig(tmp_path, WELL, DOWN, routes=routes) as core:
        answer = await core.answer(model="models/careful")
        listed = await core.models.ListModels(model_pb2.ListModelsRequest(), metadata=core.server.metadata)

    assert (answer.model, answer.text) == ("models/scripted", "You said: hello")
    assert [model.name for model in listed.models] == [
        "models/default", "models/scripted", "models/first-model", "models/second-model", "models/careful",
    ]  # fmt: skip


async def test_a_new_configuration_is_put_to_use_whole_or_not_at_all(tmp_path: Path) -> None:
    async with rig(tmp_path, WELL, WELL) as core:
        core.configure(models=ModelRoute(primary="nobody-knows-this"))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await core.reload()
        before = await core.answer()
        core.configure(models=ModelRoute(primary="second-model"), system_prompt="Be brief.")
        reloaded = await core.reload()
        after = await core.answer()
        core.configure(models=ModelRoute())
        await core.reload()
        local = await core.answer()

    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "models.primary" in (refused.value.details() or "")
    assert (before.model, after.model, local.model) == ("models/first-model", "models/second-model", "models/scripted")
    assert [model.model for model in reloaded.routes[0].models] == ["models/second-model"]
    assert list(reloaded.needs_restart) == ["system_prompt"]


async def test_a_refused_key_is_tried_again_when_the_configuration_is_read_again(tmp_path: Path) -> None:
    picky = {**WELL, "keys": ["right-key-1234567890"]}
    async with rig(tmp_path, picky, WELL) as core:
        assert (await core.answer()).model == "models/second-model"
        core.mocks[0].follow(Script.read(WELL))  # its account is in order again
        assert (await core.answer()).model == "models/second-model"
        await core.reload()
        for _ in range(2):
            answered = await core.answer()
        assert answered.model == "models/first-model"


async def test_a_key_that_is_added_is_used_at_once_by_a_model_that_rested_for_the_want_of_it(tmp_path: Path) -> None:
    picky = {**WELL, "keys": ["right-key-1234567890"]}
    async with rig(tmp_path, picky, WELL) as core:
        for _ in range(8):
            assert (await core.answer()).model == "models/second-model"
        Vault(Workspace(folder=tmp_path), {}).add("first", "right-key-1234567890")
        await core.reload()
        answer = await core.answer()

    assert answer.model == "models/first-model"


async def test_a_hundred_reloads_under_load_fail_no_turn(tmp_path: Path) -> None:
    async with rig(tmp_path, WELL, WELL) as core:
        stop = asyncio.Event()

        async def ask() -> list[str]:
            models = []
            while not stop.is_set():
                models.append((await core.answer()).model)
            return models

        asking = [asyncio.create_task(ask()) for _ in range(8)]
        for number in range(100):
            primary, fallback = ("first-model", "second-model") if number % 2 else ("second-model", "first-model")
            core.configure(models=ModelRoute(primary=primary, fallback=(fallback,)))
            await core.reload()
            await core.answer()  # and those of the others meanwhile
        stop.set()
        answered = [model for models in await asyncio.gather(*asking) for model in models]

    assert set(answered) <= {"models/first-model", "models/second-model"}
    assert len(answered) >= 8


async def test_a_budget_that_is_used_up_refuses_turns_and_a_soft_one_warns(tmp_path: Path) -> None:
    soft = Budget(scope="user", period="day", max_tokens=1, soft=True)
    async with rig(tmp_path, WELL, WELL, budgets=(soft,)) as core:
        await core.answer(user="ann")
        warned = await core.events(user="ann")
        core.configure(budgets=(Budget(scope="workspace", period="day", max_tokens=1),))
        await core.reload()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await core.answer(user="bob")

    notice = next(event.notice for event in warned if event.WhichOneof("kind") == "notice")
    assert notice.code == "BUDGET"
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "budget" in (refused.value.details() or "")


async def test_a_model_of_the_configuration_is_not_unloaded_by_hand(tmp_path: Path) -> None:
    async with rig(tmp_path, WELL, WELL) as core:
        request = model_pb2.UnloadModelRequest(name="models/second-model")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await core.models.UnloadModel(request, metadata=core.server.metadata)

    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_core_whose_route_leads_nowhere_yet_says_why(tmp_path: Path) -> None:
    keyless = (Provider(name="openai"),)
    async with rig(tmp_path, WELL, WELL, providers=keyless, models=ModelRoute(primary="openai/gpt-4o")) as core:
        health = core.core.health()

    assert (health["status"], health["model"]) == ("model failed", "default")
    assert "moltbot key add openai" in health["model_problem"]


async def test_a_route_says_which_of_its_models_has_no_key_yet(tmp_path: Path) -> None:
    keyless = (Provider(name="openai"), Provider(name="anthropic"))
    route = ModelRoute(primary="openai/gpt-4o", fallback=("anthropic/claude-opus-4-5",))
    async with rig(tmp_path, WELL, WELL, providers=keyless, models=route) as core:
        listed = await core.routes.ListRoutes(route_pb2.ListRoutesRequest(), metadata=core.server.metadata)

    assert [model.reason for model in listed.routes[0].models] == [
        "OpenAI needs a key; add one to the workspace of this MoltBot with `moltbot key add openai`.",
        "Anthropic needs a key; add one to the workspace of this MoltBot with `moltbot key add anthropic`.",
    ]
