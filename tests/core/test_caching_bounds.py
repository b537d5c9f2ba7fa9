"""What is kept in memory is bounded, goes after its time, and can be forgotten: answers, metadata, sessions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from kept_turns import keep, new
from moltbot_server.metrics import Metrics
from moltbot_server.models.caching.backend import MemoryBackend
from moltbot_server.models.caching.metadata import MetadataCache
from moltbot_server.models.context import ContextWindow
from moltbot_server.sessions import Sessions
from moltbot_server.store import Store
from moltbot_server.turns import MediaPart, Message, Role, SessionKey, TextPart


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """The time."""
    return Clock()


def place(number: int, workspace: str = "w") -> tuple[str, bytes]:
    return workspace, number.to_bytes(16, "big")


class TestMemory:
    """Answers in memory."""

    def test_no_more_bytes_are_kept_than_allowed_and_the_least_used_go_first(self, clock: Clock) -> None:
        backend = MemoryBackend(ttl=60, max_bytes=20_000, clock=clock)
        for number in range(10):
            backend.put(place(number), bytes(1000))
            backend.find(place(0))
        assert backend.entries == 10
        for number in range(10, 20):
            backend.put(place(number), bytes(1000))

        assert backend.size <= 20_000
        assert backend.find(place(0)) == bytes(1000)
        assert [number for number in range(20) if backend.find(place(number)) is None] == list(range(1, 7))

    def test_what_alone_is_too_much_is_not_kept_and_takes_nothing_elses_place(self, clock: Clock) -> None:
        backend = MemoryBackend(ttl=60, max_bytes=5_000, clock=clock)
        backend.put(place(1), bytes(1000))
        backend.put(place(2), bytes(6000))

        assert backend.find(place(2)) is None
        assert backend.find(place(1)) == bytes(1000)

    def test_time_frees_what_nobody_asks_for_any_more(self, clock: Clock) -> None:
        backend = MemoryBackend(ttl=60, max_bytes=1 << 20, clock=clock)
        backend.put(place(1), bytes(1000))
        clock.now += 30
        backend.put(place(2), bytes(1000))
        clock.now += 31
        backend.put(place(3), bytes(1000))

        assert [backend.find(place(number)) is not None for number in (1, 2, 3)] == [False, True, True]
        assert backend.entries == 2

    def test_what_is_put_again_is_kept_as_long_again(self, clock: Clock) -> None:
        backend = MemoryBackend(ttl=60, max_bytes=1 << 20, clock=clock)
        backend.put(place(1), b"old")
        clock.now += 40
        backend.put(place(1), b"new")
        clock.now += 40

        assert backend.find(place(1)) == b"new"
        assert backend.entries == 1

    async def test_its_size_is_nothing_when_all_is_forgotten(self, clock: Clock) -> None:
        backend = MemoryBackend(ttl=60, max_bytes=1 << 20, clock=clock)
        for number in range(10):
            backend.put(place(number, "wv"[number % 2]), bytes(number))

        assert await backend.clear("w") == 5
        assert await backend.clear("v") == 5
        assert (backend.entries, backend.size) == (0, 0)

    def test_a_flood_of_answers_leaves_no_trail_of_those_that_had_to_go(self, clock: Clock) -> None:
        backend = MemoryBackend(ttl=3600, max_bytes=50_000, clock=clock)
        for number in range(50_000):
            backend.put(place(number), bytes(100))

        assert backend.entries == 100
        assert len(backend._ages) < 2_000


class TestMetadata:
    """What was looked up elsewhere."""

    @pytest.fixture
    async def cache(self, clock: Clock) -> AsyncIterator[MetadataCache]:
        """An empty one."""
        cache = MetadataCache(ttl=60, max_bytes=10_000, clock=clock)
        yield cache
        await cache.close()

    def loading(self, *answers: object) -> Callable[[], Awaitable[object]]:
        left = list(answers)

        async def load() -> object:
            await asyncio.sleep(0)
            answer = left.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

        return load

    async def test_a_list_is_loaded_once_in_its_time(self, cache: MetadataCache, clock: Clock) -> None:
        load = self.loading(["a"], ["b"])
        assert [await cache.get("models", 10, load) for _ in range(3)] == [["a"]] * 3
        clock.now += 11

        assert await cache.get("models", 10, load) == ["b"]
        assert (cache.counts.hits, cache.counts.misses, cache.counts.joined) == (2, 2, 0)

    async def test_many_who_ask_at_once_wait_for_one_load(self, cache: MetadataCache) -> None:
        load = self.loading(["a"])

        assert await asyncio.gather(*(cache.get("models", 10, load) for _ in range(100))) == [["a"]] * 100
        assert (cache.counts.misses, cache.counts.joined) == (1, 99)

    async def test_a_failure_is_told_to_all_who_wait_and_not_kept(self, cache: MetadataCache) -> None:
        load = self.loading(OSError("no"), ["a"])

        told = await asyncio.gather(*(cache.get("models", 10, load) for _ in range(3)), return_exceptions=True)
        assert [type(each) for each in told] == [OSError] * 3
        assert await cache.get("models", 10, load) == ["a"]

    async def test_a_load_goes_on_when_the_one_who_asked_first_leaves(self, cache: MetadataCache) -> None:
        load = self.loading(["a"])
        first = asyncio.create_task(cache.get("models", 10, load))
        second = asyncio.create_task(cache.get("models", 10, load))
        await asyncio.sleep(0)
        first.cancel()

        assert await second == ["a"]

    async def test_workspaces_do_not_see_each_others(self, cache: MetadataCache) -> None:
        assert await cache.get("models", 10, self.loading(["a"]), workspace="w") == ["a"]
        assert await cache.get("models", 10, self.loading(["b"]), workspace="v") == ["b"]

        assert await cache.clear("w") == 1
        assert await cache.get("models", 10, self.loading(["c"]), workspace="v") == ["b"]

    async def test_no_more_is_kept_than_allowed(self, cache: MetadataCache) -> None:
        for number in range(30):
            await cache.get(f"models {number}", None, self.loading("x" * 1000))

        assert cache.size <= 10_000
        assert cache.entries == 9


class TestSessions:
    """Conversations at hand."""

    @pytest.fixture
    def sessions(self, store: Store, clock: Clock) -> Sessions[ContextWindow]:
        """Sessions over an empty store: at hand for a minute, 100,000 bytes of them."""
        return Sessions(
            store,
            lambda history: ContextWindow.of(history, lambda message: len(message.text), 1_000_000),
            size_of=lambda window: window.size,
            max_bytes=100_000,
            ttl=60,
            clock=clock,
        )

    def key(self, name: str, workspace: str = "w") -> SessionKey:
        return SessionKey(workspace=workspace, session=name)

    async def talk(self, sessions: Sessions[ContextWindow], key: SessionKey, size: int = 100) -> None:
        session = await sessions.open(key)
        session.claim()
        session.history.extend([Message(role=Role.USER, parts=(TextPart(text="x" * size),))])
        session.release()

    async def test_a_session_is_read_once_and_then_at_hand(self, sessions: Sessions[ContextWindow]) -> None:
        await asyncio.gather(*(sessions.open(self.key("s")) for _ in range(5)))
        assert sessions.ready(self.key("s")) is not None
        await sessions.open(self.key("s"))

        counts = sessions.counts
        # Whoever comes while it is read waits with the first; a store in memory lets nobody wait.
        assert (counts.misses, counts.joined + counts.hits) == (1, 6)
        assert counts.hits >= 2

    async def test_a_session_is_let_go_after_its_time_and_read_again(
        self, sessions: Sessions[ContextWindow], store: Store, clock: Clock
    ) -> None:
        await keep(store, new())
        first = await sessions.open(self.key("s"))
        clock.now += 59
        assert await sessions.open(self.key("s")) is first
        clock.now += 61

        assert sessions.ready(self.key("s")) is None
        again = await sessions.open(self.key("s"))
        assert again is not first
        assert (again.last_ordinal, [message.text for message in again.history.messages]) == (1, ["question", "answer"])

    async def test_old_sessions_go_when_others_are_used(self, sessions: Sessions[ContextWindow], clock: Clock) -> None:
        for name in "abc":
            await self.talk(sessions, self.key(name))
        clock.now += 61
        await self.talk(sessions, self.key("d"))

        assert sessions.entries == 1
        assert sessions.at_hand(self.key("d")) is not None

    async def test_a_session_in_use_is_at_hand_however_long_it_takes(
        self, sessions: Sessions[ContextWindow], clock: Clock
    ) -> None:
        session = await sessions.open(self.key("s"))
        session.claim()
        clock.now += 600
        await self.talk(sessions, self.key("t"))

        assert await sessions.open(self.key("s")) is session
        session.release()

    async def test_no_more_bytes_are_at_hand_than_allowed(self, sessions: Sessions[ContextWindow]) -> None:
        for number in range(50):
            await self.talk(sessions, self.key(f"s{number}"), 10_000)

        assert 80_000 < sessions.size <= 100_000
        assert sessions.entries == 8
        assert sessions.at_hand(self.key("s49")) is not None

    async def test_a_session_that_alone_is_too_much_is_at_hand_alone(self, sessions: Sessions[ContextWindow]) -> None:
        await self.talk(sessions, self.key("small"))
        await self.talk(sessions, self.key("large"), 500_000)

        assert [sessions.at_hand(self.key(name)) is not None for name in ("small", "large")] == [False, True]
        await self.talk(sessions, self.key("small"))
        assert sessions.size < 10_000

    async def test_a_workspace_lets_go_its_own_sessions_but_those_in_use(
        self, sessions: Sessions[ContextWindow]
    ) -> None:
        for name in "ab":
            await self.talk(sessions, self.key(name))
        await self.talk(sessions, self.key("a", "v"))
        (await sessions.open(self.key("b"))).claim()

        assert await sessions.clear("w") == 1
        assert sessions.entries == 2
        assert sessions.at_hand(self.key("a", "v")) is not None

    async def test_its_size_is_nothing_when_all_is_let_go(
        self, sessions: Sessions[ContextWindow], store: Store
    ) -> None:
        await keep(store, new())
        await self.talk(sessions, self.key("s"))
        await self.talk(sessions, self.key("t"), 5_000)
        await sessions.delete(self.key("s"))
        sessions.forget_idle()

        assert (sessions.entries, sessions.size) == (0, 0)


def test_a_window_weighs_what_it_keeps() -> None:
    window = ContextWindow.of([], lambda message: len(message.text), 1000)
    empty = window.size
    for number in range(30):
        parts = (TextPart(text="x" * 50), MediaPart(kind="image", data=bytes(1000)))
        window.extend([Message(role=Role.USER, parts=parts, turn=number)])

    assert empty == 0
    assert len(window) == 20
    assert 20 * 1050 < window.size < 20 * 2000
    assert window.size == ContextWindow.of(window.messages, lambda message: len(message.text), 1000).size


def test_the_metrics_tell_of_each_cache() -> None:
    metrics, cache = Metrics(), MetadataCache(ttl=1, max_bytes=1)
    cache.counts.hits, cache.counts.misses, cache.counts.joined = 3, 2, 1
    metrics.caches.read([cache])

    page = metrics.page().decode()
    for line in ("hits_total", "misses_total", "joined_total", "failures_total", "entries", "bytes"):
        assert f'moltbot_cache_{line}{{cache="metadata"}}' in page
    assert 'moltbot_cache_hits_total{cache="metadata"} 3.0' in page
