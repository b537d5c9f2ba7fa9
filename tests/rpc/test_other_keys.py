"""Installations with different keys on one Redis, as processes: one of them serves, and the next is told what to do."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from core_process import core_process
from moltbot import MoltBot
from moltbot_server.workspace import Workspace
from redis_process import RedisProcess
from rpc_calls import turn


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[RedisProcess]:
    """A Redis that writes down all that it is given."""
    async with RedisProcess.keeping(tmp_path) as process:
        yield process


def named(redis: RedisProcess) -> dict[str, str]:
    """Return the variables of cores on it."""
    return {"MOLTBOT_STORE_TYPE": "redis", "MOLTBOT_STORE_PORT": str(redis.port), "MOLTBOT_DRAIN_GRACE": "1"}


async def test_a_stranger_does_not_start_and_gets_none_of_the_turns_of_a_killed_core(
    tmp_path: Path, redis: RedisProcess
) -> None:
    async with (
        core_process(tmp_path / "home", **named(redis)) as first,
        core_process(tmp_path / "home", **named(redis)) as second,
    ):
        await first.serving()
        other = (await second.serving()).api()
        async with core_process(tmp_path / "stranger", **named(redis)) as stranger:
            assert await stranger.end(30) == 78
            told = await stranger.whole_log()
        for part in ("another key", "copy the file `key`", "store.prefix", f"127.0.0.1:{redis.port}"):
            assert part in told
        assert "Traceback" not in told

        call = other.stream(turn("#60 pace=0.05", session="sessions/s", request_id="r"))
        while not (await call.read()).event.HasField("text_delta"):
            pass
        second.signal(signal.SIGKILL)
        async with MoltBot(first.address, Workspace(folder=first.folder).read_key()) as bot:
            answer = await bot.run_turn("#60 pace=0.05", session="sessions/s", request_id="r")
        assert len(answer.text.split()) == 60
        await other.channel.close()


async def test_of_strangers_that_start_at_the_same_moment_one_serves(tmp_path: Path, redis: RedisProcess) -> None:
    async with (
        core_process(tmp_path / "one", **named(redis)) as one,
        core_process(tmp_path / "other", **named(redis)) as other,
    ):
        ends = [asyncio.create_task(core.process.wait()) for core in (one, other)]
        async with asyncio.timeout(30):
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        (left,) = (core for core in (one, other) if core.process.returncode is not None)
        assert left.process.returncode == 78
        await (one if left is other else other).serving()
        for core in (one, other):
            if core.process.returncode is None:
                core.signal(signal.SIGKILL)
        await asyncio.gather(*ends)


async def test_a_core_with_a_new_key_waits_for_the_lease_of_its_killed_predecessor(
    tmp_path: Path, redis: RedisProcess
) -> None:
    home = Workspace(folder=tmp_path / "home")
    async with core_process(home.folder, **named(redis)) as core:
        await core.serving()
        old = home.read_key()
        core.signal(signal.SIGKILL)
        await core.end()
    home.key_file.unlink()
    async with core_process(home.folder, **named(redis)) as core:
        await core.serving()
        assert home.read_key() != old
        assert any("waiting whether they are gone" in line for line in core.log)
