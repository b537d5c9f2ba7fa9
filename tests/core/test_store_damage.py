"""A turn that is not as it was written: whoever asks is told that it is lost, and the log says which one it is."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from kept_turns import ended, keep, key, new, said, tear
from moltbot_server.errors import Status, StorageDamaged, StorageUnavailable
from moltbot_server.store import Store
from moltbot_server.store.outbox import delivery_of
from moltbot_server.store.redis import RedisStore
from moltbot_server.store.redis_moving import RedisRecords
from moltbot_server.store.sqlite import SqliteStore
from moltbot_server.store.sqlite_check import check_database
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


async def damaged_page(path: Path) -> None:
    """Store a session of long ago, and write over the page on which it is."""
    store = SqliteStore(path)
    await store.open()
    for number in range(1200):  # a start reads the latest thousand turns
        await keep(store, new(session=f"s{number}", text=f"question of {number}"))
    await store.close()
    assert tear(path, "question of 70")


async def test_a_session_on_a_damaged_page_is_lost_and_the_log_names_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await damaged_page(tmp_path / "moltbot.db")
    store = SqliteStore(tmp_path / "moltbot.db")
    await store.open()
    with pytest.raises(StorageDamaged, match="what is stored of this session is damaged"):
        await store.load_session(key("s70"), 10)
    (line,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert line.getMessage() == "a stored session cannot be read: it is damaged"
    assert (line.workspace, line.session, line.problem) == ("w", "s70", "SQLITE_CORRUPT")  # type: ignore[attr-defined]
    assert await store.load_session(key("s1199"), 10) is not None
    with pytest.raises(StorageUnavailable, match=r"the database is damaged \(SQLITE_CORRUPT\): `moltbot store check`"):
        await store.delete_session(key("s70"))
    await store.close()


async def test_a_database_with_a_damaged_page_is_not_moved_and_a_turn_on_it_is_named(tmp_path: Path) -> None:
    await damaged_page(tmp_path / "moltbot.db")
    told = r"moltbot\.db is damaged: turn 1 of session s\d+ in workspace w cannot be read\. `moltbot store check` names"
    with pytest.raises(StorageDamaged, match=told):
        _ = [record async for record in SqliteRecords(tmp_path / "moltbot.db").read()]


async def test_a_database_with_text_that_is_none_is_not_moved_and_its_session_is_named(tmp_path: Path) -> None:
    path = tmp_path / "moltbot.db"
    store = SqliteStore(path)
    await store.open()
    await keep(store, new())
    await store.close()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE sessions SET title = CAST(x'ff' AS TEXT)")
    told = r"moltbot\.db is damaged: .+ session s in workspace w cannot be read\. .+delete that session"
    with pytest.raises(StorageDamaged, match=told):
        _ = [record async for record in SqliteRecords(path).read()]


@pytest.mark.parametrize(
    ("column", "asked"),
    [("events", "find_turn"), ("question", "load_session"), ("answer", "load_session"), ("answer", "list_messages")],
)
async def test_a_flipped_bit_within_a_text_is_noticed_and_never_told(tmp_path: Path, column: str, asked: str) -> None:
    path = tmp_path / "moltbot.db"
    store = SqliteStore(path)
    await store.open()
    await keep(store, new())
    with closing(sqlite3.connect(path)) as connection, connection:
        ((kept,),) = connection.execute(f"SELECT {column} FROM turns").fetchall()
        at = kept.index(b"question" if column == "question" else b"answer")
        changed = kept[:at] + bytes([kept[at] ^ 0b10]) + kept[at + 1 :]  # another letter: still a value like it
        connection.execute(f"UPDATE turns SET {column} = ?", (changed,))
    with pytest.raises(StorageDamaged, match="turn 1 of this session is damaged"):
        await ASKED[asked](store)
    await store.close()
    (found, *_) = check_database(path, in_use=False, progress=lambda *_: None)
    assert found.text == "turn 1 of session s in workspace w cannot be read"


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
