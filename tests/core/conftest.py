"""Stores under test: every kind of store has to keep the same promises."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from kept_turns import Reopen
from moltbot_server.store import Store
from moltbot_server.store.sqlite import SqliteStore

STORES: dict[str, Callable[[Path], Store]] = {"sqlite": lambda folder: SqliteStore(folder / "moltbot.db")}
"""A maker for each kind of store; what two of one kind make in one folder is the same store."""


@pytest.fixture(params=STORES.values(), ids=STORES)
def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Store]:
    """Makes a store of each kind, not yet opened, on one and the same place."""
    return lambda: request.param(tmp_path)


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
