"""Stores under test: every kind of store has to keep the same promises."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from kept_turns import Reopen
from moltbot_server.store import Store
from moltbot_server.store.memory import MemoryStore
from moltbot_server.store.redis import RedisStore
from moltbot_server.store.sqlite import SqliteStore
from redis_nodes import Nodes
from redis_process import KeepingRedis

settings.register_profile("any machine", deadline=None)  # how long an example takes says more of the machine
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def redis_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a Redis that keeps what it is given; each test has a prefix of its own in it."""
    with KeepingRedis(tmp_path_factory.mktemp("redis")) as redis:
        yield redis.port


@pytest.fixture
async def nodes(redis_port: int) -> AsyncIterator[Nodes]:
    """Nodes on the Redis of all tests."""
    nodes = Nodes(redis_port)
    yield nodes
    for store in nodes.opened:
        await store.close()


def _sqlite(request: pytest.FixtureRequest) -> Callable[[], Store]:
    path: Path = request.getfixturevalue("tmp_path")
    return lambda: SqliteStore(path / "moltbot.db")


def _redis(request: pytest.FixtureRequest) -> Callable[[], Store]:
    port, prefix = request.getfixturevalue("redis_port"), f"test-{secrets.token_hex(6)}"
    return lambda: RedisStore(host="127.0.0.1", port=port, prefix=prefix)


def _memory(request: pytest.FixtureRequest) -> Callable[[], Store]:
    store = MemoryStore()  # opened again, it has what it had
    return lambda: store


STORES = {"sqlite": _sqlite, "redis": _redis, "memory": _memory}
"""A maker for each kind of store; what two of one kind make in one test is the same store."""


@pytest.fixture(params=STORES)
def make_store(request: pytest.FixtureRequest) -> Callable[[], Store]:
    """Makes a store of each kind, not yet opened, on one and the same place."""
    return STORES[request.param](request)


@pytest.fixture
async def reopen(make_store: Callable[[], Store]) -> AsyncIterator[Reopen]:
    """Closes the store if it is open and opens it again."""
    opened: list[Store] = []

    async def open_again() -> Store:
        while opened:
            await opened.pop().close()
        store = make_store()
        await store.open()
        opened.append(store)
        return store

    yield open_again
    while opened:
        await opened.pop().close()


@pytest.fixture
async def store(reopen: Reopen) -> Store:
    """An open store with nothing in it."""
    return await reopen()
