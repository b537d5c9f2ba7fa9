"""Turns ended by their callers: what was said stays, the engine is free, the next turn comes at once."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from google.protobuf import duration_pb2
from moltbot.v1 import message_pb2
from moltbot_server.testing import RunningServer, running_server
from moltbot_server.turns import Completed, Principal, TextPart, TurnInput
from rpc_calls import Api, WatchedEngine, drained, kinds, text_of, turn

EACH = duration_pb2.Duration()


async def test_a_cancelled_turn_keeps_its_text_and_frees_the_engine_at_once(api: Api, engine: WatchedEngine) -> None:
    call = api.stream(turn("#1000 pace=0.01", session="sessions/s", flush_interval=EACH))
    events = [(await call.read()).event for _ in range(7)]
    asked = time.monotonic()
    assert await api.cancel(events[0].accepted.turn) is True
    events += await drained(call)

    completed = events[-1].completed
    assert kinds(events).count("completed") == 1
    assert completed.finish_reason == message_pb2.FINISH_REASON_CANCELLED
    assert completed.text == text_of(events)
    assert completed.usage.output_tokens == len(completed.text.split())
    assert engine.running == 0
    assert engine.let_go_at - asked < 0.2
    assert await api.said("sessions/s") == ["#1000 pace=0.01", completed.text]


async def test_a_cancelled_answer_names_the_model_that_wrote_it(api: Api) -> None:
    call = api.stream(turn("#1000 pace=0.01", session="sessions/s"))
    accepted, *_ = [(await call.read()).event.accepted for _ in range(3)]
    await api.cancel(accepted.turn)

    assert (await drained(call))[-1].completed.model == (await api.messages("sessions/s"))[1].model == "models/scripted"


async def test_a_turn_is_cancelled_once(api: Api) -> None:
    call = api.stream(turn("#1000 pace=0.01"))
    name = (await call.read()).event.accepted.turn

    answers = await asyncio.gather(*(api.cancel(name) for _ in range(5)))
    assert sorted(answers) == [False] * 4 + [True]
    assert await api.cancel(name) is False
    ended = (await api.run(turn())).turn
    assert await api.cancel(ended) is False


async def test_a_turn_that_waits_for_its_session_is_cancelled_before_the_one_that_runs(
    api: Api, engine: WatchedEngine
) -> None:
    first = api.stream(turn("#100 pace=0.01", session="sessions/s"))
    await first.read()
    second = api.stream(turn("second", session="sessions/s"))
    name = (await second.read()).event.accepted.turn
    third = api.stream(turn("third", session="sessions/s"))
    waiting = [(await third.read()).event for _ in range(2)]

    assert await api.cancel(name) is True
    events = await drained(second)
    assert kinds(events)[-1] == "completed"
    assert events[-1].completed.finish_reason == message_pb2.FINISH_REASON_CANCELLED
    assert len(engine.read) == 1
    assert await api.cancel("sessions/s/turns/1") is True
    places = [
        event.queued.position for event in [*waiting, *await drained(third)] if event.WhichOneof("kind") == "queued"
    ]
    assert places == [2, 1]
    assert len(engine.read) == 2


async def test_a_turn_cancelled_before_its_first_step_ends_for_all_who_follow_it(core: RunningServer) -> None:
    caller = Principal(workspace="default", key_id="", role="owner")
    spoken = TurnInput(parts=(TextPart(text="#10 pace=0.1"),), session="s")
    live = await core.core.pipeline.start(caller, spoken, deadline=None, arrived=time.perf_counter())
    assert live.cancel() is True  # type: ignore[union-attr]

    ending = await asyncio.wait_for(live.outcome(), 2)  # type: ignore[union-attr]
    assert isinstance(ending, Completed)
    after = await core.core.pipeline.start(caller, spoken, deadline=None, arrived=time.perf_counter())
    assert after.cancel() is True  # type: ignore[union-attr]
    await asyncio.wait_for(after.outcome(), 2)  # type: ignore[union-attr]


async def test_a_turn_whose_deadline_has_passed_before_its_first_step_ends(core: RunningServer) -> None:
    caller = Principal(workspace="default", key_id="", role="owner")
    spoken = TurnInput(parts=(TextPart(text="#10 pace=0.1"),))
    now = asyncio.get_running_loop().time()
    live = await core.core.pipeline.start(caller, spoken, deadline=now - 1, arrived=time.perf_counter())

    ending = await asyncio.wait_for(live.outcome(), 2)  # type: ignore[union-attr]
    assert ending.reason == "DEADLINE_EXCEEDED"  # type: ignore[union-attr]


async def test_turns_cancelled_while_others_end_never_hang(api: Api, core: RunningServer) -> None:
    async def spoken(number: int) -> str:
        call = api.stream(turn("#2 pace=0.002", session=f"sessions/{number % 4}"))
        name = (await call.read()).event.accepted.turn
        if number % 3 == 0:
            await api.cancel(name)
        return kinds(await drained(call))[-1]

    ends = await asyncio.wait_for(asyncio.gather(*(spoken(number) for number in range(200))), 30)
    assert set(ends) == {"completed"}


async def test_the_text_of_a_cancelled_turn_is_part_of_the_history(tmp_path: Path) -> None:
    engine = WatchedEngine()
    async with running_server(tmp_path, engine=engine) as server:
        api = Api.of(server)
        call = api.stream(turn("#500 pace=0.01", session="sessions/s", flush_interval=EACH))
        events = [(await call.read()).event for _ in range(5)]
        await api.cancel(events[0].accepted.turn)
        said = (await drained(call))[-1].completed.text
        await api.run(turn("next", session="sessions/s"))
        await api.channel.close()

    assert engine.read[-1] == ["#500 pace=0.01", said, "next"]
