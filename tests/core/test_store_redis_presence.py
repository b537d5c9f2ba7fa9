"""Whether Redis is there and takes writes, as a store tells whoever runs it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from kept_turns import everything, keep, key, new, texts
from moltbot_server.errors import StorageFull, StorageUnavailable
from moltbot_server.store.redis import RedisStore
from redis.asyncio import Redis
from redis_process import RedisProcess

BEGINS = (logging.ERROR, "Redis takes no writes; turns are refused until it does again")
ENDS = (logging.INFO, "Redis takes writes again")


@pytest.fixture
async def redis(caplog: pytest.LogCaptureFixture) -> AsyncIterator[RedisProcess]:
    """A Redis of the test's own."""
    caplog.set_level("INFO", "moltbot_server.store")
    async with RedisProcess() as process:
        yield process


@pytest.fixture
async def store(redis: RedisProcess) -> AsyncIterator[RedisStore]:
    """An open store in it, whose lease is renewed often."""
    store = RedisStore(host="127.0.0.1", port=redis.port, lease=0.5)
    await store.open()
    yield store
    await store.close()


@pytest.fixture
async def client(redis: RedisProcess) -> AsyncIterator[Redis]:
    """A client that changes how it is set."""
    async with Redis(host="127.0.0.1", port=redis.port, protocol=2) as client:
        yield client


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    """Return what the store has logged since it was opened, but of its lease."""
    names = ("moltbot_server.store.redis_line", "moltbot_server.store.redis_presence")
    return [(record.levelno, record.message) for record in caplog.records if record.name in names]


async def until(store: RedisStore, *, away: bool) -> None:
    """Wait until the store is away, or is not."""
    async with asyncio.timeout(20):
        while (store.away is not None) is not away:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.01)


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


async def test_a_full_memory_is_said_once_and_since_when_and_that_there_is_room_again_without_a_turn(
    redis: RedisProcess, store: RedisStore, client: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    await keep(store, new())
    assert store.away is None
    began = time.time()
    await client.config_set("maxmemory", "1mb")
    for number in range(3):
        with pytest.raises(StorageFull):
            await store.accept(new(session=f"s{number}"))
    away = store.away
    assert away is not None
    problem = "its memory is used up, so it takes no writes (OOM): raise its maxmemory, or make room in it"
    assert (away.where, away.problem) == (f"Redis at 127.0.0.1:{redis.port}", problem)
    assert began <= away.since <= time.time()
    assert len(await texts(store)) == 2
    await asyncio.sleep(2.5)  # it is looked at each second, and the lease is renewed all the time
    assert store.away is away

    await client.config_set("maxmemory", "0")
    await until(store, away=False)
    await keep(store, new(session="after"))
    assert store.away is None
    assert said(caplog) == [BEGINS, ENDS]
    assert [key async for key in client.scan_iter("*probe*")] == []


async def test_sessions_are_deleted_reset_and_pruned_while_the_memory_is_full(store: RedisStore, client: Redis) -> None:
    for session in ("deleted", "reset", "pruned", "kept"):
        await keep(store, new(session=session))
    await client.config_set("maxmemory", "1mb")
    with pytest.raises(StorageFull):
        await store.accept(new(session="new"))
    assert await store.delete_session(key("deleted")) is True
    assert await store.delete_session(key("never")) is False
    await store.reset_session(key("reset"))
    used = await store.get_session(key("kept"))
    assert used is not None
    assert await store.prune(used.update_time, ephemeral=False) == 2
    assert await everything(store) == ["kept"]
    await client.config_set("maxmemory", "0")
    await until(store, away=False)
    await keep(store, new(session="kept", ordinal=2))


async def test_a_full_memory_is_found_out_before_anybody_asks(store: RedisStore, client: Redis) -> None:
    await client.config_set("maxmemory", "1mb")
    await until(store, away=True)
    await client.config_set("maxmemory", "0")
    await until(store, away=False)


async def test_a_redis_that_misses_its_replicas_takes_no_writes(
    store: RedisStore, client: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    await client.config_set("min-replicas-to-write", "1")
    with pytest.raises(StorageUnavailable) as told:
        await store.accept(new())
    assert told.value.retry_after
    assert store.away is not None
    assert "(NOREPLICAS)" in store.away.problem
    await client.config_set("min-replicas-to-write", "0")
    await until(store, away=False)
    assert said(caplog) == [BEGINS, ENDS]


async def test_a_redis_that_cannot_save_takes_no_writes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "moltbot_server.store")
    folder = tmp_path / "redis"
    folder.mkdir()
    async with (
        RedisProcess("", "--dir", str(folder)) as redis,
        Redis(host="127.0.0.1", port=redis.port, protocol=2) as client,
    ):
        store = RedisStore(host="127.0.0.1", port=redis.port)
        await store.open()
        folder.rmdir()
        await client.config_set("save", "3600 1")
        await client.bgsave()
        async with asyncio.timeout(20):
            while (await client.info("persistence"))["rdb_last_bgsave_status"] != "err":  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.01)
        with pytest.raises(StorageUnavailable) as told:
            await store.accept(new())
        assert told.value.retry_after
        assert store.away is not None
        assert "(MISCONF)" in store.away.problem
        await client.config_set("save", "")
        await until(store, away=False)
        await store.close()
    assert said(caplog) == [BEGINS, ENDS]


async def test_a_refusal_that_is_a_commands_own_fault_says_nothing_of_redis(
    store: RedisStore, client: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    await client.set("text", "of the wrong kind")
    with pytest.raises(StorageUnavailable):
        await store.write(("SADD", "text", "one"))
    assert store.away is None
    assert said(caplog) == [(logging.ERROR, "Redis refused a command")]


async def test_a_redis_that_goes_away_while_it_takes_no_writes_is_away_until_it_takes_them(
    redis: RedisProcess, store: RedisStore, client: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    await client.config_set("maxmemory", "1mb")
    await until(store, away=True)
    await redis.kill()
    with pytest.raises(StorageUnavailable, match="cannot reach its store"):
        await store.accept(new())
    assert store.away is not None
    assert store.away.problem == "connection refused"
    await redis.start()
    await until(store, away=False)
    assert await store.accept(new()) is None
    assert sorted(said(caplog)) == sorted(
        [
            BEGINS,
            (logging.WARNING, "Redis is away; turns are refused until it is there again"),
            (logging.INFO, "Redis is there again"),
            ENDS,
        ]
    )


async def test_a_store_whose_redis_takes_no_writes_is_closed_at_once_and_leaves_nothing_behind(
    redis: RedisProcess, client: Redis
) -> None:
    await client.ping()
    before = asyncio.all_tasks()
    store = RedisStore(host="127.0.0.1", port=redis.port, lease=0.5)
    await store.open()
    await client.config_set("maxmemory", "1mb")
    await until(store, away=True)
    began = time.monotonic()
    await store.close()
    assert time.monotonic() - began < 1
    assert asyncio.all_tasks() == before
    assert store._probe._timer is None
