"""Turns followed again: from any place, by any number of readers, whether they run or have ended."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from google.protobuf import duration_pb2
from moltbot.v1 import chat_pb2, message_pb2
from moltbot_server.testing import RunningServer, running_server
from rpc_calls import Api, WatchedEngine, drained, kinds, reason_of, refused, text_of, turn, until

EACH = duration_pb2.Duration()


async def test_a_turn_is_resumed_from_every_place_with_nothing_missed_and_nothing_told_twice(api: Api) -> None:
    whole = await api.events(turn("#12", flush_interval=EACH))
    name = whole[0].accepted.turn

    for place in range(len(whole) + 1):
        assert await api.resumed(name, place) == whole[place:]


async def test_a_running_turn_is_resumed_from_every_place(api: Api) -> None:
    call = api.stream(turn("#30 pace=0.01", flush_interval=EACH))
    name = (await call.read()).event.accepted.turn

    readers = [asyncio.create_task(api.resumed(name, place)) for place in range(36)]
    whole = await api.resumed(name)
    assert [event.sequence for event in whole] == list(range(1, 34))
    for place, reader in enumerate(readers):
        seen = await reader
        assert [event.sequence for event in seen] == list(range(place + 1, 34))
        assert seen == whole[place:]


async def test_a_reader_that_comes_back_again_and_again_reads_the_whole_text_once(api: Api) -> None:
    call = api.stream(turn("#60 pace=0.005"))
    name = (await call.read()).event.accepted.turn
    call.cancel()
    seen: list[chat_pb2.Event] = []
    while not seen or kinds(seen)[-1] != "completed":
        request = chat_pb2.ResumeTurnRequest(name=name, after_sequence=seen[-1].sequence if seen else 0)
        call = api.chat.ResumeTurn(request, metadata=api.metadata)
        async for response in call:
            seen.append(response.event)
            if len(seen) % 3 == 0:
                call.cancel()
                break

    assert text_of(seen) == seen[-1].completed.text
    assert [event.sequence for event in seen] == sorted({event.sequence for event in seen})


async def test_a_turn_goes_on_when_the_one_who_started_it_leaves(api: Api, engine: WatchedEngine) -> None:
    call = api.stream(turn("#10 pace=0.02", session="sessions/s"))
    name = (await call.read()).event.accepted.turn
    call.cancel()

    events = await api.resumed(name)
    assert kinds(events)[-1] == "completed"
    assert len(events[-1].completed.text.split()) == 10
    assert (await api.said("sessions/s"))[1] == events[-1].completed.text


async def test_a_turn_goes_on_when_the_whole_connection_breaks(core: RunningServer, api: Api) -> None:
    other = Api.of(core)
    call = other.stream(turn("#10 pace=0.02"))
    name = (await call.read()).event.accepted.turn
    await other.channel.close()

    assert kinds(await api.resumed(name))[-1] == "completed"


async def test_a_finished_turn_is_resumed_after_a_restart(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        api = Api.of(server)
        whole = await api.events(turn("#7", flush_interval=EACH))
        await api.channel.close()
    async with running_server(tmp_path) as server:
        api = Api.of(server)
        name = whole[0].accepted.turn
        assert [await api.resumed(name, place) for place in range(len(whole))] == [
            whole[place:] for place in range(len(whole))
        ]
        await api.channel.close()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("sessions/nobody/turns/1", "TURN_NOT_FOUND"),
        ("sessions/s/turns/2", "TURN_NOT_FOUND"),
        ("sessions/s/turns/999999999999999999", "TURN_NOT_FOUND"),
        ("", "INVALID_FIELD"),
        ("sessions/s", "INVALID_FIELD"),
        ("sessions/s/turns/0", "INVALID_FIELD"),
        ("sessions/s/turns/-1", "INVALID_FIELD"),
        ("sessions/s/turns/01", "INVALID_FIELD"),
        ("sessions/s/turns/1\n", "INVALID_FIELD"),
        ("sessions/../turns/1/", "INVALID_FIELD"),
        ("sessions/s/turns/" + "9" * 4000, "INVALID_FIELD"),
    ],
)
async def test_a_turn_that_there_is_not_cannot_be_resumed_or_cancelled(api: Api, name: str, reason: str) -> None:
    await api.run(turn(session="sessions/s"))

    resumed = await refused(api.chat.ResumeTurn(chat_pb2.ResumeTurnRequest(name=name), metadata=api.metadata))
    cancelled = await refused(api.chat.CancelTurn(chat_pb2.CancelTurnRequest(name=name), metadata=api.metadata))
    assert (reason_of(resumed), reason_of(cancelled)) == (reason, reason)


async def test_a_negative_place_is_refused_and_one_at_or_beyond_the_end_has_nothing(api: Api) -> None:
    whole = await api.events(turn())
    name, last = whole[0].accepted.turn, whole[-1].sequence
    request = chat_pb2.ResumeTurnRequest(name=name, after_sequence=-1)

    assert reason_of(await refused(api.chat.ResumeTurn(request, metadata=api.metadata))) == "INVALID_FIELD"
    assert await api.resumed(name, last - 1) == whole[-1:]
    assert await api.resumed(name, last) == []
    assert await api.resumed(name, 10**12) == []


async def test_a_place_beyond_the_end_of_a_turn_that_runs_is_silent_until_the_turn_has_ended(api: Api) -> None:
    call = api.stream(turn("#20 pace=0.01"))
    accepted = (await call.read()).event
    assert await api.resumed(accepted.accepted.turn, 10**12) == []
    assert await api.resumed(accepted.accepted.turn, accepted.sequence + 1)
    assert (await api.resumed(accepted.accepted.turn))[-1].HasField("completed")
    call.cancel()


async def test_a_turn_that_nobody_follows_any_more_is_cancelled_if_that_was_asked_for(
    core: RunningServer, api: Api, engine: WatchedEngine
) -> None:
    call = api.stream(turn("#1000 pace=0.01", cancel_on_disconnect=True, session="sessions/s"))
    name = (await call.read()).event.accepted.turn
    second = api.chat.ResumeTurn(chat_pb2.ResumeTurnRequest(name=name), metadata=api.metadata)
    await second.read()
    call.cancel()
    await second.read()
    assert engine.running == 1
    second.cancel()
    await asyncio.wait_for(engine.idle.wait(), 5)

    last = (await api.resumed(name))[-1]
    assert last.completed.finish_reason == message_pb2.FINISH_REASON_CANCELLED
    assert (await api.said("sessions/s"))[1:] == ([last.completed.text] if last.completed.text else [])


async def test_a_slow_reader_gets_what_waited_for_it_as_one_and_misses_nothing(core: RunningServer, api: Api) -> None:
    call = api.stream(turn("#3000"))
    first = await call.read()
    await until(lambda: len(core.core.journal) == 0)
    events = [first.event, *await drained(call)]

    assert text_of(events) == events[-1].completed.text
    assert len(events) < 100


async def test_a_thousand_turns_of_which_many_are_left_leave_nothing_behind(
    core: RunningServer, api: Api, engine: WatchedEngine
) -> None:
    async def speak(number: int) -> None:
        call = api.stream(turn("#6 pace=0.002", session=f"sessions/{number % 50}"))
        if number % 5:
            assert kinds(await drained(call))[-1] == "completed"
            return
        for _ in range(1 + number % 3):
            await call.read()
        call.cancel()

    await api.run(turn())
    before = len(asyncio.all_tasks())
    gate = asyncio.Semaphore(100)

    async def spaced(number: int) -> None:
        async with gate:
            await speak(number)

    await asyncio.gather(*(spaced(number) for number in range(1000)))
    journal, sessions = core.core.journal, core.core.sessions
    await until(lambda: len(journal) == 0 and len(asyncio.all_tasks()) <= before + 1, within=20)

    assert engine.running == 0
    assert len(core.core.pipeline) == 0
    assert all(not session.claims and not session.waiting for session in sessions._open.values())
