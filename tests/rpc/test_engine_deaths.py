"""Engines that are killed while they write: turns wait, go on, or begin anew."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from moltbot.v1 import chat_pb2, message_pb2, model_pb2
from moltbot_server.app import Core
from moltbot_server.demo_model import ARTIFACT
from moltbot_server.rpc import remote_engine, remote_generation
from moltbot_server.testing import RunningServer
from moltbot_server.workspace import Workspace
from rpc_calls import Api, drained, kinds, loaded, refused, settings, turn, until_it_streams


class EngineProcess:
    """An engine as users run it, which can be killed and started again."""

    def __init__(self, folder: Path, script: str = "") -> None:
        self.folder = folder
        self.path = folder / "script.yaml"
        self.path.write_text(script or "rules: []")
        self.process: asyncio.subprocess.Process

    async def start(self) -> None:
        known = {name: value for name, value in os.environ.items() if not name.startswith("MOLTBOT_")}
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "moltbot_server", "engine", "--workspace", str(self.folder)),
            env={**known, "MODEL_TYPE": "scripted", "MODEL_PATH": str(self.path)},
            cwd=self.folder,
            stdout=asyncio.subprocess.PIPE,
        )
        assert self.process.stdout is not None
        assert await asyncio.wait_for(self.process.stdout.readline(), 20)

    async def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        self.process.send_signal(number)
        await asyncio.wait_for(self.process.wait(), 20)


@pytest.fixture
def script() -> str:
    """What the engine says."""
    return ""


FORGETFUL = pytest.mark.parametrize("script", ["continuation: false"], ids=["forgetful"])
"""With a model that cannot go on with an answer."""


@pytest.fixture
async def killable(tmp_path: Path, script: str) -> AsyncIterator[tuple[EngineProcess, Api]]:
    """An engine as a process, and a core that uses it."""
    place = Workspace(folder=tmp_path)
    place.create()
    engine = EngineProcess(tmp_path, script)
    await engine.start()
    core = Core(settings(tmp_path, engine=f"unix:{place.engine_socket}"), key=place.read_key())
    await core.start()
    api = Api.of(RunningServer(core, place.read_key()))
    yield engine, api
    await api.channel.close()
    await core.stop(1.0)
    if engine.process.returncode is None:
        await engine.kill(signal.SIGTERM)


async def killed_in_the_midst(engine: EngineProcess, api: Api) -> list[chat_pb2.Event]:
    """Ask for an answer of sixty words, kill the engine that writes it, and return what comes from then on."""
    streaming = api.stream(turn("#60 pace=0.01", session="sessions/s"))
    await until_it_streams(streaming)
    await engine.kill()
    await engine.start()
    return await asyncio.wait_for(drained(streaming), 20)


async def test_turns_that_have_not_begun_to_stream_do_not_see_that_the_engine_died(
    killable: tuple[EngineProcess, Api],
) -> None:
    engine, api = killable
    waiting = [asyncio.create_task(api.run(turn("#2 wait=0.5", session=f"sessions/{n}"))) for n in range(8)]
    streaming = api.stream(turn("#30 pace=0.01"))
    await until_it_streams(streaming)  # the others are there by then
    await engine.kill()
    asked_while_away = asyncio.create_task(api.run(turn("hello")))
    await engine.start()
    answers = await asyncio.wait_for(asyncio.gather(*waiting, asked_while_away), 20)

    assert [answer.completed.text for answer in answers] == ["one two"] * 8 + ["You said: hello"]


async def test_an_answer_in_which_the_engine_died_goes_on(killable: tuple[EngineProcess, Api]) -> None:
    engine, api = killable
    events = await killed_in_the_midst(engine, api)

    assert "reset" not in kinds(events)
    completed = events[-1].completed
    assert completed.text.endswith("".join(event.text_delta.text for event in events))
    assert (len(completed.text.split()), completed.usage.output_tokens) == (60, 60)


@FORGETFUL
async def test_an_answer_in_which_the_engine_died_is_begun_anew_and_says_so(
    killable: tuple[EngineProcess, Api],
) -> None:
    engine, api = killable
    events = await killed_in_the_midst(engine, api)

    told = kinds(events)
    reset = told.index("reset")
    written = "".join(event.text_delta.text for event in events[reset:])
    assert told.count("reset") == 1
    assert events[reset].reset.text == ""
    assert "engine" in events[reset].reset.reason
    assert events[-1].completed.text == written
    assert written.startswith("one two three")
    assert len(written.split()) == 60
    again = await api.events(turn("hello", session="sessions/s"), timeout=20)
    assert again[-1].completed.text == "You said: hello"


async def test_an_engine_that_does_not_come_back_leaves_what_it_had_written(
    killable: tuple[EngineProcess, Api], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (remote_engine, remote_generation):
        monkeypatch.setattr(module, "PATIENCE", 0.5)
    engine, api = killable
    streaming = api.stream(turn("#60 pace=0.01"))
    await until_it_streams(streaming)
    await engine.kill()
    events = await asyncio.wait_for(drained(streaming), 20)

    assert "reset" not in kinds(events)
    assert (events[-1].failed.reason, events[-1].failed.retryable) == ("MODEL_UNAVAILABLE", True)


@FORGETFUL
async def test_an_answer_with_which_engines_die_again_and_again_ends(killable: tuple[EngineProcess, Api]) -> None:
    engine, api = killable
    streaming = api.stream(turn("#1000 pace=0.01"))
    for sign in ("text_delta", "reset", "reset"):
        async with asyncio.timeout(20):
            await until_it_streams(streaming, sign)
        await engine.kill()
        await engine.start()
    events = await asyncio.wait_for(drained(streaming), 20)

    assert (events[-1].failed.reason, events[-1].failed.retryable) == ("TURN_INTERRUPTED", True)


async def test_a_question_with_which_engines_die_before_a_word_is_given_up(
    killable: tuple[EngineProcess, Api], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_generation, "MOST_LOSSES", 2)
    engine, api = killable
    asked = asyncio.create_task(api.events(turn("#1 wait=60"), timeout=60))
    for _ in range(8):
        marker = api.stream(turn("#1000 pace=0.01"))
        await until_it_streams(marker)  # the other question is there, too, or soon will be
        await engine.kill()
        await engine.start()
        marker.cancel()
        if (await asyncio.wait({asked}, timeout=0.5))[0]:
            break
    events = await asyncio.wait_for(asked, 20)

    assert (events[-1].failed.reason, events[-1].failed.retryable) == ("MODEL_UNAVAILABLE", True)


async def test_a_cancelled_answer_is_not_begun_anew(killable: tuple[EngineProcess, Api]) -> None:
    engine, api = killable
    streaming = api.stream(turn("#1000 pace=0.01", session="sessions/s"))
    await until_it_streams(streaming)
    await engine.kill()
    assert await api.cancel("sessions/s/turns/1")
    events = await asyncio.wait_for(drained(streaming), 20)
    await engine.start()

    assert events[-1].completed.finish_reason == message_pb2.FINISH_REASON_CANCELLED


async def test_models_that_were_loaded_are_loaded_again_when_the_engine_comes_back(
    killable: tuple[EngineProcess, Api],
) -> None:
    engine, api = killable
    load = model_pb2.LoadModelRequest(name="models/demo", path=str(ARTIFACT))
    await loaded(api, load)
    await engine.kill()
    asked = asyncio.create_task(api.run(turn("Who are you?", model="models/demo")))
    await engine.start()
    answer = await asyncio.wait_for(asked, 20)

    assert answer.completed.model == "models/demo"
    assert "MoltBot" in answer.completed.text


async def test_a_model_that_the_engine_begins_with_is_not_missed_when_it_was_chosen_again(
    killable: tuple[EngineProcess, Api], caplog: pytest.LogCaptureFixture
) -> None:
    engine, api = killable
    own = (await api.models.ListModels(model_pb2.ListModelsRequest(), metadata=api.metadata)).models[0].name
    await loaded(api, model_pb2.LoadModelRequest(name="models/demo", path=str(ARTIFACT)))
    switch = api.models.SwitchModel
    await switch(model_pb2.SwitchModelRequest(name="models/demo"), metadata=api.metadata)
    await api.models.UnloadModel(model_pb2.UnloadModelRequest(name=own), metadata=api.metadata)
    await loaded(api, model_pb2.LoadModelRequest(name=own, path=str(ARTIFACT)))
    await engine.kill()
    await engine.start()
    answer = await api.run(turn("hello", model=own))

    assert answer.completed.model == own
    assert "a model is missing" not in caplog.text


async def test_a_deadline_ends_the_wait_for_an_engine_that_is_away(killable: tuple[EngineProcess, Api]) -> None:
    engine, api = killable
    await engine.kill()
    problem = await refused(api.run(turn("hello"), timeout=0.5))

    assert problem.code() is grpc.StatusCode.DEADLINE_EXCEEDED
