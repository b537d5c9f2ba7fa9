"""A core whose models are in another process: the same answers, the same errors, and what if that one dies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import grpc
import pytest
from grpc import aio
from moltbot.v1 import inference_pb2, inference_pb2_grpc, message_pb2, model_pb2, session_pb2
from moltbot_server import app
from moltbot_server.app import Core
from moltbot_server.config import ConfigError
from moltbot_server.demo_model import ARTIFACT
from moltbot_server.engine_role import EngineRole
from moltbot_server.errors import ModelUnavailable
from moltbot_server.models.catalog import Catalog
from moltbot_server.models.engine import NOBODY, Asker, Generation, Listener
from moltbot_server.rpc import remote_engine
from moltbot_server.rpc.remote_engine import EngineLink
from moltbot_server.testing import RunningServer
from moltbot_server.turns import GenerationOptions, Message
from moltbot_server.workspace import Workspace
from rpc_calls import (
    LOOPBACK_NAME,
    Api,
    WatchedEngine,
    certificate,
    drained,
    fields_of,
    kinds,
    loaded,
    reason_of,
    refused,
    settings,
    turn,
    until,
    until_it_streams,
)


class AskedEngine(WatchedEngine):
    """Remembers who asked."""

    def __init__(self) -> None:
        super().__init__()
        self.askers: list[Asker] = []

    def begin(
        self, messages: Sequence[Message], options: GenerationOptions, listener: Listener, asker: Asker = NOBODY
    ) -> Generation:
        self.askers.append(asker)
        return super().begin(messages, options, listener, asker)


@pytest.fixture
def engine() -> AskedEngine:
    """The engine in the other role."""
    return AskedEngine()


@pytest.fixture
async def role(tmp_path: Path, engine: AskedEngine) -> AsyncIterator[EngineRole]:
    """An engine that serves on a Unix socket."""
    place = Workspace(folder=tmp_path)
    place.create()
    role = EngineRole(
        settings(tmp_path), key=place.read_key(), listen=f"unix:{place.engine_socket}", catalog=Catalog([engine])
    )
    await role.start()
    yield role
    await role.stop(1.0)


@pytest.fixture
async def core(tmp_path: Path, role: EngineRole) -> AsyncIterator[RunningServer]:
    """A core without a model of its own."""
    key = Workspace(folder=tmp_path).read_key()
    core = Core(settings(tmp_path, engine=role.server.address), key=key)
    await core.start()
    yield RunningServer(core, key)
    await core.stop(1.0)


@pytest.fixture
async def api(core: RunningServer) -> AsyncIterator[Api]:
    """All services of the core."""
    api = Api.of(core)
    yield api
    await api.channel.close()


def link_of(core: RunningServer) -> EngineLink:
    link = core.core._link
    assert link is not None
    return link


async def test_a_turn_is_answered_over_there_and_says_by_whom(api: Api, engine: AskedEngine) -> None:
    events = await api.events(turn("#3 pace=0.01", session="sessions/s"), timeout=20)
    answer = await api.run(turn("hello you", session="sessions/s"))

    assert kinds(events)[:2] == ["accepted", "routed"]
    assert "".join(event.text_delta.text for event in events) == "one two three" == events[-1].completed.text
    assert events[-1].completed.model == "models/scripted"
    assert answer.completed.text == "You said: hello you"
    assert engine.read[-1] == ["#3 pace=0.01", "one two three", "hello you"]
    first, second = engine.askers
    assert (first.workspace, first.session, first.deadline) == ("default", "s", None)
    assert second == first


async def test_answers_travel_on_one_stream_and_without_it_each_by_a_call(api: Api, core: RunningServer) -> None:
    stream = link_of(core).stream
    assert stream is not None
    await asyncio.gather(*(api.run(turn(f"hello {number}")) for number in range(5)))
    assert stream._number == 5

    # An engine of an earlier release does not know the method.
    stream._stub.GenerateMany = link_of(core)._channel.stream_stream("/moltbot.v1.InferenceService/Nothing")  # type: ignore[misc]
    await stream.close()
    answers = await asyncio.gather(*(api.run(turn(f"hello {number}")) for number in range(5)))
    assert [answer.completed.text for answer in answers] == [f"You said: hello {number}" for number in range(5)]
    assert not stream.is_known
    number = stream._number
    assert (await api.run(turn("hello"))).completed.text == "You said: hello"
    assert stream._number == number


async def test_an_engine_with_an_idle_stream_leaves_at_once(api: Api, role: EngineRole) -> None:
    await api.run(turn("hello"))
    began = asyncio.get_running_loop().time()
    await role.stop(20.0)
    assert asyncio.get_running_loop().time() - began < 10


async def test_an_engine_that_leaves_ends_what_is_under_way(api: Api, role: EngineRole) -> None:
    call = api.stream(turn("#30 pace=0.02"))
    await until_it_streams(call)
    await role.stop(20.0)
    assert [event.completed.finish_reason for event in await drained(call)][-1] == message_pb2.FINISH_REASON_STOP


async def test_options_and_stop_texts_cross_over(api: Api) -> None:
    options = message_pb2.GenerationOptions(max_output_tokens=5, stop=["three"], temperature=0.5, seed=7)
    events = await api.events(turn("#9", options=options))

    assert events[-1].completed.text == "one two "
    assert events[-1].completed.finish_reason == message_pb2.FINISH_REASON_STOP_TEXT


async def test_a_refusal_over_there_is_the_same_refusal_here(api: Api) -> None:
    failing = await refused(api.run(turn("#9 fail=0:QUEUE_FULL")))
    broken = await refused(api.run(turn("#9 fail=2")))
    long = await refused(api.run(turn("long " * 20_000)))

    assert (failing.code(), reason_of(failing)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert (broken.code(), reason_of(broken)) == (grpc.StatusCode.UNAVAILABLE, "MODEL_UNAVAILABLE")
    assert (reason_of(long), fields_of(long)) == ("CONTEXT_LENGTH_EXCEEDED", ["turn.parts"])


async def test_a_history_that_is_too_long_is_cut_where_it_can_be_counted(api: Api, engine: AskedEngine) -> None:
    said = "word " * 3000
    for _ in range(4):
        await api.run(turn(said, session="sessions/s"))
    answer = await api.run(turn("#1", session="sessions/s"))
    timings = answer.completed.timings

    assert timings.trimmed_messages > 0
    assert timings.trimmed_messages + timings.history_messages == 8
    assert len(engine.read[-1]) == timings.history_messages + 1


async def test_a_model_that_fails_over_there_is_told_to_fail_here_until_it_is_well(
    api: Api, core: RunningServer, engine: AskedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_engine, "_LOOK_AGAIN", 0.05)
    entry = core.core.catalog.entry("")
    assert (await api.run(turn("hello"))).completed.text == "You said: hello"
    engine.healthy = False
    assert reason_of(await refused(api.run(turn("hello")))) == "MODEL_UNAVAILABLE"
    await until(lambda: entry.state == "failed")
    assert core.core.health()["status"] == "model failed"
    assert "cannot answer" in str((await refused(api.run(turn("hello")))).details())
    engine.healthy = True
    await until(lambda: entry.state == "ready")
    assert (await api.run(turn("hello"))).completed.text == "You said: hello"


def generate(api: Api, *texts: str, trim: bool, timeout: float | None = None) -> aio.UnaryStreamCall:
    """Ask the core's own InferenceService for an answer to a conversation."""
    roles = (message_pb2.ROLE_USER, message_pb2.ROLE_ASSISTANT)
    messages = [
        message_pb2.Message(role=roles[at % 2], parts=[message_pb2.Part(text=text)]) for at, text in enumerate(texts)
    ]
    request = inference_pb2.GenerateRequest(prompt=inference_pb2.Prompt(messages=messages, trim=trim))
    return api.inference.Generate(request, metadata=api.metadata, timeout=timeout)


async def test_a_generation_may_have_much_time(api: Api, engine: AskedEngine) -> None:
    loop = asyncio.get_running_loop()
    for timeout in (5.0, 11.0, 3600.0, 1e8):
        *_, last = [piece async for piece in generate(api, "#3", trim=False, timeout=timeout)]
        assert last.finished.finish_reason == message_pb2.FINISH_REASON_STOP
        deadline = engine.askers[-1].deadline
        assert deadline is not None
        assert deadline - loop.time() == pytest.approx(timeout, abs=3, rel=0.1), "its engine knows how long"


async def test_a_conversation_that_does_not_fit_is_cut_for_those_alone_who_want_that(api: Api) -> None:
    long = ["word " * 3000] * 9
    error = await refused(generate(api, *long, trim=False))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_LENGTH_EXCEEDED")
    assert fields_of(error) == ["prompt.messages"]
    *_, last = [piece async for piece in generate(api, *long, trim=True)]
    assert last.finished.trimmed_messages > 0


async def test_a_core_aborts_what_it_began_for_any_workspace(tmp_path: Path, role: EngineRole) -> None:
    metadata = (("authorization", f"Bearer {Workspace(folder=tmp_path).read_key()}"),)
    async with aio.insecure_channel(role.server.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        message = message_pb2.Message(role=message_pb2.ROLE_USER, parts=[message_pb2.Part(text="#90 pace=0.05")])
        request = inference_pb2.GenerateRequest(
            prompt=inference_pb2.Prompt(messages=[message]),
            request_id="mine",
            asker=inference_pb2.Asker(workspace="somebody"),
        )
        call = stub.Generate(request, metadata=metadata)
        pieces = aiter(call)
        await anext(pieces)
        answer = await stub.Abort(inference_pb2.AbortRequest(request_id="mine"), metadata=metadata)
        *_, last = [piece async for piece in pieces]
    assert answer.aborted
    assert last.finished.finish_reason == message_pb2.FINISH_REASON_CANCELLED


async def test_who_attaches_with_more_time_keeps_a_turn_going_over_there(api: Api) -> None:
    said = turn("#3 wait=0.6", session="sessions/s", request_id="same")
    first = asyncio.ensure_future(api.run(said, timeout=0.3))
    second = asyncio.ensure_future(api.run(said, timeout=20))
    problem = await refused(first)

    assert problem.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert (await second).completed.text == "one two three"


async def test_cancelling_frees_the_engine_over_there(api: Api, engine: AskedEngine) -> None:
    call = api.stream(turn("#1000 pace=0.01", session="sessions/s", request_id="r"))
    await until_it_streams(call)
    assert await api.cancel("sessions/s/turns/1")
    await asyncio.wait_for(engine.idle.wait(), 5)

    assert engine.running == 0


async def test_tokens_are_counted_over_there(api: Api) -> None:
    text = inference_pb2.CountTokensRequest(text="twelve chars")
    counted = await api.inference.CountTokens(text, metadata=api.metadata)
    prompt = inference_pb2.Prompt(
        messages=[message_pb2.Message(role=message_pb2.ROLE_USER, parts=[message_pb2.Part(text="twelve chars")])]
    )
    whole = await api.inference.CountTokens(inference_pb2.CountTokensRequest(prompt=prompt), metadata=api.metadata)

    assert (counted.token_count, whole.token_count) == (3, 4)


async def test_a_model_is_loaded_over_there_chosen_and_let_go(api: Api, engine: AskedEngine) -> None:
    load = model_pb2.LoadModelRequest(name="models/demo", path=str(ARTIFACT))
    steps = await loaded(api, load)
    switch = model_pb2.SwitchModelRequest(name="models/demo")
    switched = await api.models.SwitchModel(switch, metadata=api.metadata)
    answer = await api.run(turn("Who are you?"))
    old = model_pb2.UnloadModelRequest(name="models/scripted")
    await api.models.UnloadModel(old, metadata=api.metadata)
    listed = await api.models.ListModels(model_pb2.ListModelsRequest(), metadata=api.metadata)

    assert [step.stage for step in steps][-1] == "ready"
    assert steps[-1].model.name == "models/demo"
    assert switched.previous == "models/scripted"
    assert answer.completed.model == "models/demo"
    assert [model.name for model in listed.models] == ["models/demo"]
    assert not engine.healthy


async def test_what_cannot_be_loaded_over_there_says_why(api: Api, tmp_path: Path) -> None:
    load = model_pb2.LoadModelRequest(name="models/demo", path=str(tmp_path / "nowhere"))
    problem = await refused(loaded(api, load))

    assert (problem.code(), reason_of(problem)) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_NOT_LOADABLE")
    assert "nowhere" in (problem.details() or "")


async def test_without_an_engine_the_core_does_not_start_and_says_what_to_do(tmp_path: Path) -> None:

    link = EngineLink(f"unix:{tmp_path}/nobody.sock", "key")
    with pytest.raises(ModelUnavailable, match="start it with `moltbot engine`"):
        await link.open(0.3)
    await link.close()


@pytest.mark.parametrize("own", [True, False])
async def test_what_to_do_about_an_engine_is_told_only_where_it_is_not_the_own_one_that_starts(
    tmp_path: Path, own: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(remote_engine, "_SOON", 0.05)
    monkeypatch.setattr(app, "_ENGINE_START", 0.3)
    place = Workspace(folder=tmp_path)
    place.create()
    address = f"unix:{place.engine_socket if own else tmp_path / 'elsewhere.sock'}"
    core = Core(settings(tmp_path, engine=address), key=place.read_key())
    with pytest.raises(ModelUnavailable) as problem:
        await core.start()

    (line,) = (record for record in caplog.records if record.name == remote_engine.__name__)
    assert (line.levelname, "may still be starting" in line.getMessage()) == ("INFO" if own else "WARNING", own)
    assert ("correct `engine`" in line.getMessage(), "correct `engine`" in problem.value.message) == (not own, not own)
    assert ("its log says why" in problem.value.message) is own


@pytest.mark.parametrize(
    ("holds", "signed_by_another", "told"),
    [
        (LOOPBACK_NAME, True, ["those in `engine_ca` (self signed", "name a file with the one that signed it"]),
        ("subjectAltName=DNS:engine.example", False, ["does not hold the name that `engine` has"]),
    ],
)
async def test_an_engine_that_is_not_trusted_is_told_as_that_with_the_key_to_correct(
    tmp_path: Path,
    engine: AskedEngine,
    holds: str,
    signed_by_another: bool,
    told: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(remote_engine, "_SOON", 0.2)
    own = certificate(tmp_path / "tls", "own", holds)
    ca = certificate(tmp_path / "tls", "other")["tls_cert"] if signed_by_another else own["tls_cert"]
    role = EngineRole(settings(tmp_path, **own), key="mb", listen="127.0.0.1:0", catalog=Catalog([engine]))
    await role.start()
    link = EngineLink(role.server.address, "mb", ca=ca)
    with pytest.raises(ModelUnavailable) as problem:
        await link.open(1.0)
    await link.close()
    await role.stop(1.0)

    (line,) = (record for record in caplog.records if record.name == remote_engine.__name__)
    assert line.getMessage() == "the engine is there and not trusted"
    for text in told:
        assert text in getattr(line, "problem", "")
        assert text in problem.value.message


async def test_an_engine_that_answers_in_the_moment_is_not_called_away(
    role: EngineRole, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    link = EngineLink(role.server.address, "mb")
    await link.open(5)
    await link._say_waiting()
    await link.close()
    assert [record for record in caplog.records if record.name == remote_engine.__name__] == []


async def test_a_wrong_key_is_told_as_such(tmp_path: Path, role: EngineRole) -> None:
    from moltbot_server.errors import Unauthenticated

    link = EngineLink(role.server.address, "mb_live_wrong")
    await link.open(5)
    with pytest.raises(Unauthenticated):
        await link.models()
    await link.close()


async def test_an_engine_tells_its_numbers_and_so_does_the_core_that_uses_it(
    tmp_path: Path, core: RunningServer, role: EngineRole
) -> None:
    lines = core.core.metrics.page().decode().splitlines()

    assert 'moltbot_model{model="scripted",number="answers"} 0.0' in lines
    assert 'moltbot_model{model="scripted",number="away_seconds"} 0.0' in lines
    assert 'moltbot_model{model="scripted",number="turns"} 0.0' in role.metrics.page().decode().splitlines()


async def test_an_engine_of_another_workspace_is_told_with_the_way_out(tmp_path: Path, role: EngineRole) -> None:
    other = Workspace(folder=tmp_path / "other")
    other.create()
    core = Core(settings(other.folder, engine=role.server.address), key=other.read_key())
    with pytest.raises(ModelUnavailable, match=r"start all of MoltBot again .* needs .*/other/key in its"):
        await core.start()


async def test_an_engine_that_comes_back_with_another_key_is_not_blamed_on_the_caller(
    tmp_path: Path, role: EngineRole, api: Api
) -> None:
    assert (await api.run(turn("#1"))).completed.text
    await role.stop(0.0)
    other = EngineRole(settings(tmp_path), key="other", listen=role.server.address, catalog=Catalog([AskedEngine()]))
    await other.start()
    error = await refused(api.run(turn("#1")))
    await other.stop(0.0)
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "MODEL_UNAVAILABLE")
    assert "does not know this core's key" in (error.details() or "")
    assert "start all of MoltBot again" in (error.details() or "")


@pytest.mark.parametrize(
    "listen", ["nonsense", "foo:bar", "0.0.0.0:50061", "127.0.0.1:99999", "unix:", "unix:/nowhere/engine.sock"]
)
def test_an_address_that_cannot_be_listened_on_is_refused_by_name(tmp_path: Path, listen: str) -> None:
    with pytest.raises(ConfigError, match="--listen"):
        EngineRole(settings(tmp_path), key="mb", listen=listen, catalog=Catalog([AskedEngine()]))


async def test_one_socket_has_one_engine(tmp_path: Path, role: EngineRole) -> None:
    second = EngineRole(settings(tmp_path), key="mb", listen=role.server.address, catalog=Catalog([AskedEngine()]))
    with pytest.raises(OSError, match="another process listens there"):
        await second.start()


async def test_a_burst_of_new_sessions_is_refused_before_it_is_stored(
    api: Api, core: RunningServer, role: EngineRole, engine: AskedEngine
) -> None:
    remote = core.core.catalog.get()
    remote.parallel, remote._limit = 2, 4  # type: ignore[attr-defined,misc]
    calls = [asyncio.ensure_future(api.run(turn("#1 wait=0.5", session=f"sessions/new-{n}"))) for n in range(40)]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    refusals = [outcome for outcome in outcomes if isinstance(outcome, aio.AioRpcError)]
    sessions = await api.sessions.ListSessions(session_pb2.ListSessionsRequest(page_size=100), metadata=api.metadata)

    assert {reason_of(refusal) for refusal in refusals} == {"QUEUE_FULL"}
    assert all("grpc-retry-pushback-ms" in dict(refusal.trailing_metadata() or ()) for refusal in refusals)
    assert len(outcomes) - len(refusals) == len(sessions.sessions) == len(engine.askers) <= 6
