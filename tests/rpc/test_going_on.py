"""Answers whose core is killed in their midst: their model goes on where they were broken off, or they begin anew."""

from __future__ import annotations

import signal
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest
from core_process import CoreProcess
from moltbot import MoltBot
from moltbot.v1 import chat_pb2, inference_pb2, message_pb2, model_pb2
from moltbot_server.models.engines.scripted import ScriptedEngine
from moltbot_server.testing import running_server
from rpc_calls import Api, fields_of, refused

SLOW = "rules:\n- template: '{text}'\n  pace: 0.05\n"
OTHER = "rules:\n- template: 'anew, {text}'\n"
QUESTION = " ".join(f"word{number}" for number in range(60))


@pytest.fixture
def port() -> int:
    """A port that nobody has."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
async def killed(tmp_path: Path, port: int) -> AsyncIterator[Callable[[str], AsyncIterator[chat_pb2.Event]]]:
    """Asks a core for an answer and kills it in the midst; the next core has another script."""
    cores: list[CoreProcess] = []

    async def start(script: str) -> CoreProcess:
        path = tmp_path / "script.yaml"
        path.write_text(script)
        core = await CoreProcess.start(tmp_path, "--grpc-port", str(port), MODEL_PATH=str(path))
        cores.append(await core.serving())
        return core

    async def ask(script: str) -> AsyncIterator[chat_pb2.Event]:
        core = await start(SLOW)
        async with MoltBot(core.address, core.metadata[0][1].removeprefix("Bearer ")) as bot:
            words = 0
            async for event in bot.stream_turn(QUESTION, session="s", within=60):
                yield event
                words += event.WhichOneof("kind") == "text_delta"
                if words == 5 and len(cores) == 1:
                    core.signal(signal.SIGKILL)
                    await core.end()
                    await start(script)

    yield ask
    for core in cores:
        if core.process.returncode is None:
            core.process.kill()
        await core.end()
        await core.whole_log()


async def test_an_answer_goes_on_where_it_was_when_its_core_was_killed(
    killed: Callable[[str], AsyncIterator[chat_pb2.Event]],
) -> None:
    events = [event async for event in killed(SLOW)]
    kinds = [event.WhichOneof("kind") for event in events]
    assert "reset" not in kinds
    assert "".join(event.text_delta.text for event in events) == QUESTION == events[-1].completed.text
    assert events[-1].completed.usage.output_tokens == 60
    numbers = [event.sequence for event in events]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] > 1_000_000
    told = events[-1].completed.timings
    assert told.generation.ToTimedelta() > told.first_token.ToTimedelta(), "the first text here is no end"


async def test_an_answer_to_which_the_model_has_nothing_to_add_is_given_anew(
    killed: Callable[[str], AsyncIterator[chat_pb2.Event]],
) -> None:
    shown, resets = "", []
    async for event in killed(OTHER):
        if event.HasField("reset"):
            resets.append(shown := event.reset.text)
        shown += event.text_delta.text
    assert resets[-1] == ""
    assert shown == f"anew, {QUESTION}" == event.completed.text


def asked(*texts: str) -> inference_pb2.GenerateRequest:
    roles = (message_pb2.ROLE_USER, message_pb2.ROLE_ASSISTANT)
    messages = [
        message_pb2.Message(role=roles[at % 2], parts=[message_pb2.Part(text=text)]) for at, text in enumerate(texts)
    ]
    return inference_pb2.GenerateRequest(prompt=inference_pb2.Prompt(messages=messages, trim=True))


async def test_an_engine_goes_on_with_an_answer_that_it_is_given(api: Api) -> None:
    pieces = [piece async for piece in api.inference.Generate(asked("#4", "one two"), metadata=api.metadata)]
    assert "".join(piece.text for piece in pieces) == " three four"
    assert pieces[-1].finished.usage.output_tokens == 4
    later = asked("#2", "one two", "#3", "one")
    pieces = [piece async for piece in api.inference.Generate(later, metadata=api.metadata)]
    assert "".join(piece.text for piece in pieces) == " two three"


async def test_a_model_that_does_not_go_on_says_so(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    engine.capabilities = msgspec.structs.replace(engine.capabilities, continuation=False)
    async with running_server(tmp_path, engine=engine) as server:
        api = Api.of(server)
        call = api.inference.Generate(asked("#4", "one two"), metadata=api.metadata)
        error = await refused(call)
        assert fields_of(error) == ["prompt.messages"]
        assert "does not go on" in error.details()
        request = model_pb2.GetModelRequest(name="models/scripted")
        model = (await api.models.GetModel(request, metadata=api.metadata)).model
        await api.channel.close()
    assert not model.capabilities.continuation


async def test_an_answer_without_a_question_is_refused(api: Api) -> None:
    request = asked("#4", "one two")
    del request.prompt.messages[0]
    error = await refused(api.inference.Generate(request, metadata=api.metadata))
    assert fields_of(error) == ["prompt.messages"]
