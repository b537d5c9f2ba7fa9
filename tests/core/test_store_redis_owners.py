"""Cores with different keys on one Redis: who comes to others is refused, and nobody learns a key."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from typing import Protocol

import pytest
from moltbot_server.errors import StorageUnavailable
from moltbot_server.store.redis import RedisStore
from moltbot_server.store.redis_check import check_redis
from redis.asyncio import Redis

ONE, OTHER = "mb_live_one-key-of-a-workspace", "mb_live_other-key-of-a-workspace"
LEASE = 0.5


class Join(Protocol):
    """Makes a store of a core with a key."""

    def __call__(self, key: str, lease: float = LEASE) -> RedisStore: ...


@pytest.fixture
async def join(redis_port: int) -> AsyncIterator[Join]:
    """Makes stores of cores with the keys that it is told, on one prefix."""
    prefix, made = f"test-{secrets.token_hex(4)}", []

    def make(key: str, lease: float = LEASE) -> RedisStore:
        store = RedisStore(host="127.0.0.1", port=redis_port, prefix=prefix, lease=lease, key=key)
        made.append(store)
        return store

    yield make
    for store in made:
        await store.close()


def client(store: RedisStore) -> Redis:
    """Return a client of the Redis of a store, to be used in a block of its own."""
    host, _, port = store.address.partition(":")
    return Redis(host=host, port=int(port), protocol=2)


async def strangers(join: Join) -> tuple[RedisStore, RedisStore]:
    """Return open stores of two cores with different keys: the lease of the first was over when the second began."""
    away, stranger = join(ONE, 10 * LEASE), join(OTHER)
    await away.open()
    async with client(away) as redis:
        await redis.delete(f"{away.prefix}:node:{away.node}", f"{away.prefix}:owner:{away.node}")
    await stranger.open()
    await away.advertise("")  # which renews the lease, and so it does by itself
    return away, stranger


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings of other keys."""
    return [record.message for record in caplog.records if record.name.endswith("redis_owners")]


async def test_a_core_that_comes_to_others_with_another_key_is_refused_and_they_go_on(
    join: Join, caplog: pytest.LogCaptureFixture
) -> None:
    store = join(ONE)
    await store.open()
    stranger = join(OTHER)
    with pytest.raises(StorageUnavailable) as refused:
        await stranger.open()
    assert refused.value.retry_after is None  # waiting does not help: it is the configuration
    text = refused.value.message
    for part in ("another key", store.address, store.prefix, "copy the file `key`", "store.prefix"):
        assert part in text
    for key in (ONE, OTHER):
        assert key not in text + caplog.text
    async with client(store) as redis:
        assert await redis.smembers(f"{store.prefix}:nodes") == {store.node.encode()}
        assert not await redis.exists(f"{store.prefix}:node:{stranger.node}", f"{store.prefix}:owner:{stranger.node}")
    assert store.away is None
    await join(ONE).open()


async def test_of_strangers_that_start_at_the_same_moment_those_with_one_key_stay(join: Join) -> None:
    stores = [join(key) for key in (ONE, OTHER) * 4]
    outcomes = await asyncio.gather(*(store.open() for store in stores), return_exceptions=True)
    ones, others = outcomes[::2], outcomes[1::2]
    won, lost = (ones, others) if ones[0] is None else (others, ones)
    assert won == [None] * 4
    assert [type(outcome) for outcome in lost] == [StorageUnavailable] * 4


async def test_a_lease_that_nobody_renews_is_waited_for_and_told(join: Join, caplog: pytest.LogCaptureFixture) -> None:
    store = join(ONE)
    async with client(store) as redis:
        await redis.sadd(f"{store.prefix}:nodes", "killed")
        for kind, text in (("node", "box 4711"), ("owner", "fingerprint-of-another-key")):
            await redis.set(f"{store.prefix}:{kind}:killed", text, px=int(LEASE * 1000))
        await store.open()
        assert not await redis.exists(f"{store.prefix}:node:killed")
    (text,) = warned(caplog)
    assert "waiting whether they are gone" in text
    assert [vars(record)["others"] for record in caplog.records if record.message == text] == ["box 4711"]


async def test_cores_that_missed_each_other_go_on_and_the_one_that_was_away_warns(
    join: Join, caplog: pytest.LogCaptureFixture
) -> None:
    away, stranger = await strangers(join)
    (text,) = warned(caplog)
    assert "copy the file `key`" in text
    assert "store.prefix" in text
    assert (away.away, stranger.away) == (None, None)


async def test_cores_with_one_key_one_that_has_left_and_one_without_any_are_nobodys_strangers(
    join: Join, caplog: pytest.LogCaptureFixture
) -> None:
    left = join(OTHER)
    await left.open()
    await left.close()
    for key in (ONE, ONE, "", ONE):
        await join(key).open()
    assert warned(caplog) == []


async def test_a_check_tells_of_different_keys(join: Join) -> None:
    await strangers(join)
    await join("").open()
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
        async with client(store) as redis:
            names = [f"{each.prefix}:owner:{each.node}" for each in (store, stranger)]
            marks = [await redis.get(name) for name in names]
            assert None not in marks
            assert marks[0] != marks[1]
            assert 0 < await redis.pttl(names[0]) <= LEASE * 1000
            for name in await redis.keys(f"{store.prefix}*"):
                if await redis.type(name) == b"string":
                    assert ONE.encode() not in await redis.get(name)
    finally:
        await stranger.close()
