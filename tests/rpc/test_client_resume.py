"""The Python client where the way to the core breaks, or the core itself: nothing is missing, nothing comes twice."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import grpc
import pytest
from breaking_line import breaking_line
from core_process import CoreProcess
from moltbot import Answer, MoltBot, MoltBotClientError
from moltbot.channel import addresses
from moltbot.patience import Budget
from moltbot.v1 import chat_pb2, chat_pb2_grpc
from moltbot_server.testing import RunningServer, running_server
from moltbot_server.workspace import Workspace

NOBODY = "127.0.0.1:1"
KILLS = int(os.environ.get("KILLS", "8"))


@pytest.fixture
async def core(tmp_path: Path) -> AsyncIterator[RunningServer]:
    """A real core with the scripted engine."""
    async with running_server(tmp_path / "workspace", grace=0.2) as server:
        yield server


def shown(events: list[chat_pb2.Event]) -> str:
    """What a reader of these events has been shown in the end, without the help of the last one."""
    answer = Answer()
    for event in events[:-1]:
        answer.add(event)
    return answer.text


async def kept(bot: MoltBot, session: str) -> list[str]:
    """What the core has of a session."""
    return ["".join(part.text for part in message.parts) async for message in bot.messages(session)]


def check_order(events: list[chat_pb2.Event]) -> None:
    """Check that no event came twice, and that the turn began and ended once."""
    numbers = [event.sequence for event in events]
    assert numbers == sorted(set(numbers))
    kinds = [event.WhichOneof("kind") for event in events]
    assert kinds.count("accepted") == kinds.count("completed") == 1
    assert (kinds[0], kinds[-1]) == ("accepted", "completed")


async def test_a_line_that_is_reset_again_and_again_loses_and_repeats_nothing(core: RunningServer) -> None:
    repeats: list[str] = []
    async with breaking_line(core.address) as line, MoltBot(line.address, core.key, on_repeat=repeats.append) as bot:
        events = []
        async for event in bot.stream_turn("#60 pace=0.03", session="s"):
            events.append(event)
            if len(events) in (3, 6, 9, 12):  # text that waited comes as one event, so there are fewer than words
                line.reset()
        assert await kept(bot, "s") == ["#60 pace=0.03", shown(events)]
    check_order(events)
    assert line.carried >= 4
    assert set(repeats) == {"resume"}


async def test_a_line_that_swallows_everything_is_noticed_though_nobody_says_so(core: RunningServer) -> None:
    async with breaking_line(core.address) as line, MoltBot(line.address, core.key) as bot:
        events = []
        async for event in bot.stream_turn("#40 pace=0.01", session="s"):
            events.append(event)
            if len(events) == 5:
                line.swallow()
                began = time.monotonic()
                asyncio.get_running_loop().call_later(2.0, line.heal)
        assert await kept(bot, "s") == ["#40 pace=0.01", shown(events)]
    check_order(events)
    assert time.monotonic() - began < 25


async def test_whole_answers_and_lists_survive_a_line_that_is_reset(core: RunningServer) -> None:
    async with breaking_line(core.address) as line, MoltBot(line.address, core.key) as bot:
        asking = asyncio.create_task(bot.run_turn("#20 pace=0.03", session="s"))
        for _ in range(3):
            await asyncio.sleep(0.15)  # somewhere in the middle of the answer
            line.reset()
        reply = await asking
        line.reset()
        assert await kept(bot, "s") == ["#20 pace=0.03", reply.text]
        line.reset()
        assert [session.name async for session in bot.sessions()] == ["sessions/s"]


async def test_without_resume_a_break_is_told(core: RunningServer) -> None:
    async with breaking_line(core.address) as line, MoltBot(line.address, core.key, resume=False) as bot:
        events = bot.stream_turn("#60 pace=0.01")
        await anext(events)
        line.reset()
        with pytest.raises(MoltBotClientError) as caught:
            _ = [event async for event in events]
    assert caught.value.connection_broke
    async with MoltBot(NOBODY, core.key, resume=False) as bot:
        began = time.monotonic()
        with pytest.raises(MoltBotClientError) as caught:
            await bot.run_turn("Hi")
    assert caught.value.never_reached
    assert time.monotonic() - began < 1


async def test_who_has_heard_from_a_core_waits_for_it_as_long_as_its_patience(core: RunningServer) -> None:
    async with breaking_line(core.address) as line, MoltBot(line.address, core.key, patience=2.0) as bot:
        await bot.run_turn("Hi")
        line.target = NOBODY
        line.reset()
        for within, least, most in ((None, 1.0, 4.0), (0.5, 0.0, 1.0)):
            began = time.monotonic()
            with pytest.raises(MoltBotClientError) as caught:
                _ = [event async for event in bot.stream_turn("Hi", within=within)]
            assert caught.value.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
            assert least < time.monotonic() - began < most


async def test_a_stream_that_is_left_leaves_no_call_and_no_task_behind(core: RunningServer) -> None:
    async with breaking_line(core.address) as line, MoltBot(line.address, core.key) as bot:
        turn, before = "", asyncio.all_tasks()
        async with aclosing(bot.stream_turn("#100 pace=0.01")) as events:
            async for event in events:
                turn = turn or event.accepted.turn
                if event.HasField("text_delta"):
                    break
        await bot.cancel_turn(turn)
        waiting = asyncio.ensure_future(anext(bot.stream_turn("Hi", session="other")))
        line.target = NOBODY
        line.reset()
        await asyncio.wait({waiting}, timeout=0.3)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert asyncio.all_tasks() - before - line.tasks == set()


# --- several addresses ---------------------------------------------------------------------------------------------


def test_a_list_of_addresses_is_told_from_one_that_grpc_knows() -> None:
    assert addresses("a:1, b:2,") == ["a:1", "b:2"]
    assert addresses("[::1]:50051") == ["[::1]:50051"]
    assert addresses("unix:/a,b,unix:/c") == ["unix:/a,b", "unix:/c"]
    for one in ("ipv4:1.2.3.4:1,5.6.7.8:2", "dns:///cores:50051", "unix:/tmp/core"):
        assert addresses(one) == [one]


async def test_of_several_addresses_one_that_answers_is_enough(core: RunningServer) -> None:
    for _ in range(4):  # which one is asked first is drawn by lot
        async with MoltBot(f"{NOBODY},{core.address}", core.key) as bot:
            assert (await bot.run_turn("Hi")).text == "You said: Hi"
            events = [event async for event in bot.stream_turn("Hi")]
            check_order(events)


async def test_a_turn_goes_on_at_another_address_when_the_one_that_it_began_at_is_gone(core: RunningServer) -> None:
    async with (
        breaking_line(core.address) as one,
        breaking_line(core.address) as other,
        MoltBot(f"{one.address},{other.address}", core.key) as bot,
    ):
        events = []
        async for event in bot.stream_turn("#40 pace=0.01"):
            events.append(event)
            if len(events) == 5:
                line = one if one.carried else other
                line.target = NOBODY
                line.reset()
    check_order(events)
    assert one.carried
    assert other.carried


async def test_a_core_that_leaves_is_asked_nothing_while_another_one_serves(tmp_path: Path) -> None:
    one, other = Workspace(folder=tmp_path / "one"), Workspace(folder=tmp_path / "other")
    for workspace in (one, other):
        workspace.create()
    other.key_file.write_text(one.read_key())
    async with (
        running_server(one.folder, grace=0) as core,
        running_server(other.folder, grace=0) as leaving,
        MoltBot(leaving.address, leaving.key) as there,
    ):
        long = there.stream_turn("#1 wait=30")
        await anext(long)
        stopping = asyncio.create_task(leaving.core.stop(5.0))  # for as long as that turn has
        for _ in range(10):
            async with MoltBot(f"{leaving.address},{core.address}", core.key) as bot:
                assert (await bot.run_turn("Hi", within=3)).text == "You said: Hi"
        assert not stopping.done()
        await long.aclose()
        await stopping


class RepeatingCore(chat_pb2_grpc.ChatServiceServicer):
    """A core whose stream breaks in mid-answer, and that then says all events again, whatever was seen."""

    TURN = "sessions/s/turns/1"

    def __init__(self) -> None:
        self.asked_after = 0
        self.events = [
            chat_pb2.Event(sequence=1, accepted=chat_pb2.Accepted(turn=self.TURN)),
            chat_pb2.Event(sequence=2, text_delta=chat_pb2.TextDelta(text="one ")),
            chat_pb2.Event(sequence=3, text_delta=chat_pb2.TextDelta(text="two")),
            chat_pb2.Event(sequence=4, completed=chat_pb2.Completed(text="one two")),
        ]

    async def StreamTurn(  # noqa: N802 (the contract's name)
        self, request: chat_pb2.StreamTurnRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[chat_pb2.StreamTurnResponse]:
        for event in self.events[:2]:
            yield chat_pb2.StreamTurnResponse(event=event)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "broken")

    async def ResumeTurn(  # noqa: N802 (the contract's name)
        self, request: chat_pb2.ResumeTurnRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[chat_pb2.ResumeTurnResponse]:
        self.asked_after = request.after_sequence
        for event in self.events:
            yield chat_pb2.ResumeTurnResponse(event=event)


async def test_events_that_a_core_says_again_are_heard_once() -> None:
    core, server = RepeatingCore(), grpc.aio.server()
    chat_pb2_grpc.add_ChatServiceServicer_to_server(core, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with MoltBot(f"127.0.0.1:{port}", "key") as bot:
            events = [event async for event in bot.stream_turn("Hi")]
    finally:
        await server.stop(None)
    assert core.asked_after == 2
    assert [event.sequence for event in events] == [1, 2, 3, 4]
    assert shown(events) == "one two"


# --- what may be repeated, and when --------------------------------------------------------------------------------


class RefusingCore(chat_pb2_grpc.ChatServiceServicer):
    """A core that refuses the first calls as it is told, then answers."""

    def __init__(self, *refusals: tuple[grpc.StatusCode, dict[str, str]]) -> None:
        self.refusals = list(refusals)
        self.heard: list[float] = []

    async def RunTurn(  # noqa: N802 (the contract's name)
        self, request: chat_pb2.RunTurnRequest, context: grpc.aio.ServicerContext
    ) -> chat_pb2.RunTurnResponse:
        self.heard.append(time.monotonic())
        if self.refusals:
            code, trailers = self.refusals.pop(0)
            await context.abort(code, "not now", tuple(trailers.items()))
        return chat_pb2.RunTurnResponse(completed=chat_pb2.Completed(text="Yes"))


async def asked(core: RefusingCore, **options: float) -> str:
    """Ask a core and return the answer's text, or the name of the status that the call ended with."""
    server = grpc.aio.server()
    chat_pb2_grpc.add_ChatServiceServicer_to_server(core, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with MoltBot(f"127.0.0.1:{port}", "key", **options) as bot:
            return (await bot.run_turn("Hi")).text
    except MoltBotClientError as error:
        return error.code.name
    finally:
        await server.stop(None)


@pytest.mark.parametrize(
    "code", ["INVALID_ARGUMENT", "UNAUTHENTICATED", "NOT_FOUND", "PERMISSION_DENIED", "UNIMPLEMENTED"]
)
async def test_what_does_not_pass_is_told_at_once(code: str) -> None:
    core = RefusingCore((grpc.StatusCode[code], {}))
    assert await asked(core) == code
    assert len(core.heard) == 1


async def test_a_core_that_says_when_to_come_back_is_asked_then_and_not_before() -> None:
    core = RefusingCore((grpc.StatusCode.UNAVAILABLE, {"grpc-retry-pushback-ms": "700"}))
    assert await asked(core) == "Yes"
    assert 0.7 <= core.heard[1] - core.heard[0] < 1.5


async def test_a_core_that_does_not_want_to_be_asked_again_is_not() -> None:
    core = RefusingCore((grpc.StatusCode.UNAVAILABLE, {"grpc-retry-pushback-ms": "-1"}))
    assert await asked(core) == "UNAVAILABLE"
    assert len(core.heard) == 1


async def test_a_call_that_ends_oddly_each_time_is_not_made_for_as_long_as_patience_lasts() -> None:
    core = RefusingCore(*[(grpc.StatusCode.UNKNOWN, {})] * 50)
    assert await asked(core) == "UNKNOWN"
    assert len(core.heard) == 5


async def test_a_core_that_refuses_everything_is_asked_less_and_less() -> None:
    core = RefusingCore(*[(grpc.StatusCode.UNAVAILABLE, {})] * 1000)
    assert await asked(core, patience=4.0) == "UNAVAILABLE"
    assert 4 < len(core.heard) < 30


def test_a_budget_is_used_up_earned_again_and_refills_with_time() -> None:
    budget = Budget(most=3, per_second=10)
    assert [budget.take() for _ in range(5)] == [True, True, True, False, False]
    budget.earn()
    assert [budget.take() for _ in range(2)] == [True, False]
    time.sleep(0.12)
    assert [budget.take() for _ in range(2)] == [True, False]


# --- cores that are killed -----------------------------------------------------------------------------------------


async def test_streams_go_on_when_their_core_is_killed_again_and_again(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    core = await (await CoreProcess.start(tmp_path, "--grpc-port", str(port))).serving()
    key, kills, done = Workspace(folder=tmp_path).read_key(), 0, asyncio.Event()

    async def talk(bot: MoltBot, session: str) -> int:
        turns = 0
        while not done.is_set():
            text = f"#{random.randint(30, 90)} pace=0.02 {session} {turns}"
            if turns % 3 == 2:
                answer = (await bot.run_turn(text, session=session)).text
            else:
                events = [event async for event in bot.stream_turn(text, session=session)]
                check_order(events)
                answer = shown(events)
                assert answer == events[-1].completed.text
            turns += 1
            assert (await kept(bot, session))[-2:] == [text, answer]
        assert len(await kept(bot, session)) == 2 * turns
        return turns

    try:
        async with MoltBot(core.address, key) as bot, asyncio.timeout(240):
            talks = [asyncio.create_task(talk(bot, f"s{number}")) for number in range(6)]
            while kills < KILLS and not any(task.done() for task in talks):
                await asyncio.wait(talks, timeout=random.uniform(0.1, 2.0), return_when=asyncio.FIRST_COMPLETED)
                core.signal(signal.SIGKILL)
                await core.end()
                kills += 1
                core = await (await CoreProcess.start(tmp_path, "--grpc-port", str(port))).serving()
            done.set()
            turns = await asyncio.gather(*talks)
    finally:
        core.process.kill()
        await core.end()
    print(f"kills={kills} turns={sum(turns)}")
    assert min(turns) >= 2
