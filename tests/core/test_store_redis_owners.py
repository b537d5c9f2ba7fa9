"""Cores with different keys on one Redis: they are warned of, and nobody learns a key."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable

import pytest
from moltbot_server.store.redis import RedisStore
from moltbot_server.store.redis_check import check_redis
from redis.asyncio import Redis

Join = Callable[[str], RedisStore]
ONE, OTHER = "mb_live_one-key-of-a-workspace", "mb_live_other-key-of-a-workspace"


@pytest.fixture
async def join(redis_port: int) -> AsyncIterator[Join]:
    """Makes stores of cores with the keys that it is told, on one prefix."""
    prefix, made = f"test-{secrets.token_hex(4)}", []

    def make(key: str) -> RedisStore:
        store = RedisStore(host="127.0.0.1", port=redis_port, prefix=prefix, lease=0.5, key=key)
        made.append(store)
        return store

    yield make
    for store in made:
        await store.close()


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings of other keys."""
    return [record.message for record in caplog.records if record.name.endswith("redis_owners")]


async def test_a_core_that_starts_warns_once_of_others_with_another_key(
    join: Join, caplog: pytest.LogCaptureFixture
) -> None:
    await join(ONE).open()
    assert warned(caplog) == []
    await join(OTHER).open()
    (text,) = warned(caplog)
    assert "copy the file `key`" in text
    assert "store.prefix" in text
    assert ONE not in caplog.text
    assert OTHER not in caplog.text


async def test_cores_with_one_key_one_that_has_left_and_one_without_any_are_not_warned_of(
    join: Join, caplog: pytest.LogCaptureFixture
) -> None:
    left = join(OTHER)
    await left.open()
    await left.close()
    for key in (ONE, ONE, "", ONE):
        await join(key).open()
    assert warned(caplog) == []


async def test_a_check_tells_of_different_keys(join: Join) -> None:
    for key in (ONE, ONE, OTHER):
        await join(key).open()
    looker = join("")
    await looker.open()
    found = [finding async for finding in check_redis(looker, progress=lambda *_: None)]
    (text,) = (finding.text for finding in found if "keys" in finding.text)
    assert text.startswith("its cores have 2 different keys")
    assert "store.prefix" in text


async def test_redis_has_no_key_and_another_fingerprint_for_each_prefix(join: Join, redis_port: int) -> None:
    store = join(ONE)
    await store.open()
    stranger = RedisStore(host="127.0.0.1", port=redis_port, prefix=f"{store.prefix}-2", key=ONE)
    await stranger.open()
    try:
        async with Redis(host="127.0.0.1", port=redis_port, protocol=2) as client:
            names = [f"{each.prefix}:owner:{each.node}" for each in (store, stranger)]
            marks = [await client.get(name) for name in names]
            assert None not in marks
            assert marks[0] != marks[1]
            assert 0 < await client.pttl(names[0]) <= 500
            for name in await client.keys(f"{store.prefix}*"):
                if await client.type(name) == b"string":
                    assert ONE.encode() not in await client.get(name)
    finally:
        await stranger.close()
