"""A Redis that becomes a replica while a core runs."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from kept_turns import new
from moltbot_server.errors import StorageUnavailable
from moltbot_server.store.redis import RedisStore
from redis.asyncio import Redis
from redis_process import RedisProcess


async def test_a_redis_that_has_become_a_replica_is_named_as_one_until_it_takes_writes_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with RedisProcess.keeping(tmp_path) as redis:
        store = RedisStore(host="127.0.0.1", port=redis.port)
        await store.open()
        async with Redis(host="127.0.0.1", port=redis.port, protocol=2) as client:
            await client.execute_command("REPLICAOF", "127.0.0.1", "1")
            for ordinal in (1, 2):
                with pytest.raises(StorageUnavailable) as told:
                    await store.accept(new(ordinal=ordinal))
                assert told.value.retry_after
            assert store.away is not None
            assert "a replica, which takes no writes (READONLY): name the one that it copies" in store.away.problem
            await client.execute_command("REPLICAOF", "NO", "ONE")
            async with asyncio.timeout(20):
                while store.away is not None:  # noqa: ASYNC110 - nothing tells
                    await asyncio.sleep(0.01)
            assert await store.accept(new()) is None
        await store.close()
    lines = [record.getMessage() for record in caplog.records if "Redis is" in record.getMessage()]
    assert lines == ["Redis is away; turns are refused until it is there again", "Redis is there again"]
