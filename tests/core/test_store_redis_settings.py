"""How a Redis has to be set, so that it can be the store."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from kept_turns import keep, new
from moltbot_server.errors import MoltBotError, StorageUnavailable
from moltbot_server.store.redis import RedisStore
from moltbot_server.testing import free_port
from redis.asyncio import Redis
from redis_process import RedisProcess


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--maxmemory-policy", "allkeys-lru"), "set maxmemory-policy noeviction"),
        # Its nodes speak at a port of their own, which by itself would be any that somebody else may have.
        (("--cluster-enabled", "yes", "--cluster-port", str(free_port())), "a node of a cluster"),
        (("--requirepass", "secret"), "set store.password"),
        (("--replicaof", "127.0.0.1", "1"), "replica"),
    ],
)
async def test_a_redis_that_would_lose_turns_is_refused_with_what_to_change(
    options: tuple[str, ...], text: str, tmp_path: Path
) -> None:
    process = RedisProcess("", "--dir", str(tmp_path), *options)
    await process.start()
    try:
        with pytest.raises(StorageUnavailable, match=text) as caught:
            await RedisStore(host="127.0.0.1", port=process.port).open()
        assert f"127.0.0.1:{process.port}" in caught.value.message
    finally:
        await process.kill()


@pytest.mark.parametrize(
    ("options", "level", "told"),
    [
        ((), "WARNING", "all is lost when it stops: set appendonly yes and appendfsync always"),
        (("--appendonly", "yes", "--appendfsync", "no"), "WARNING", "half a minute is lost"),
        (("--appendonly", "yes", "--appendfsync", "everysec"), "INFO", "a second is lost with a power failure"),
    ],
)
async def test_a_redis_that_keeps_little_is_warned_of(
    options: tuple[str, ...], level: str, told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "moltbot_server.store")
    process = RedisProcess("secret", "--dir", str(tmp_path), *options)
    await process.start()
    store = RedisStore(host="127.0.0.1", port=process.port, password="secret")
    await store.open()
    await keep(store, new())
    await store.close()
    await process.kill()

    (record,) = [record for record in caplog.records if record.message == "Redis may lose turns"]
    assert record.levelname == level
    assert told in getattr(record, "problem", "")


async def test_a_redis_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moltbot_server.store.redis._START", 0.2)
    with pytest.raises(MoltBotError, match=r"Redis at 127\.0\.0\.1:1 does not answer .*store\.host") as told:
        await RedisStore(host="127.0.0.1", port=1).open()
    assert told.value.retry_after is not None  # another start may do better


async def test_a_wrong_password_is_nothing_that_waiting_helps_against() -> None:
    process = RedisProcess("secret")
    await process.start()
    try:
        with pytest.raises(MoltBotError, match=r"set store\.password") as told:
            await RedisStore(host="127.0.0.1", port=process.port, password="wrong").open()
    finally:
        await process.kill()
    assert told.value.retry_after is None


@pytest.mark.parametrize("command", [("SET", "moltbot:schema", "abc"), ("RPUSH", "moltbot:schema", "a")])
async def test_a_redis_whose_keys_are_another_programs_is_refused(command: tuple[str, ...]) -> None:
    async with RedisProcess() as process:
        async with Redis(port=process.port) as client:
            await client.execute_command(*command)  # type: ignore[no-untyped-call]  # redis-py has no types for it
        with pytest.raises(StorageUnavailable, match=r"another program's: choose another store\.prefix"):
            await RedisStore(host="127.0.0.1", port=process.port).open()


async def judged(store: RedisStore, before: asyncio.Task[None] | None) -> None:
    """Wait until a store has judged its Redis again."""
    async with asyncio.timeout(10):
        while (judging := store._fitness._judging) is before or judging is None:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.01)
        await judging


async def comes_back(redis: RedisProcess, store: RedisStore, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Start a Redis that the store waits for; return what is said of it once it was judged."""
    caplog.clear()
    before = store._fitness._judging
    await redis.start()
    await judged(store, before)
    name = "moltbot_server.store.redis_settings"
    return [getattr(record, "problem", "") for record in caplog.records if record.name == name]


async def test_a_redis_that_comes_back_empty_or_set_otherwise_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "moltbot_server.store")
    process = RedisProcess.keeping(tmp_path)
    other = RedisProcess("", "--maxmemory-policy", "allkeys-lru")
    other.port, other._command[2] = process.port, str(process.port)
    await process.start()
    store = RedisStore(host="127.0.0.1", port=process.port)
    await store.open()
    try:
        await process.kill()
        assert await comes_back(process, store, caplog) == [], "as it was"
        assert store.warnings == ()
        await process.kill()
        empty, *settings = await comes_back(other, store, caplog)
        assert "put a backup in its place" in empty
        assert [text.rpartition(": ")[2] for text in settings] == [
            "set maxmemory-policy noeviction",
            "set appendonly yes and appendfsync always",
        ]
        await other.kill()
        assert await comes_back(other, store, caplog) == [empty], "what is known is not told again"
        lost, *risks = store.warnings
        assert lost.startswith("it came back empty at ")
        assert lost.endswith(empty)
        assert risks == settings
    finally:
        await store.close()
        await process.kill()
        await other.kill()


async def test_each_core_tells_of_a_redis_that_has_come_back_empty(caplog: pytest.LogCaptureFixture) -> None:
    process = RedisProcess()
    await process.start()
    stores = [RedisStore(host="127.0.0.1", port=process.port) for _ in range(2)]
    for store in stores:
        await store.open()
    try:
        for times in (1, 2):
            before = stores[1]._fitness._judging
            await process.kill()
            await comes_back(process, stores[0], caplog)
            await judged(stores[1], before)
            told = [record for record in caplog.records if record.message == "Redis has come back empty"]
            assert len(told) == 2, f"emptied for the {times}. time"
    finally:
        for store in stores:
            await store.close()
        await process.kill()
