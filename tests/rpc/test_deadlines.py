"""A caller's deadline reaches the engine, wherever the turn is by then."""

from __future__ import annotations

import asyncio
import time

import grpc
from google.protobuf import duration_pb2
from grpc import aio
from moltbot.v1 import chat_pb2, inference_pb2, message_pb2
from rpc_calls import Api, WatchedEngine, kinds, reason_of, refused, turn

# Seconds that a busy machine may take for what is due; an answer that is not cut goes on for ten.
SLACK = 1.0


async def test_the_deadline_of_a_unary_call_frees_the_engine_in_time(api: Api, engine: WatchedEngine) -> None:
    asked = time.monotonic()
    error = await refused(api.run(turn("#1000 pace=0.01", request_id="late"), timeout=0.5))
    told = time.monotonic() - asked
    await asyncio.wait_for(engine.idle.wait(), 2)

    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert 0.45 <= told < 0.5 + SLACK
    assert engine.let_go_at - asked < 0.5 + SLACK


async def test_the_deadline_of_a_stream_frees_the_engine_and_the_turn_says_why_it_ended(
    api: Api, engine: WatchedEngine
) -> None:
    asked = time.monotonic()
    call = api.stream(turn("#1000 pace=0.01"), timeout=0.4)
    name = (await call.read()).event.accepted.turn
    told: list[chat_pb2.Event] = []
    # Client and core each have a clock: whichever is first ends the stream, by the status or by the last event.
    try:
        while (response := await call.read()) is not aio.EOF:
            told.append(response.event)
    except aio.AioRpcError as error:
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # noqa: PT017
    else:
        assert kinds(told)[-1] == "failed"
    await asyncio.wait_for(engine.idle.wait(), 5)

    assert engine.let_go_at - asked < 0.4 + SLACK
    events = await api.resumed(name)
    assert kinds(events)[-1] == "failed"
    failed = events[-1].failed
    assert (failed.code, failed.reason, failed.retryable) == (4, "DEADLINE_EXCEEDED", True)


async def test_the_deadline_passes_while_the_model_says_nothing(api: Api, engine: WatchedEngine) -> None:
    asked = time.monotonic()
    await refused(api.run(turn("#1 wait=30"), timeout=0.3))
    await asyncio.wait_for(engine.idle.wait(), 2)

    assert engine.let_go_at - asked < 0.3 + SLACK


async def test_the_deadline_passes_while_the_turn_waits_for_another(api: Api, engine: WatchedEngine) -> None:
    first = api.stream(turn("#200 pace=0.01", session="sessions/s"))
    await first.read()
    error = await refused(api.run(turn("second", session="sessions/s"), timeout=0.3))
    third = asyncio.create_task(api.events(turn("third", session="sessions/s")))

    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    # The core's clock may be a moment behind the client's.
    assert (await api.resumed("sessions/s/turns/2"))[-1].failed.reason == "DEADLINE_EXCEEDED"
    assert await api.cancel("sessions/s/turns/1")
    assert kinds(await third)[-1] == "completed"
    assert [read[-1] for read in engine.read] == ["#200 pace=0.01", "third"]


async def test_a_turn_that_ran_out_of_time_is_started_again_with_the_same_request_id(api: Api) -> None:
    await refused(api.run(turn("#40 pace=0.01", request_id="late", session="sessions/s"), timeout=0.1))
    answer = await api.run(turn("#40 pace=0.01", request_id="late", session="sessions/s"), timeout=10)

    assert len(answer.completed.text.split()) == 40
    assert await api.said("sessions/s") == ["#40 pace=0.01", answer.completed.text]


async def test_a_turn_with_time_enough_is_not_disturbed_by_its_deadline(api: Api) -> None:
    answer = await api.run(turn("#5 pace=0.01"), timeout=0.3)
    await asyncio.sleep(0.4)

    assert kinds(await api.resumed(answer.turn))[-1] == "completed"


async def test_the_deadline_of_a_bare_generation_frees_the_engine(api: Api, engine: WatchedEngine) -> None:
    for text in ("#1 wait=30", "#1000 pace=0.01"):
        asked = time.monotonic()
        message = message_pb2.Message(role=message_pb2.ROLE_USER, parts=[message_pb2.Part(text=text)])
        request = inference_pb2.GenerateRequest(prompt=inference_pb2.Prompt(messages=[message]))
        error = await refused(api.inference.Generate(request, metadata=api.metadata, timeout=0.3))
        await asyncio.wait_for(engine.idle.wait(), 2)

        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert engine.let_go_at - asked < 0.3 + SLACK


async def test_a_flush_interval_is_bounded(api: Api) -> None:
    for bad in (duration_pb2.Duration(seconds=11), duration_pb2.Duration(seconds=-1), duration_pb2.Duration(nanos=-1)):
        assert reason_of(await refused(api.run(turn(flush_interval=bad)))) == "INVALID_FIELD"


async def test_a_follower_with_more_time_keeps_a_turn_going(api: Api) -> None:
    first = asyncio.ensure_future(refused(api.run(turn("#20 pace=0.05", request_id="shared"), timeout=0.4)))
    await asyncio.sleep(0.1)
    patient = await api.run(turn("#20 pace=0.05", request_id="shared"), timeout=10)

    assert (await first).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert patient.completed.usage.output_tokens == 20


async def test_a_repeat_at_once_after_the_deadline_gets_its_answer_each_time(api: Api) -> None:
    for number in range(30):
        again = turn("#8 pace=0.01", request_id=f"hasty-{number}")
        await refused(api.run(again, timeout=0.03))
        assert (await api.run(again, timeout=10)).completed.usage.output_tokens == 8
