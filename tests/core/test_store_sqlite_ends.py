"""Ends in SQLite: callers wait for them, so they go before new turns, by one statement where that is enough."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from kept_turns import ended, keep, new, texts
from moltbot_server.errors import StorageUnavailable
from moltbot_server.store.outbox import delivery_of
from moltbot_server.store.sqlite import SqliteStore
from moltbot_server.turns import Completed, Place, TurnInput, TurnState
from msgspec.structs import replace


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the database lies."""
    return tmp_path / "moltbot.db"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[SqliteStore]:
    """An open store."""
    store = SqliteStore(path)
    await store.open()
    yield store
    await store.close()


def traced(store: SqliteStore) -> list[str]:
    """Return where the writer's statements are noted; those that say when sessions were used come once a second."""
    heard: list[str] = []

    def hear(statement: str) -> None:
        if not statement.startswith("UPDATE sessions SET update_time"):
            heard.append(statement.split()[0])

    store._writing.set_trace_callback(hear)
    return heard


async def test_an_end_goes_before_turns_that_are_new_and_is_a_transaction_by_itself(store: SqliteStore) -> None:
    turns = [new(number) for number in (1, 2, 3)]
    assert await store.accept(turns[0]) is None
    heard, told = traced(store), list[str]()
    gate = threading.Event()
    blocked = store._writer.submit(lambda _: gate.wait(5))
    await blocked_is_at_work(store)
    writes = {"second": store.accept(turns[1]), "end": store.finish(ended(turns[0])), "third": store.accept(turns[2])}
    for name, write in writes.items():
        write.then(lambda _, name=name: told.append(name))  # type: ignore[misc]
    gate.set()

    await blocked
    assert await store.accept(new(4)) is None
    assert told == ["end", "second", "third"]
    assert heard[:5] == ["BEGIN", "COMMIT", "UPDATE", "BEGIN", "SELECT"]
    assert await texts(store) == ["question", "answer", "question", "question", "question"]


async def blocked_is_at_work(store: SqliteStore) -> None:
    """Let the loop hand over what waits."""
    while not store._writer._at_work:
        await store._reader.read(lambda connection: None)


async def test_an_end_does_not_go_before_its_own_turn(store: SqliteStore) -> None:
    turns = [new(number) for number in (1, 2)]
    writes = [
        store.accept(turns[0]),
        store.accept(turns[1]),
        store.finish(ended(turns[1])),
        store.finish(ended(turns[0])),
    ]

    assert [await write for write in writes] == [None] * 4  # type: ignore[misc]
    assert await texts(store) == ["question", "answer"] * 2


async def test_an_end_with_something_to_deliver_is_stored_with_it_or_not_at_all(store: SqliteStore) -> None:
    place = Place(channel="slack", address="C1")
    asked = TurnInput(parts=new().question, reply_to=place)
    turn = new(rest=asked)
    assert await store.accept(turn) is None
    end = ended(turn)
    last = end.events[-1].kind
    assert isinstance(last, Completed)
    heard = traced(store)
    await store.finish(replace(end, delivery=delivery_of(turn.key, asked, last)))

    assert (heard[0], heard[-1], heard.count("UPDATE"), heard.count("INSERT")) == ("BEGIN", "COMMIT", 1, 1)


async def test_an_end_that_cannot_be_written_is_told_so_and_is_written_when_it_can(
    store: SqliteStore, path: Path
) -> None:
    turn = new()
    assert await store.accept(turn) is None
    store._writing.execute("PRAGMA busy_timeout = 50")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageUnavailable):
        await store.finish(ended(turn))
    other.close()

    assert not store._writing.in_transaction
    await store.finish(ended(turn))
    found = await store.find_turn(turn.key)
    assert found is not None
    assert found.state is TurnState.COMPLETED
    await keep(store, new(2))
    assert await texts(store) == ["question", "answer"] * 2
