"""A turn that is not as it was written: whoever asks is told that it is lost, and the log says which one it is."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from kept_turns import ended, keep, key, new, said
from moltbot_server.errors import Status, StorageDamaged
from moltbot_server.store import Store
from moltbot_server.store.outbox import delivery_of
from moltbot_server.store.redis import RedisStore
from moltbot_server.store.redis_moving import RedisRecords
from moltbot_server.store.sqlite import SqliteStore
from moltbot_server.store.sqlite_moving import SqliteRecords
from moltbot_server.turns import Completed, Place, TurnInput
from redis.asyncio import Redis

FIELDS = {"question": "q", "answer": "a", "events": "v", "state": "s"}


@pytest.fixture(params=["sqlite", "redis"])
async def spoiled(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str, bytes], Awaitable[Store]]:
    """Return what opens a store with a turn of which one column was written over."""

    async def sqlite(column: str, value: bytes) -> Store:
        store = SqliteStore(tmp_path / "moltbot.db")
        await store.open()
        await keep(store, new())
        with closing(sqlite3.connect(tmp_path / "moltbot.db")) as connection, connection:
            connection.execute(f"UPDATE turns SET {column} = ?", (value if column != "state" else value.decode(),))
        return store

    async def redis(column: str, value: bytes) -> Store:
        port = request.getfixturevalue("redis_port")
        store = RedisStore(host="127.0.0.1", port=port, prefix=f"test-{secrets.token_hex(4)}")
        await store.open()
        await keep(store, new())
        async with Redis(host="127.0.0.1", port=port, protocol=2) as client:
            assert await client.hset(f"{store.base('w')}t:1:s", FIELDS[column], value) == 0
        return store

    return sqlite if request.param == "sqlite" else redis


ASKED: dict[str, Callable[[Store], Awaitable[object]]] = {
    "find_turn": lambda store: store.find_turn(new().key),
    "accept": lambda store: store.accept(new(ordinal=2, request_id="s-1")),
    "load_session": lambda store: store.load_session(key(), 10),
    "list_messages": lambda store: store.list_messages(key(), after=(0, 0), limit=10),
}


@pytest.mark.parametrize(
    ("column", "asked"),
    [
        ("events", "find_turn"),
        ("events", "accept"),
        ("state", "find_turn"),
        ("question", "load_session"),
        ("answer", "load_session"),
        ("question", "list_messages"),
        ("answer", "list_messages"),
    ],
)
async def test_a_damaged_turn_is_lost_and_the_log_names_it(
    spoiled: Callable[[str, bytes], Awaitable[Store]], column: str, asked: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = await spoiled(column, b"\xc1" if column != "state" else b"odd")
    with pytest.raises(StorageDamaged, match="turn 1 of this session is damaged") as told:
        await ASKED[asked](store)
    assert (told.value.status, told.value.retryable, told.value.retry_after) == (Status.DATA_LOSS, False, None)
    (line,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert line.getMessage() == "a stored turn cannot be read: it is damaged"
    assert (line.workspace, line.session, line.ordinal) == ("w", "s", 1)  # type: ignore[attr-defined]
    await store.close()


@pytest.mark.parametrize("column", ["question", "answer", "events", "state"])
async def test_a_store_with_a_damaged_turn_is_not_moved_and_the_turn_is_named(
    spoiled: Callable[[str, bytes], Awaitable[Store]], column: str, tmp_path: Path
) -> None:
    store = await spoiled(column, b"\xc1" if column != "state" else b"odd")
    records = RedisRecords(store) if isinstance(store, RedisStore) else SqliteRecords(tmp_path / "moltbot.db")
    with pytest.raises(StorageDamaged, match="turn 1 of session s in workspace w cannot be read: it is damaged"):
        _ = [record async for record in records.read()]
    await store.close()


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
async def test_a_store_with_a_damaged_delivery_is_not_moved_and_the_delivery_is_named(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path, port = tmp_path / "moltbot.db", request.getfixturevalue("redis_port") if kind == "redis" else 0
    store = SqliteStore(path) if not port else RedisStore(host="127.0.0.1", port=port, prefix=secrets.token_hex(4))
    await store.open()
    asked = TurnInput(parts=said("question"), reply_to=Place(channel="slack", address="C1"), request_id="s-1")
    turn = new(1, rest=asked)
    assert await store.accept(turn) is None
    end = ended(turn, "answer")
    last = end.events[-1].kind
    assert isinstance(last, Completed)
    await store.finish(msgspec.structs.replace(end, delivery=delivery_of(turn.key, asked, last)))
    if isinstance(store, RedisStore):
        async with Redis(host="127.0.0.1", port=port, protocol=2) as client:
            (row,) = await client.keys(f"{store.base('w')}d:*")
            assert await client.hset(row, "v", b"\xc1") == 0
        records: RedisRecords | SqliteRecords = RedisRecords(store)
    else:
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("UPDATE outbox SET ending = x'c1'")
        records = SqliteRecords(path)
    with pytest.raises(StorageDamaged, match=r"delivery .+ in workspace w cannot be read: it is damaged"):
        _ = [record async for record in records.read()]
    await store.close()


async def test_a_session_with_a_damaged_turn_goes_on_when_it_is_reset(
    spoiled: Callable[[str, bytes], Awaitable[Store]],
) -> None:
    store = await spoiled("answer", b"\xc1")
    await store.reset_session(key())
    loaded = await store.load_session(key(), 10)
    assert loaded is not None
    assert (loaded.last_ordinal, loaded.messages) == (1, ())
    await store.close()
