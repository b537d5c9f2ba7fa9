"""Whether Redis is there, as a store tells whoever runs it."""

from __future__ import annotations

import asyncio
import time

import pytest
from kept_turns import new
from moltbot_server.errors import StorageUnavailable
from moltbot_server.store.redis import RedisStore
from redis_process import RedisProcess


async def test_that_redis_is_away_is_said_once_and_since_when(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "moltbot_server.store.redis_presence")
    redis = RedisProcess()
    await redis.start()
    store = RedisStore(host="127.0.0.1", port=redis.port)
    await store.open()
    try:
        assert store.away is None
        began = time.time()
        await redis.kill()
        with pytest.raises(StorageUnavailable, match="cannot reach its store"):  # both of its connections hear of it
            await store.accept(new())
        with pytest.raises(StorageUnavailable):
            await store.find_turn(new().key)
        away = store.away
        assert away is not None
        assert (away.where, away.problem) == (f"Redis at 127.0.0.1:{redis.port}", "connection refused")
        assert began <= away.since <= time.time()
        await redis.start()
        async with asyncio.timeout(10):
            while store.away is not None:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.01)
    finally:
        await store.close()
        await redis.kill()
    said = [record.message for record in caplog.records if record.name.endswith("redis_presence")]
    assert said == ["Redis is away; turns are refused until it is there again", "Redis is there again"]
