"""Answers kept in a real Redis, which is never in the way of a turn."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from cache_desk import COLD, Ear, Pen, said
from moltbot_server.errors import ModelUnavailable, StorageUnavailable
from moltbot_server.models.caching import redis_backend
from moltbot_server.models.caching.answers import AnswerCache
from moltbot_server.models.caching.redis_backend import RedisBackend
from moltbot_server.models.engine import NOBODY, Generation
from moltbot_server.turns import TurnInput
from redis.asyncio import Redis
from redis_process import RedisProcess

KEY = ("w", b"0123456789abcdef")
Connect = Callable[..., RedisBackend]


@pytest.fixture
async def redis() -> AsyncIterator[RedisProcess]:
    """A Redis that runs."""
    async with RedisProcess() as process:
        yield process


@pytest.fixture
async def connect(redis: RedisProcess, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Connect]:
    """Makes backends of that Redis; they try a lost one again soon."""
    monkeypatch.setattr(redis_backend, "REST", 0.2)
    made: list[RedisBackend] = []

    def one(**options: Any) -> RedisBackend:
        made.append(RedisBackend(**{"host": "127.0.0.1", "port": redis.port, "ttl": 60.0, **options}))
        return made[-1]

    yield one
    for backend in made:
        await backend.close()


async def found(backend: RedisBackend, key: tuple[str, bytes] = KEY) -> bytes | None:
    looked = backend.find(key)
    return None if looked is None else await looked


async def holds(condition: Callable[[], object], within: float = 5.0) -> None:
    """Wait until something holds that nobody announces."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "it did not come to hold"
        await asyncio.sleep(0.005)


async def test_what_one_node_keeps_another_one_finds(connect: Connect) -> None:
    one, other = connect(), connect()
    await one.start()
    await other.start()
    one.put(KEY, b"answer")

    assert await found(one) == b"answer"
    assert await found(other) == b"answer"
    assert await found(other, ("v", KEY[1])) is None


async def test_what_is_kept_goes_after_its_time(connect: Connect, redis: RedisProcess) -> None:
    backend = connect(ttl=0.05)
    await backend.start()
    backend.put(KEY, b"answer")
    assert await found(backend) == b"answer"

    await asyncio.sleep(0.1)

    assert await found(backend) is None


async def test_a_workspace_forgets_its_own_entries_and_nothing_else_in_that_redis(
    connect: Connect, redis: RedisProcess
) -> None:
    backend = connect()
    await backend.start()
    async with Redis(port=redis.port) as stranger:
        await stranger.set("somebody else's", "value")
        for number in range(2500):
            backend.put(("w", number.to_bytes(16, "big")), b"answer")
        backend.put(("v", KEY[1]), b"answer")
        assert await found(backend, ("v", KEY[1])) == b"answer"
        await holds(lambda: not backend._unwritten)
        await found(backend)

        assert await backend.clear("w") == 2500
        assert await found(backend, ("w", (7).to_bytes(16, "big"))) is None
        assert await found(backend, ("v", KEY[1])) == b"answer"
        assert await stranger.get("somebody else's") == b"value"


async def test_the_names_in_redis_show_no_workspace_and_no_word(connect: Connect, redis: RedisProcess) -> None:
    backend = connect()
    await backend.start()
    backend.put(("work*space", KEY[1]), b"answer")
    await found(backend)

    async with Redis(port=redis.port) as look:
        (name,) = await look.keys()
    assert name.decode().startswith("moltbot:1:answers:")
    assert b"work" not in name
    assert await backend.clear("work*space") == 1


async def test_a_password_opens_a_redis_that_asks_for_one(connect: Connect) -> None:
    guarded = RedisProcess("sesame")
    await guarded.start()
    try:
        right, wrong = connect(port=guarded.port, password="sesame"), connect(port=guarded.port, password="rhubarb")
        await right.start()
        await wrong.start()
        right.put(KEY, b"answer")

        assert await found(right) == b"answer"
        assert (right.there, wrong.there) == (True, False)
        assert "sesame" not in repr(right)
    finally:
        await guarded.kill()


async def test_a_redis_that_is_not_there_costs_nothing_and_is_found_later(
    connect: Connect, redis: RedisProcess
) -> None:
    await redis.kill()
    backend = connect()
    await backend.start()
    assert backend.find(KEY) is None
    backend.put(KEY, b"lost")
    with pytest.raises(StorageUnavailable):
        await backend.clear("w")

    await redis.start()
    await holds(lambda: backend.there)
    backend.put(KEY, b"answer")
    assert await found(backend) == b"answer"


async def test_a_redis_that_dies_is_a_miss_at_once_and_counted(connect: Connect, redis: RedisProcess) -> None:
    backend = connect()
    await backend.start()
    backend.put(KEY, b"answer")
    assert await found(backend) == b"answer"

    await redis.kill()
    began = time.perf_counter()
    looked = await asyncio.gather(*(found(backend) for _ in range(50)))

    assert looked == [None] * 50
    assert time.perf_counter() - began < 0.5
    assert backend.failures >= 1
    assert not backend.there
    await redis.start()
    await holds(lambda: backend.there)


async def test_a_redis_that_hangs_delays_nobody_for_long_and_is_left_alone_then(
    connect: Connect, redis: RedisProcess
) -> None:
    backend = connect()
    await backend.start()
    redis.hang()
    waits = []
    for _ in range(5):
        began = time.perf_counter()
        assert await found(backend) is None
        waits.append(time.perf_counter() - began)

    assert sum(wait > 0.02 for wait in waits) == 2
    assert max(waits) < 0.5
    assert not backend.there
    redis.go_on()
    await holds(lambda: backend.there)
    backend.put(KEY, b"answer")
    assert await found(backend) == b"answer"


async def test_who_clears_a_redis_that_hangs_hears_so_within_seconds(
    connect: Connect, redis: RedisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert redis_backend._LONGEST_SILENCE <= 5.0
    monkeypatch.setattr(redis_backend, "_LONGEST_SILENCE", 0.2)
    backend = connect()
    await backend.start()
    redis.hang()

    began = time.perf_counter()
    with pytest.raises(
        StorageUnavailable, match=r"not cleared: Redis at \S+ does not answer. No entries were forgotten"
    ):
        await backend.clear("w")

    assert time.perf_counter() - began < 10.0
    redis.go_on()
    await holds(lambda: backend.there)
    assert await backend.clear("w") == 0


async def test_a_redis_that_is_full_still_reads(connect: Connect, redis: RedisProcess) -> None:
    backend = connect()
    await backend.start()
    backend.put(KEY, b"answer")
    assert await found(backend) == b"answer"
    async with Redis(port=redis.port) as full:
        await full.config_set("maxmemory", "1")
        backend.put(("w", b"another"), b"answer")
        await holds(lambda: backend.failures)

    assert await found(backend) == b"answer"
    assert await found(backend, ("w", b"another")) is None
    assert backend.there


class TestAnswers:
    """The cache of answers over it."""

    @pytest.fixture
    async def cache(self, connect: Connect) -> AnswerCache:
        """A cache of one node."""
        cache = AnswerCache(connect(), ttl=60.0)
        await cache.start()
        return cache

    def ask(self, cache: AnswerCache, engine: Pen, text: str = "hello") -> tuple[Ear, Generation]:
        ear, read = Ear(), [said(text)]
        return ear, cache.begin(engine, read, TurnInput(parts=read[0].parts, options=COLD), "w", ear, NOBODY)

    async def answered(self, ear: Ear) -> Ear:
        await holds(lambda: ear.end)
        return ear

    async def test_an_answer_of_one_node_is_given_by_another_one(self, cache: AnswerCache, connect: Connect) -> None:
        engine, other_engine = Pen(), Pen()
        first, _ = self.ask(cache, engine)
        await holds(lambda: engine.listeners)
        engine.write("He", "llo")
        await holds(lambda: not cache._backend._unwritten)
        other = AnswerCache(connect(), ttl=60.0)
        await other.start()
        second, _ = self.ask(other, other_engine)

        assert first.text == (await self.answered(second)).text == "Hello"
        assert second.end.cached
        assert other_engine.listeners == []
        assert (cache.counts.misses, other.counts.hits) == (1, 1)

    async def test_a_thousand_identical_questions_look_once_and_ask_once(self, cache: AnswerCache) -> None:
        engine = Pen()
        asked = [self.ask(cache, engine)[0] for _ in range(1000)]
        await holds(lambda: engine.listeners)
        engine.write("one")

        assert len(engine.listeners) == 1
        assert {ear.text for ear in asked} == {"one"}
        assert (cache.counts.misses, cache.counts.joined) == (1, 999)

    async def test_who_stops_while_it_is_looked_up_starts_no_engine(self, cache: AnswerCache) -> None:
        engine = Pen()
        ear, generation = self.ask(cache, engine)
        generation.stop()
        other, _ = self.ask(cache, engine)
        await holds(lambda: engine.listeners)
        engine.write("one")

        assert (ear.heard, ear.end) == ([], None)
        assert other.text == "one"
        assert len(engine.listeners) == 1

    async def test_a_refusal_of_the_engine_is_heard_by_all_who_waited(self, cache: AnswerCache) -> None:
        engine = Pen()
        engine.refusal = ModelUnavailable("gone")
        asked = [self.ask(cache, engine)[0] for _ in range(3)]

        assert [(await self.answered(ear)).end for ear in asked] == [engine.refusal] * 3
        assert cache.under_way == 0

    async def test_turns_are_answered_while_redis_is_away(self, cache: AnswerCache, redis: RedisProcess) -> None:
        engine = Pen()
        await redis.kill()
        asked = []
        for number in range(3):
            ear, _ = self.ask(cache, engine, f"question {number}")
            await holds(lambda seen=number: len(engine.listeners) > seen)
            engine.write("one")
            asked.append(ear)

        assert [ear.text for ear in asked] == ["one"] * 3
        assert cache.failures >= 1
