"""Cores that are told to leave while their store hangs: they go, and their turns are carried on by the next one."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from core_process import core_process
from moltbot import MoltBot
from redis_process import RedisProcess
from rpc_calls import turn

GRACE = 3.0
AFTER = 10.0
"""Seconds beyond its grace in which a core is gone, on a machine that has much else to do."""


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[RedisProcess]:
    """A Redis that writes down all that it is given."""
    async with RedisProcess.keeping(tmp_path) as process:
        yield process


@pytest.mark.parametrize("words", [0, 40, 2000], ids=["idle", "turns that end meanwhile", "turns that go on"])
async def test_a_core_leaves_soon_after_its_grace_although_redis_hangs_and_the_next_one_has_its_turns(
    tmp_path: Path, redis: RedisProcess, words: int
) -> None:
    environ = {"MOLTBOT_STORE_TYPE": "redis", "MOLTBOT_STORE_PORT": str(redis.port)}
    environ["MOLTBOT_DRAIN_GRACE"] = str(GRACE)
    texts = [f"#{words} pace=0.05"] * (3 if words else 0)
    async with core_process(tmp_path / "home", **environ) as core:
        api = (await core.serving()).api()
        calls = [
            api.stream(turn(text, session=f"sessions/s{number}", request_id=f"r{number}"))
            for number, text in enumerate(texts)
        ]
        for call in calls:
            while not (await call.read()).event.HasField("text_delta"):
                pass
        redis.hang()
        await asyncio.sleep(0.3)  # what is written meanwhile finds Redis hanging
        core.signal(signal.SIGTERM)
        told = time.monotonic()
        assert await core.end(60) == 0
        assert time.monotonic() - told < GRACE + AFTER
        log = await core.whole_log()
        assert "Traceback" not in log
        assert "others take this node's turns over when its lease has ended" in log
        assert ("the next core carries them on" in log) is (words == 40)
        await api.channel.close()
    redis.go_on()
    if words == 40:
        async with (
            core_process(tmp_path / "home", **environ) as core,
            MoltBot((await core.serving()).address, core.metadata[0][1].removeprefix("Bearer ")) as bot,
        ):
            for number, text in enumerate(texts):
                end = await bot.run_turn(text, session=f"s{number}", request_id=f"r{number}", within=30)
                assert len(end.text.split()) == words
