"""The engine role by itself: pieces, their end, their count, and how a generation is stopped."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2
from grpc import aio
from moltbot.v1 import inference_pb2, message_pb2
from moltbot_server.errors import ContextLengthExceeded
from moltbot_server.models.engine import NOBODY, Asker, Generation, Listener
from moltbot_server.testing import Rule, RunningServer, Script, running_server
from moltbot_server.turns import GenerationOptions, Message
from rpc_calls import Api, WatchedEngine, fields_of, reason_of, refused, until

EACH = duration_pb2.Duration()


def message(text: str, role: message_pb2.Role.ValueType = message_pb2.ROLE_USER) -> message_pb2.Message:
    return message_pb2.Message(role=role, parts=[message_pb2.Part(text=text)])


def asked(*texts: str, **fields: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        prompt=inference_pb2.Prompt(messages=[message(text) for text in texts]), **fields
    )


async def generated(api: Api, request: inference_pb2.GenerateRequest) -> list[inference_pb2.GenerateResponse]:
    return [response async for response in api.inference.Generate(request, metadata=api.metadata)]


async def test_a_generation_ends_with_what_it_took(api: Api, core: RunningServer) -> None:
    pieces = await generated(api, asked("#20 pace=0.001", flush_interval=EACH))

    finished = pieces[-1].finished
    assert [piece.HasField("finished") for piece in pieces] == [False] * 20 + [True]
    assert "".join(piece.text for piece in pieces).split()[:3] == ["one", "two", "three"]
    assert sum(piece.token_count for piece in pieces) == finished.usage.output_tokens == 20
    assert finished.usage.input_tokens > 0
    assert finished.finish_reason == message_pb2.FINISH_REASON_STOP
    assert finished.model == "models/scripted"
    assert len(core.core.journal) == 0


async def test_pieces_that_come_close_together_are_written_together(api: Api) -> None:
    pieces = await generated(api, asked("#500"))

    assert len(pieces) < 20
    assert len("".join(piece.text for piece in pieces).split()) == 500
    assert sum(piece.token_count for piece in pieces) == 500


@pytest.fixture
def engine() -> WatchedEngine:
    """Answers `pause` with two pieces close together and the end much later; everything else as ever."""
    return WatchedEngine(Script(rules=(Rule(match="^slow$", deltas=("a", "b", "c"), pace=0.3),)))


async def test_no_piece_waits_longer_than_the_flush_interval(api: Api) -> None:
    call = api.inference.Generate(asked("slow"), metadata=api.metadata)
    began = time.monotonic()
    times = []
    while (response := await call.read()) is not aio.EOF:
        times.append((response.text, time.monotonic() - began))

    assert [text for text, _ in times] == ["a", "b", "c"]  # the last one comes with the end
    assert times[0][1] < 0.25
    assert times[1][1] < 0.55


class ShortEngine(WatchedEngine):
    """Reads conversations of up to three messages."""

    def begin(
        self, messages: Sequence[Message], options: GenerationOptions, listener: Listener, asker: Asker = NOBODY
    ) -> Generation:
        """Refuse what is longer."""
        if len(messages) > 3:
            raise ContextLengthExceeded("messages", f"takes {len(messages)} of the model's 3 tokens")
        return super().begin(messages, options, listener, asker)


async def test_a_refused_prompt_is_blamed_by_the_field_that_the_caller_sent(tmp_path: Path) -> None:
    async with running_server(tmp_path, engine=ShortEngine()) as server:
        api = Api.of(server)
        long = await refused(generated(api, asked("a", "b", "c", "d")))
        picture = message_pb2.Part(image=message_pb2.Media(data=b"x", media_type="image/png"))
        request = asked("a", "b")
        request.prompt.messages[1].parts.append(picture)
        unread = await refused(generated(api, request))
        await api.channel.close()

    assert (reason_of(long), fields_of(long)) == ("CONTEXT_LENGTH_EXCEEDED", ["prompt.messages"])
    assert (reason_of(unread), fields_of(unread)) == ("UNSUPPORTED_CONTENT", ["prompt.messages[1].parts[1]"])


async def test_a_generation_is_aborted_by_its_name(api: Api, engine: WatchedEngine) -> None:
    call = api.inference.Generate(asked("#1000 pace=0.01", request_id="mine"), metadata=api.metadata)
    await call.read()
    again = await refused(generated(api, asked("#1", request_id="mine")))
    request = inference_pb2.AbortRequest(request_id="mine")
    answer = await api.inference.Abort(request, metadata=api.metadata)
    rest = []
    while (response := await call.read()) is not aio.EOF:
        rest.append(response)

    assert reason_of(again) == "INVALID_FIELD"
    assert answer.aborted is True
    assert rest[-1].finished.finish_reason == message_pb2.FINISH_REASON_CANCELLED
    assert engine.running == 0
    assert (await api.inference.Abort(request, metadata=api.metadata)).aborted is False
    assert reason_of(await refused(api.inference.Abort(inference_pb2.AbortRequest(), metadata=api.metadata)))


async def test_a_generation_is_aborted_before_its_first_word(api: Api, engine: WatchedEngine) -> None:
    call = asyncio.create_task(generated(api, asked("#1 wait=30", request_id="mine")))
    await asyncio.wait_for(engine.began.wait(), 2)
    await api.inference.Abort(inference_pb2.AbortRequest(request_id="mine"), metadata=api.metadata)

    pieces = await asyncio.wait_for(call, 2)
    assert [piece.finished.finish_reason for piece in pieces] == [message_pb2.FINISH_REASON_CANCELLED]


async def test_a_caller_that_leaves_frees_the_engine_and_troubles_nobody(
    api: Api, engine: WatchedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="moltbot_server"):
        for text in ("#1 wait=30", "#1000 pace=0.01"):
            call = api.inference.Generate(asked(text), metadata=api.metadata)
            await until(lambda: engine.running == 1)
            call.cancel()
            await asyncio.wait_for(engine.idle.wait(), 2)

    assert [record for record in caplog.records if record.name.startswith("moltbot_server")] == []


async def test_a_generation_that_fails_is_an_error_status(api: Api) -> None:
    error = await refused(api.inference.Generate(asked("#9 fail=3:QUEUE_FULL"), metadata=api.metadata))

    assert (error.code(), reason_of(error)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (inference_pb2.GenerateRequest(), "INVALID_FIELD"),
        (asked("x", model="models/other"), "MODEL_NOT_FOUND"),
        (asked("x", model="other"), "INVALID_FIELD"),
        (asked("x", flush_interval=duration_pb2.Duration(seconds=11)), "INVALID_FIELD"),
        (asked("x", options=message_pb2.GenerationOptions(temperature=3)), "INVALID_FIELD"),
        (asked("x", options=message_pb2.GenerationOptions(temperature=float("nan"))), "INVALID_FIELD"),
        (asked("x", options=message_pb2.GenerationOptions(max_output_tokens=0)), "INVALID_FIELD"),
        (asked("x", options=message_pb2.GenerationOptions(stop=["a"] * 9)), "INVALID_FIELD"),
        (asked("x", options=message_pb2.GenerationOptions(stop=[""])), "INVALID_FIELD"),
        (
            inference_pb2.GenerateRequest(
                prompt=inference_pb2.Prompt(messages=[message("x", message_pb2.ROLE_ASSISTANT)])
            ),
            "INVALID_FIELD",
        ),
        (
            inference_pb2.GenerateRequest(
                prompt=inference_pb2.Prompt(messages=[message("x", message_pb2.ROLE_UNSPECIFIED)])
            ),
            "INVALID_FIELD",
        ),
        (
            inference_pb2.GenerateRequest(
                prompt=inference_pb2.Prompt(
                    messages=[
                        message_pb2.Message(
                            role=message_pb2.ROLE_USER,
                            parts=[message_pb2.Part(image=message_pb2.Media(uri="https://example.com/a.png"))],
                        )
                    ]
                )
            ),
            "UNSUPPORTED_CONTENT",
        ),
    ],
)
async def test_a_request_that_cannot_be_answered_is_refused_at_once(
    api: Api, request_: inference_pb2.GenerateRequest, reason: str
) -> None:
    error = await refused(api.inference.Generate(request_, metadata=api.metadata))

    assert reason_of(error) == reason


async def test_tokens_of_texts_and_of_conversations_are_counted(api: Api) -> None:
    async def count(**fields: Any) -> int:
        request = inference_pb2.CountTokensRequest(**fields)
        return int((await api.inference.CountTokens(request, metadata=api.metadata)).token_count)

    assert await count(text="") == 0
    assert await count(text="12345678") == 2
    assert await count(prompt=inference_pb2.Prompt(messages=[message("1234"), message("5678")])) == 4
    assert reason_of(await refused(count())) == "INVALID_FIELD"


async def test_the_limits_of_an_answer_are_kept(api: Api) -> None:
    limited = await generated(api, asked("#20", options=message_pb2.GenerationOptions(max_output_tokens=3)))
    stopped = await generated(api, asked("#20", options=message_pb2.GenerationOptions(stop=["four"])))

    assert "".join(piece.text for piece in limited) == "one two three"
    assert limited[-1].finished.finish_reason == message_pb2.FINISH_REASON_LENGTH
    assert "".join(piece.text for piece in stopped) == "one two three "
    assert stopped[-1].finished.finish_reason == message_pb2.FINISH_REASON_STOP_TEXT
