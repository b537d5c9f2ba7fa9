"""The Python client as an adapter: every answer comes to its place once, whatever breaks."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
from breaking_line import breaking_line
from core_process import CoreProcess
from moltbot import Delivery, MoltBot, MoltBotClientError, Place
from moltbot_server.config_models import Delivering
from moltbot_server.testing import RunningServer, running_server
from moltbot_server.workspace import Workspace


@pytest.fixture
async def core(tmp_path: Path) -> AsyncIterator[RunningServer]:
    """A real core whose leases are short."""
    async with running_server(tmp_path / "workspace", grace=0.2, outbox=Delivering(lease=1.0)) as server:
        yield server


def to(address: str = "T/C/1") -> Place:
    return Place(channel="slack", address=address)


async def test_an_answer_is_received_confirmed_and_gone(core: RunningServer) -> None:
    async with MoltBot(core.address, core.key) as bot, aclosing(bot.deliveries("slack")) as deliveries:
        waiting = asyncio.ensure_future(anext(deliveries))
        reply = await bot.run_turn("Hi", session="s", request_id="event", reply_to=to())
        delivery = await waiting
        assert (delivery.text, delivery.turn, delivery.attempt) == (reply.text, reply.turn, 1)
        assert (delivery.channel, delivery.address, delivery.request_id) == ("slack", "T/C/1", "event")
        assert delivery.failure is None
        assert delivery.attachments == []
        assert await delivery.confirm("m1") == "m1"
        assert await delivery.confirm("m2") == "m1"
        assert await delivery.reject("too late") is False


async def test_a_turn_that_failed_is_received_as_a_failure(core: RunningServer) -> None:
    async with MoltBot(core.address, core.key) as bot, aclosing(bot.deliveries("slack")) as deliveries:
        with pytest.raises(MoltBotClientError):
            await bot.run_turn("#100 pace=0.1", reply_to=to(), within=0.3)
        delivery = await asyncio.wait_for(anext(deliveries), 10)

    assert delivery.completed is None
    assert delivery.failure is not None
    assert (delivery.failure.reason, delivery.text) == ("DEADLINE_EXCEEDED", delivery.failure.message)


async def test_what_is_rejected_comes_again_and_what_is_given_up_does_not(core: RunningServer) -> None:
    async with MoltBot(core.address, core.key) as bot, aclosing(bot.deliveries("slack")) as deliveries:
        await bot.run_turn("Hi", reply_to=to())
        delivery = await anext(deliveries)
        assert await delivery.reject("busy", retry_after=0.05) is False
        again = await asyncio.wait_for(anext(deliveries), 10)
        assert (again.name, again.attempt) == (delivery.name, 2)
        assert await again.reject("gone", permanent=True) is True
        assert await again.reject("gone", permanent=True) is True
        assert await delivery.reject("the attempt before") is False


async def test_a_line_that_breaks_is_mended_and_what_is_in_hand_does_not_come_twice(core: RunningServer) -> None:
    repeats: list[str] = []
    async with (
        breaking_line(core.address) as line,
        MoltBot(line.address, core.key, on_repeat=repeats.append) as bot,
        MoltBot(core.address, core.key) as other,
        aclosing(bot.deliveries("slack")) as deliveries,
    ):
        await other.run_turn("one", reply_to=to("a"))
        first = await anext(deliveries)
        line.reset()
        waiting = asyncio.ensure_future(anext(deliveries))
        await asyncio.sleep(2.0)  # the lease ends, and what is in hand is leased anew
        await other.run_turn("two", reply_to=to("b"))
        second = await asyncio.wait_for(waiting, 10)

        assert (first.address, second.address) == ("a", "b")
        known = first.attempt
        assert known > 1
        assert await first.reject("busy", retry_after=0.0) is False
        third = await asyncio.wait_for(anext(deliveries), 10)
        assert third.name == first.name
        assert third.attempt > known
        await third.confirm()
        await second.confirm()
    assert "receive" in repeats


async def test_what_its_receiver_let_go_of_comes_again(core: RunningServer) -> None:
    async with breaking_line(core.address) as line, MoltBot(line.address, core.key) as bot:
        await bot.run_turn("one", reply_to=to())
        async with aclosing(bot.deliveries("slack")) as deliveries:
            name = (await anext(deliveries)).name
            line.reset()
            again = await asyncio.wait_for(anext(deliveries), 10)

    assert again.name == name
    assert again.attempt > 1


async def test_what_was_rejected_too_late_comes_again_though_it_is_remembered(core: RunningServer) -> None:
    async with (
        breaking_line(core.address) as line,
        MoltBot(line.address, core.key) as bot,
        MoltBot(core.address, core.key) as other,
        aclosing(bot.deliveries("slack")) as deliveries,
    ):
        await other.run_turn("one", reply_to=to())
        first = await anext(deliveries)
        line.swallow()
        line.reset()
        taken = await asyncio.wait_for(anext(other.deliveries("slack")), 10)  # the lease of the silent one has ended
        waiting = asyncio.ensure_future(anext(deliveries))
        line.heal()
        line.reset()
        assert first.attempt < taken.attempt
        assert await first.reject("too late") is False
        assert await taken.reject("not now", retry_after=0.0) is False
        again = await asyncio.wait_for(waiting, 20)

    assert again is not first
    assert again.name == first.name
    assert again.attempt > taken.attempt


async def test_without_a_core_it_gives_up_after_a_while() -> None:
    async with MoltBot("127.0.0.1:1", "key", patience=0.3) as bot, aclosing(bot.deliveries("slack")) as deliveries:
        with pytest.raises(MoltBotClientError) as caught:
            await anext(deliveries)

    assert caught.value.code.name == "UNAVAILABLE"


async def test_a_channel_that_cannot_be_one_is_told_at_once(core: RunningServer) -> None:
    async with MoltBot(core.address, core.key) as bot, aclosing(bot.deliveries("SLACK")) as deliveries:
        with pytest.raises(MoltBotClientError) as caught:
            await anext(deliveries)

    assert list(caught.value.fields) == ["channel"]


async def test_receiving_goes_on_across_cores_that_are_killed(tmp_path: Path) -> None:
    folder, dice, turns = tmp_path / "w", random.Random(7), 30
    posted: dict[str, Delivery] = {}
    core = await (await CoreProcess.start(folder, MOLTBOT_OUTBOX_LEASE="1s")).serving()
    port = core.address.rpartition(":")[2]
    try:
        async with MoltBot(core.address, Workspace(folder=folder).read_key()) as bot:

            async def post() -> None:
                async with aclosing(bot.deliveries("slack", at_once=4)) as deliveries:
                    async for delivery in deliveries:
                        await asyncio.sleep(dice.random() * 0.1)
                        posted.setdefault(delivery.dedupe_key, delivery)
                        await delivery.confirm(f"m{len(posted)}")
                        if len(posted) == turns:
                            return

            async def talk() -> None:
                for number in range(turns):
                    await bot.run_turn(f"say {number}", request_id=f"event {number}", reply_to=to(f"p{number % 3}"))
                    await asyncio.sleep(0.05)

            talking, posting = asyncio.create_task(talk()), asyncio.create_task(post())
            for _ in range(3):
                await asyncio.sleep(0.5)
                core.signal(signal.SIGKILL)
                await core.end()
                core = await (await CoreProcess.start(folder, "--grpc-port", port, MOLTBOT_OUTBOX_LEASE="1s")).serving()
            await asyncio.wait_for(asyncio.gather(talking, posting), 60)
    finally:
        if core.process.returncode is None:
            core.process.kill()
        await core.end()

    assert {delivery.request_id for delivery in posted.values()} == {f"event {number}" for number in range(turns)}
    for place in range(3):
        order = [int(d.request_id.split()[1]) for d in posted.values() if d.address == f"p{place}"]
        assert order == sorted(order)
