"""What is told of a store that is not whole, or not set up well."""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest
from kept_turns import keep, key, new, said, tear
from moltbot_server.errors import StorageUnavailable
from moltbot_server.store.findings import Finding
from moltbot_server.store.protocol import JournalEntry
from moltbot_server.store.redis import RedisStore
from moltbot_server.store.redis_check import check_redis, nodes_there
from moltbot_server.store.sqlite import SqliteStore
from moltbot_server.store.sqlite_check import check_database
from moltbot_server.store.sqlite_schema import SCHEMA_VERSION
from moltbot_server.turns import Event, TextDelta, TurnInput
from redis.asyncio import Redis

ASKED = TurnInput(parts=said("question"))


def told(findings: Sequence[Finding]) -> list[tuple[str, str]]:
    return [(finding.weight, finding.text) for finding in findings]


@pytest.fixture
async def path(tmp_path: Path) -> Path:
    """A closed database with a turn that ended, one that runs, and one that was deleted."""
    path = tmp_path / "moltbot.db"
    store = SqliteStore(path)
    await store.open()
    await keep(store, new())
    await keep(store, new(session="deleted", create_time=time.time()))
    await store.delete_session(key("deleted"))
    await store.accept(new(session="runs", rest=ASKED))
    await store.close()
    return path


def checked(path: Path, *, in_use: bool = False) -> list[tuple[str, str]]:
    """Return what is found in a database."""
    shares: list[float] = []
    found = told(list(check_database(path, in_use=in_use, progress=lambda share, _: shares.append(share))))
    assert shares == sorted(shares)
    assert all(0 <= share <= 1 for share in shares)
    return found


def changed(path: Path, *statements: str) -> None:
    """Change a database behind the store's back."""
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(";".join(statements))


async def test_files_of_turns_that_were_cut_are_told(path: Path) -> None:
    store = SqliteStore(path)
    await store.open()
    (orphan,) = await store.take_over()
    said_more = tuple(Event(sequence=number, at=1.0, kind=TextDelta(text="more")) for number in (1, 2))
    for event in said_more:
        assert not await store.append([JournalEntry(key=orphan.turn.key, events=(event,), epoch=orphan.epoch)])
    await store.close()
    (file,) = path.parent.glob("moltbot.db-turns/*/*")
    waits = ("note", "1 turn waits to be carried on by the next start")
    assert checked(path) == [waits]

    file.write_bytes(file.read_bytes()[:-3] + bytes(13))
    weight, text = checked(path)[0]
    assert weight == "warning"
    assert str(file.relative_to(path.parent)) in text
    assert checked(path)[1:] == [waits]
    assert checked(path, in_use=True) == []
    assert file.exists()


async def test_a_database_that_is_whole_has_nothing_but_turns_that_wait(path: Path) -> None:
    assert checked(path) == [("note", "1 turn waits to be carried on by the next start")]
    assert checked(path, in_use=True) == []


def test_a_database_that_was_emptied_is_not_taken_for_a_good_one(path: Path) -> None:
    path.write_bytes(b"")
    ((weight, text),) = checked(path)
    assert weight == "warning"
    assert text.startswith("it is empty, and the next start takes it for a new one")


def test_a_database_whose_disk_has_no_room_or_takes_no_writes_is_told(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(path)._replace(free=4096)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    (found, *_) = checked(path)
    assert found == (
        "grave",
        f"its disk has 4 KiB of room, so nothing new can be stored: make room on the disk of {path.parent}",
    )
    monkeypatch.setattr(os, "access", lambda place, _: place != path)
    (found, *rest) = checked(path)
    assert found == (
        "grave",
        f"{path} may not be written by us, so nothing new can be stored: let MoltBot write there",
    )
    assert [weight for weight, _ in rest] == ["note"]


@pytest.mark.parametrize(("pages", "told_of_room"), [(100, []), (1000, ["3 MiB of its 3 MiB are free"])])
async def test_room_in_the_file_is_told_when_it_is_worth_a_word(
    path: Path, pages: int, told_of_room: list[str]
) -> None:
    fill = f"INSERT INTO filler SELECT zeroblob(4000) FROM json_each('[{','.join('0' * pages)}]')"
    changed(path, "CREATE TABLE filler(x)", fill, "DROP TABLE filler")
    notes = [text.partition(",")[0] for _, text in checked(path, in_use=True)]
    assert notes == told_of_room


async def test_rows_that_belong_to_nothing_or_cannot_be_read_are_found(path: Path) -> None:
    changed(
        path,
        "DELETE FROM sessions WHERE id = 'runs'",
        "INSERT INTO journal VALUES ('w', 'nowhere', 1, 1, x'90')",
        "UPDATE turns SET answer = x'93ff' WHERE session = 's'",
    )
    assert checked(path, in_use=True) == [
        ("warning", "1 turns belong to no session"),
        ("warning", "1 entries of the journal belong to no turn that runs; the next start takes them away"),
        ("grave", "turn 1 of session s in workspace w cannot be read"),
    ]


async def test_places_that_nothing_leaves_and_dead_letters_are_told(path: Path) -> None:
    columns = "workspace, id, channel, address, session, ordinal, request_id, ending, create_time, state"
    rows = ", ".join(f"('w', '{state}', 'slack', 'a', 's', 1, 'r', x'', 1.0, '{state}')" for state in ("open", "dead"))
    changed(path, f"INSERT INTO outbox ({columns}) VALUES {rows}")
    assert checked(path, in_use=True) == [
        ("warning", "1 places have deliveries, and not just the first of them can be given out"),
        ("note", "1 answer could not be delivered: `moltbot deadletters list` tells which"),
    ]


def test_a_damaged_page_and_a_schema_of_another_release_are_found(path: Path) -> None:
    changed(path, "PRAGMA user_version = 99")
    assert [weight for weight, _ in checked(path)] == ["grave"]
    changed(path, "PRAGMA user_version = 1")
    ((weight, text),) = checked(path)
    assert (weight, "next start brings it up to date" in text) == ("note", True)
    changed(path, f"PRAGMA user_version = {SCHEMA_VERSION}", "PRAGMA wal_checkpoint(TRUNCATE)")
    whole = path.read_bytes()
    size = int.from_bytes(whole[16:18], "big")
    path.write_bytes(whole[: 2 * size] + b"\xff" * size + whole[3 * size :])
    try:
        found = checked(path)
    except sqlite3.DatabaseError:
        return
    assert "grave" in {weight for weight, _ in found}


@pytest.fixture
async def torn(tmp_path: Path) -> Path:
    """A closed database of two hundred sessions, of which a page is not as it was written: one with session 70."""
    path = tmp_path / "moltbot.db"
    store = SqliteStore(path)
    await store.open()
    for number in range(200):
        await keep(store, new(session=f"s{number}", text=f"question of {number}, " + "words " * 40))
    await store.close()
    assert tear(path, "question of 70,")
    return path


async def test_the_turns_on_a_damaged_page_are_named_with_what_to_do(torn: Path) -> None:
    first, *lost, last = checked(torn)
    assert first[0] == "grave"
    assert first[1].startswith("damaged: ")
    assert ("grave", "turn 1 of session s70 in workspace w cannot be read") in lost
    assert 1 < len(lost) < 10
    assert last[0] == "note"
    assert last[1].startswith("put a backup in its place (docs/operations.md)")


async def test_many_sessions_on_damaged_pages_are_told_in_few_lines(torn: Path) -> None:
    for number in range(0, 200, 2):
        tear(torn, f"question of {number},")
    lost = [text for _, text in checked(torn) if "cannot be read" in text]
    assert len(lost) == 21
    assert lost[-1].endswith(" more sessions cannot be read")


async def test_a_session_whose_title_is_no_text_is_named(path: Path) -> None:
    changed(path, "UPDATE sessions SET title = CAST(x'ff' AS TEXT) WHERE id = 's'")
    assert checked(path, in_use=True) == [("grave", "session s in workspace w cannot be read")]


@pytest.fixture
async def store(redis_port: int, tmp_path: Path) -> AsyncIterator[RedisStore]:
    """An open store with a turn that ended and one that runs."""
    store = RedisStore(host="127.0.0.1", port=redis_port, prefix=f"test-{tmp_path.name}")
    await store.open()
    await keep(store, new())
    await store.accept(new(session="runs", rest=ASKED))
    event = Event(sequence=1, at=1.0, kind=TextDelta(text="word"))
    await store.append([JournalEntry(key=new(session="runs").key, events=(event,))])
    yield store
    await store.close()


async def looked_at(store: RedisStore) -> list[tuple[str, str]]:
    """Return what another one finds in a store."""
    other = RedisStore(host="127.0.0.1", port=store._options["port"], prefix=store.prefix)
    await other.open()
    try:
        assert list(await nodes_there(other)) == ([] if store._closed else [store.node])
        return told([finding async for finding in check_redis(other, progress=lambda *_: None)])
    finally:
        await other.close()


async def test_a_redis_that_is_whole_has_nothing_but_its_cores(store: RedisStore) -> None:
    ((weight, text),) = await looked_at(store)
    assert (weight, f"the core {store.node} is there" in text) == ("note", True)
    await store.close()
    ((weight, text),) = await looked_at(store)
    assert (weight, "1 turn of workspace w waits to be carried on" in text) == ("note", True)


async def test_a_redis_that_is_only_looked_at_is_left_as_it_was(redis_port: int, tmp_path: Path) -> None:
    store = RedisStore(host="127.0.0.1", port=redis_port, prefix=f"test-{tmp_path.name}", key="k")
    await store.open(join=False)
    found = [finding.weight async for finding in check_redis(store, progress=lambda *_: None)]
    assert "grave" not in found
    await store.close()
    async with Redis(host="127.0.0.1", port=redis_port, protocol=2) as client:
        assert [key async for key in client.scan_iter(f"{store.prefix}:*")] == []


async def test_keys_that_belong_to_nothing_or_cannot_be_read_are_found(store: RedisStore) -> None:
    base = store.base("w")
    async with Redis(host="127.0.0.1", port=store._options["port"], protocol=2) as client:
        await client.hset(f"{base}t:1:s", "a", b"\x93\xff")
        await client.zrem(f"{base}run:{store.node}", "1:runs")
        await client.zrem(f"{base}o:runs", "1:runs")
        await client.xadd(f"{base}j:7:gone", {"e": b"\x90"})
        await client.hset(f"{base}requests", "r", "9:gone")
        await client.config_set("appendonly", "yes")

    assert set(await looked_at(store)) >= {
        ("grave", "turn 1 of session s in workspace w cannot be read"),
        ("grave", "turn 1 of session runs in workspace w runs, and no core has it"),
        ("warning", "turn 1 of session runs in workspace w belongs to no session"),
        ("warning", "1 journals of workspace w belong to no turn that runs"),
        ("warning", "1 request_ids of workspace w lead to turns that are not there"),
    }


@pytest.mark.parametrize(
    "change",
    [
        "answer = x'c1'",
        "question = x'c1'",
        "events = x'c1'",
        "state = 'odd'",
        "finish = 'odd'",
        "model = CAST(x'ff' AS TEXT)",
    ],
)
async def test_whatever_cannot_be_read_of_a_turn_is_found(path: Path, change: str) -> None:
    changed(path, f"UPDATE turns SET {change} WHERE session = 's'")
    assert checked(path, in_use=True) == [("grave", "turn 1 of session s in workspace w cannot be read")]


async def test_a_schema_that_no_release_has_written_is_told_in_a_sentence(path: Path) -> None:
    changed(path, "PRAGMA user_version = -3")
    ((weight, text),) = checked(path)
    assert weight == "grave"
    assert text.startswith("its schema is -3, which no release has written: it is damaged")
    with pytest.raises(StorageUnavailable, match="its schema is -3, which no release has written"):
        await SqliteStore(path).open()


@pytest.mark.parametrize(
    "change", [("a", b"\xc1"), ("q", b"\xc1"), ("v", b"\xc1"), ("s", "odd"), ("f", "odd"), ("m", b"\xff")]
)
async def test_whatever_cannot_be_read_of_a_turn_in_redis_is_found(store: RedisStore, change: tuple[str, str]) -> None:
    async with Redis(host="127.0.0.1", port=store._options["port"], protocol=2) as client:
        await client.hset(f"{store.base('w')}t:1:s", *change)
    assert [found for found in await looked_at(store) if found[0] == "grave"] == [
        ("grave", "turn 1 of session s in workspace w cannot be read")
    ]
