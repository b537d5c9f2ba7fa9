"""Workers of one machine: whoever is asked, what changes all of it holds for all of them."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from moltbot import MoltBot
from moltbot.v1 import cache_pb2, cache_pb2_grpc, chat_pb2, model_pb2, route_pb2, route_pb2_grpc
from moltbot_server.app import Core
from moltbot_server.config_models import ModelRoute, Provider, ProviderModel
from moltbot_server.store import NewTurn
from moltbot_server.store.sqlite import SqliteStore
from moltbot_server.testing import running_server
from moltbot_server.testing_provider import MockProvider, Script
from moltbot_server.turn_checks import digest_of
from moltbot_server.turns import SessionKey, TextPart, TurnInput, TurnKey
from moltbot_server.workspace import Workspace
from rpc_calls import Api, drained, reason_of, refused, turn, until
from worker_rig import Workers, workers

PROVIDER = Provider(
    name="far", dialect="openai", base_url="http://127.0.0.1:9/v1", models=(ProviderModel(name="far-model"),)
)
SCRIPT = "rules:\n  - {match: 'Hi', template: 'the other one'}\n"


async def models(api: Api) -> tuple[str, set[str]]:
    """Return the default model of a worker, and all of its models."""
    listed = await api.models.ListModels(model_pb2.ListModelsRequest(), metadata=api.metadata)
    default = next(model.name for model in listed.models if model.is_default)
    return default, {model.name for model in listed.models}


async def reload(api: Api) -> Any:
    """Have the configuration read again."""
    stub = route_pb2_grpc.RouteServiceStub(api.channel)
    return await stub.ReloadRoutes(route_pb2.ReloadRoutesRequest(), metadata=api.metadata)


async def load(api: Api, name: str, path: Path) -> list[Any]:
    """Load a model that plays a script."""
    request = model_pb2.LoadModelRequest(name=f"models/{name}", path=str(path), type="scripted")
    return [step async for step in api.models.LoadModel(request, metadata=api.metadata)]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A script for another model."""
    path = tmp_path / "other.yaml"
    path.write_text(SCRIPT)
    return path


async def test_several_cores_answer_at_one_port_and_keep_one_database(tmp_path: Path) -> None:
    async with workers(tmp_path / "w", 3) as rig:
        for number in range(12):
            await rig.anywhere().run(turn("Hi", session=f"sessions/s{number}", request_id=f"r{number}"))
        for number in range(12):
            assert len(await rig.at(1 + number % 3).messages(f"sessions/s{number}")) == 2


async def test_a_reload_asked_of_one_worker_holds_for_all(tmp_path: Path) -> None:
    async with workers(tmp_path / "w", 3) as rig:
        rig.configure(providers=(PROVIDER,), models=ModelRoute(primary="far-model", fallback=("scripted",)))
        await reload(rig.at(2))
        for number in (1, 2, 3):
            assert await models(rig.at(number)) == (
                "models/default",
                {"models/default", "models/far-model", "models/scripted"},
            )


async def test_a_hangup_of_one_worker_makes_all_read_the_configuration_again(tmp_path: Path) -> None:
    async with workers(tmp_path / "w", 2) as rig:
        rig.configure(providers=(PROVIDER,))
        rig.cores[1].reload_soon()
        for number in (1, 2):
            await until(lambda number=number: "far-model" in rig.cores[number].catalog)


async def test_a_wrong_configuration_is_carried_to_nobody(tmp_path: Path) -> None:
    async with workers(tmp_path / "w", 2) as rig:
        rig.configure(models=ModelRoute(primary="nobody-knows-it"))
        problem = await refused(reload(rig.at(1)))
        assert reason_of(problem) == "INVALID_CONFIGURATION"
        assert await models(rig.at(2)) == ("models/scripted", {"models/scripted"})


async def test_a_model_is_loaded_chosen_and_let_go_by_all_workers(tmp_path: Path, script: Path) -> None:
    async with workers(tmp_path / "w", 3) as rig:
        steps = await load(rig.at(1), "other", script)
        assert steps[-1].model.name == "models/other"
        for number in (1, 2, 3):
            assert await models(rig.at(number)) == ("models/scripted", {"models/scripted", "models/other"})

        switch = model_pb2.SwitchModelRequest(name="models/other")
        await rig.at(3).models.SwitchModel(switch, metadata=rig.metadata)
        for number in (1, 2, 3):
            assert (await models(rig.at(number)))[0] == "models/other"
            assert (await rig.at(number).run(turn("Hi"))).completed.text == "the other one"

        unload = model_pb2.UnloadModelRequest(name="models/scripted")
        await rig.at(2).models.UnloadModel(unload, metadata=rig.metadata)
        for number in (1, 2, 3):
            assert await models(rig.at(number)) == ("models/other", {"models/other"})


async def test_what_must_stay_is_unloaded_by_nobody(tmp_path: Path, script: Path) -> None:
    async with workers(tmp_path / "w", 2) as rig:
        await load(rig.at(1), "other", script)
        unload = model_pb2.UnloadModelRequest(name="models/scripted")
        problem = await refused(rig.at(1).models.UnloadModel(unload, metadata=rig.metadata))
        assert reason_of(problem) == "MODEL_IN_USE"
        assert await models(rig.at(2)) == ("models/scripted", {"models/scripted", "models/other"})


async def test_a_worker_that_does_not_run_is_not_missed_and_reads_all_when_it_comes(tmp_path: Path) -> None:
    async with workers(tmp_path / "w", 2) as rig:
        await rig.stop(2)
        rig.configure(providers=(PROVIDER,))
        await reload(rig.at(1))
        core = await rig.start(2)
        assert "far-model" in core.catalog


async def test_a_change_while_a_worker_starts_reaches_it(tmp_path: Path) -> None:
    async with workers(tmp_path / "w", 2) as rig:
        await rig.stop(2)
        old = rig.settings
        rig.configure(providers=(PROVIDER,))
        new, rig.settings = rig.settings, old
        starting = asyncio.create_task(rig.start(2))
        await asyncio.sleep(0)  # it has its settings
        rig.settings = new
        await starting
        await until(lambda: "far-model" in rig.cores[2].catalog)


async def test_who_asks_hears_which_worker_could_not(tmp_path: Path) -> None:
    async with workers(tmp_path / "w", 3) as rig:
        rig.configure(providers=(PROVIDER,))
        broken = rig.cores[3].reloading

        def unreadable() -> Any:
            raise PermissionError("no")

        broken._reread = unreadable
        problem = await refused(reload(rig.at(1)))
        assert problem.code() is grpc.StatusCode.UNAVAILABLE
        assert "core-3" in str(problem.details())
        assert "core-2" not in str(problem.details())
        for number in (1, 2):
            assert "far-model" in rig.cores[number].catalog


async def test_caches_are_cleared_and_counted_for_all_workers_together(tmp_path: Path) -> None:
    async with workers(tmp_path / "w", 2) as rig:
        for number in (1, 2):
            for name in ("a", "b"):
                await rig.at(number).run(turn("Hi", session=f"sessions/{name}{number}"))
        caches = cache_pb2_grpc.CacheServiceStub(rig.at(1).channel)
        listed = await caches.ListCaches(cache_pb2.ListCachesRequest(), metadata=rig.metadata)
        sessions = next(cache for cache in listed.caches if cache.name == "caches/sessions")
        assert sessions.entries == 4
        cleared = await caches.ClearCache(cache_pb2.ClearCacheRequest(name="caches/sessions"), metadata=rig.metadata)
        assert cleared.cleared == 4
        assert [len(core.sessions) for core in rig.cores.values()] == [0, 0]


async def test_a_model_of_a_route_is_as_all_workers_have_seen_it(tmp_path: Path) -> None:
    route = ModelRoute(primary="far-model", fallback=("scripted",))
    asked = route_pb2.ListRoutesRequest()
    async with workers(tmp_path / "w", 2, providers=(PROVIDER,), models=route) as rig:
        stub = route_pb2_grpc.RouteServiceStub(rig.at(2).channel)
        for number in (2, 1, 1, 1, 1, 1):
            await rig.at(number).run(turn("Hi"))
        far, scripted = (await stub.ListRoutes(asked, metadata=rig.metadata)).routes[0].models
        assert (far.state, far.attempts, far.recent_attempts, far.error_rate) == (route_pb2.BREAKER_STATE_OPEN, 6, 6, 1)
        assert (scripted.state, scripted.attempts, scripted.reason) == (route_pb2.BREAKER_STATE_CLOSED, 6, "")
        assert scripted.HasField("first_token")

        await rig.at(2).run(turn("Hi"))
        far, scripted = (await stub.ListRoutes(asked, metadata=rig.metadata)).routes[0].models
        assert (far.attempts, scripted.attempts) == (6, 7), "what rests for one worker rests for all"
        assert "cannot be reached" in far.reason


async def test_a_provider_that_asks_one_worker_to_wait_is_left_alone_by_all_and_by_those_that_come_later(
    tmp_path: Path,
) -> None:
    script = {"text": "Hello.", "faults": [{"kind": "rate_limit", "retry_after": 60, "until": "1 calls"}]}
    async with MockProvider(Script.read(script)).running() as mock:
        where = Provider(
            name="mock", dialect="openai", base_url=f"{mock.address}/v1", models=(ProviderModel(name="mock-model"),)
        )
        async with workers(tmp_path / "w", 0, workers=2, providers=(where,)) as rig:
            named, key = {"model": "models/mock-model"}, {"MOCK_API_KEY": "a-good-key"}
            for number in (1, 2):
                await rig.start(number, environ=key)
            for number in (1, 2):
                assert reason_of(await refused(rig.at(number).run(turn("Hi", **named)))) == "QUEUE_FULL"
            await rig.stop(1)
            await rig.start(1, environ=key)
            problem = await refused(rig.at(1).run(turn("Hi", **named)))
            assert reason_of(problem) == "QUEUE_FULL"
            assert mock.calls.shown()["total"] == 1


async def test_workers_that_cannot_tell_each_other_what_rests_answer_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    route = ModelRoute(primary="far-model", fallback=("scripted",))
    Workspace(folder=tmp_path / "w").create()
    Workspace(folder=tmp_path / "w").board_file("rests").mkdir()
    async with workers(tmp_path / "w", 2, providers=(PROVIDER,), models=route) as rig:
        assert "cannot tell each other which models rest" in caplog.text
        for number in (1, 1, 1, 1, 1, 2):
            await rig.at(number).run(turn("Hi"))
        stub = route_pb2_grpc.RouteServiceStub(rig.at(2).channel)
        listed = await stub.ListRoutes(route_pb2.ListRoutesRequest(), metadata=rig.metadata)
        assert listed.routes[0].models[0].reason.endswith("(for 1 of 2 workers)")


async def test_a_worker_that_does_not_answer_keeps_nobody_from_the_list(tmp_path: Path) -> None:
    route = ModelRoute(primary="scripted")
    async with workers(tmp_path / "w", 2, models=route) as rig:
        stub = route_pb2_grpc.RouteServiceStub(rig.at(1).channel)
        hangs = asyncio.Event()

        async def silent(*_: Any) -> Any:
            await hangs.wait()

        rig.cores[2].siblings.hear = silent  # type: ignore[method-assign]
        request = route_pb2.ListRoutesRequest()
        try:
            listed = await stub.ListRoutes(request, metadata=rig.metadata, timeout=10)
        finally:
            hangs.set()
        assert [found.name for found in listed.routes] == ["routes/default"]


async def test_streams_end_while_their_worker_leaves_and_new_calls_go_to_the_others(tmp_path: Path) -> None:
    async with workers(tmp_path / "w", 2) as rig:
        streams = [rig.anywhere().stream(turn("#20 pace=0.05", request_id=f"slow-{number}")) for number in range(16)]
        for stream in streams:
            await stream.read()
        leaving = asyncio.create_task(rig.stop(1))
        await asyncio.sleep(0.1)
        assert not leaving.done()
        for number in range(16):
            await rig.anywhere().run(turn("Hi", request_id=f"new-{number}"))
        outcomes = [await drained(stream) for stream in streams]
        assert {events[-1].WhichOneof("kind") for events in outcomes} == {"completed"}
        await leaving


async def test_who_follows_a_turn_of_another_worker_does_not_keep_one_from_leaving(tmp_path: Path) -> None:
    async with workers(tmp_path / "w", 2) as rig:
        name = (await rig.at(2).stream(turn("#200 pace=0.1", request_id="long")).read()).event.accepted.turn
        request = chat_pb2.ResumeTurnRequest(name=name)
        streams = [rig.anywhere().chat.ResumeTurn(request, metadata=rig.metadata) for _ in range(24)]
        for stream in streams:
            assert (await stream.read()).event.accepted.turn == name
        page = rig.cores[1].metrics.page
        began = time.monotonic()
        await rig.stop(1, grace=15.0)
        assert time.monotonic() - began < 12
        forwarded = re.findall(rb"^moltbot_forwarded_calls_total\{.*\} ([0-9.]+)$", page(), re.MULTILINE)
        assert sum(map(float, forwarded)) > 0, "all of them came to the other worker by chance"
        assert await rig.at(2).cancel(name)


async def test_a_second_set_of_cores_without_leave_to_share_the_port_is_refused(tmp_path: Path) -> None:
    async with workers(tmp_path / "w", 2) as rig:
        lonely = Workers(tmp_path / "other", 1, {"grpc_port": rig.settings.grpc_port})
        with pytest.raises(OSError, match="cannot be bound"):
            await lonely.start(0)
        lonely.cores.clear()


async def test_a_stream_that_outlasts_its_connection_goes_on_unseen(tmp_path: Path) -> None:
    ageing = {"max_connection_age": 0.5, "max_connection_age_grace": 0.3}
    async with running_server(tmp_path, **ageing) as server, MoltBot(server.address, server.key) as bot:
        events = [event async for event in bot.stream_turn("#60 pace=0.05", request_id="long")]
        assert events[-1].completed.text == "".join(event.text_delta.text for event in events)
        assert len(events[-1].completed.text.split()) == 60
        numbers = [event.sequence for event in events]
        assert numbers == sorted(set(numbers))
        assert '/ResumeTurn"' in server.core.metrics.page().decode(), "its connection was never ended"


async def test_a_worker_that_comes_later_gets_its_share_of_old_clients(tmp_path: Path) -> None:
    rig = Workers(tmp_path / "w", 2, {"max_connection_age": 0.5, "max_connection_age_grace": 5.0})
    await rig.start(1)
    bots = [MoltBot(f"127.0.0.1:{rig.settings.grpc_port}", rig.key) for _ in range(8)]
    for bot in bots:
        await bot.run_turn("Hi")
    over = asyncio.Event()

    async def talk(bot: MoltBot) -> None:
        while not over.is_set():
            await bot.run_turn("Hi")

    talking = [asyncio.create_task(talk(bot)) for bot in bots]
    later = await rig.start(2)
    try:
        await until(lambda: b"moltbot_turns_total{" in later.metrics.page() or talking[0].done(), within=20)
        over.set()
        await asyncio.gather(*talking)
    finally:
        for bot in bots:
            await bot.close()
        await rig.end()


async def test_a_turn_of_another_core_whose_number_this_one_would_give_is_not_told_to_have_failed(
    tmp_path: Path,
) -> None:
    async with workers(tmp_path / "w", 2) as rig:
        first, second = rig.at(1), rig.at(2)
        await second.run(turn("Hi", session="sessions/s"))  # which has the session at hand from then on
        running = first.stream(turn("#40 pace=0.05", session="sessions/s", request_id="r"))
        await running.read()
        told = await asyncio.gather(
            second.events(turn("#40 pace=0.05", session="sessions/s", request_id="r")), return_exceptions=True
        )
        if isinstance(told[0], grpc.aio.AioRpcError):  # who cannot lead to the other one says so
            assert reason_of(told[0]) == "NOT_SERVING"
        else:
            assert told[0][-1].HasField("completed"), told
        assert (await drained(running))[-1].HasField("completed")


async def test_a_turn_that_comes_while_its_session_is_taken_over_waits_for_those_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Workers(tmp_path / "w", 2, {})
    core = await rig.start(1)
    try:
        api = rig.at(1)
        await api.run(turn("Hi", session="sessions/s"))  # which leaves the session at hand
        await leave_running(core, "#10 pace=0.05", request="before")
        taken, told = asyncio.Event(), asyncio.Event()
        ask = core.store.take_over

        async def take_over() -> Any:
            orphans = await ask()
            if orphans:  # they are this core's now, and it does not know yet
                taken.set()
                await told.wait()
            return orphans

        monkeypatch.setattr(core.store, "take_over", take_over)
        await asyncio.wait_for(taken.wait(), 10)
        late = []
        for name in ("late", "later"):
            late.append(asyncio.create_task(api.events(turn(name, session="sessions/s", request_id=name))))
            await asyncio.sleep(0.3)
        assert not any(each.done() for each in late)
        told.set()
        events, _ = await asyncio.gather(*late)
        before = await api.events(turn("#10 pace=0.05", session="sessions/s", request_id="before"))
        began = next(event for event in events if event.HasField("routed"))
        assert before[-1].HasField("completed")
        assert before[-1].create_time.ToNanoseconds() <= began.create_time.ToNanoseconds()
        assert [said.turn.rpartition("/")[2] for said in await api.messages("sessions/s")] == list("11223344")
    finally:
        await rig.end()


async def leave_running(core: Core, text: str, *, request: str) -> None:
    """Have a turn in the session `s` that a node accepted which is gone now."""
    gone = SqliteStore(Workspace(folder=core.settings.workspace).database, address="unix:/nowhere")
    await gone.open()
    key = SessionKey(workspace="default", session="s")
    known = await gone.load_session(key, 10)
    assert known is not None
    asked = TurnInput(parts=(TextPart(text=text),), session="s", request_id=request)
    accepted = await gone.accept(
        NewTurn(
            key=TurnKey(session=key, ordinal=known.last_ordinal + 1),
            request_id=request,
            digest=digest_of(asked),
            create_time=time.time(),
            question=asked.parts,
            rest=asked,
            opens_session=False,
            version=known.version,
        )
    )
    assert accepted is None
    await gone.close()
