"""How a Redis has to be set, so that it can be the store."""

from __future__ import annotations

from pathlib import Path

import pytest
from kept_turns import keep, new
from moltbot_server.errors import MoltBotError, StorageUnavailable
from moltbot_server.store.redis import RedisStore
from redis_process import RedisProcess, free_port


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


async def test_a_redis_that_keeps_nothing_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    process = RedisProcess("secret")
    await process.start()
    store = RedisStore(host="127.0.0.1", port=process.port, password="secret")
    await store.open()
    await keep(store, new())
    await store.close()
    await process.kill()

    told = [getattr(record, "problem", "") for record in caplog.records if record.levelname == "WARNING"]
    assert [text for text in told if "set appendonly yes" in text] != []


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
