"""Whether a database takes writes, as a store tells whoever runs it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from kept_turns import keep, new
from moltbot_server.errors import StorageFull, StorageUnavailable
from moltbot_server.store.sqlite import SqliteStore
from moltbot_server.store.writer import storage_error, unusable


@pytest.fixture
async def store(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> AsyncIterator[SqliteStore]:
    """An open store."""
    caplog.set_level("INFO", "moltbot_server.store")
    store = SqliteStore(tmp_path / "moltbot.db")
    await store.open()
    yield store
    await store.close()


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    """Return what the store has logged."""
    return [(record.levelno, record.message) for record in caplog.records if "moltbot_server.store" in record.name]


async def there_again(store: SqliteStore) -> None:
    """Wait until the store takes writes."""
    async with asyncio.timeout(20):
        while store.away is not None:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.01)


BEGINS = (logging.ERROR, "the database takes no writes; turns are refused until it does again")
ENDS = (logging.INFO, "the database takes writes again")


async def test_a_full_disk_is_said_once_and_since_when_and_that_there_is_room_again_without_a_turn(
    store: SqliteStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await keep(store, new())
    assert store.away is None
    began = time.time()
    store._writing.execute(f"PRAGMA max_page_count = {store._writing.execute('PRAGMA page_count').fetchone()[0]}")
    for number in range(3):
        with pytest.raises(StorageFull):
            await store.accept(new(session=f"s{number}", text="x" * 100_000))
    away = store.away
    assert away is not None
    assert (away.where, away.problem) == (f"the database {tmp_path / 'moltbot.db'}", "the disk is full (SQLITE_FULL)")
    assert began <= away.since <= time.time()
    await asyncio.sleep(2.5)  # it is looked at each second
    assert store.away is away

    store._writing.execute("PRAGMA max_page_count = 1000000")
    await there_again(store)
    await keep(store, new(session="after", text="x" * 100_000))
    assert store.away is None
    assert said(caplog) == [BEGINS, ENDS]
    assert store._writing.execute("SELECT count(*) FROM journal").fetchone() == (0,)


def waits(store: SqliteStore) -> int:
    """Return how many milliseconds a write waits for another program's."""
    return int(store._writing.execute("PRAGMA busy_timeout").fetchone()[0])


async def test_a_database_that_another_program_holds_takes_no_writes(
    store: SqliteStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store._writing.execute("PRAGMA busy_timeout = 20")
    with contextlib.closing(sqlite3.connect(tmp_path / "moltbot.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageUnavailable):
            await store.accept(new())
        away = store.away
        assert away is not None
        assert "SQLITE_BUSY" in away.problem
        with pytest.raises(StorageUnavailable):
            await store.accept(new(2))
        assert waits(store) == 250, "whoever comes now need not wait for as long again"
    await there_again(store)
    assert said(caplog) == [BEGINS, ENDS]
    await store.accept(new(3))
    assert waits(store) == 5000


async def test_a_database_that_can_only_be_read_takes_no_writes(store: SqliteStore) -> None:
    store._writing.execute("PRAGMA query_only = on")
    with pytest.raises(StorageUnavailable):
        await store.accept(new())
    assert store.away is not None
    assert "SQLITE_READONLY" in store.away.problem
    store._writing.execute("PRAGMA query_only = off")
    await there_again(store)


async def test_a_write_that_is_at_fault_itself_says_nothing_of_the_disk(store: SqliteStore) -> None:
    with pytest.raises(StorageUnavailable):
        await store._writer.submit(lambda connection: connection.execute("INSERT INTO nowhere VALUES (1)"))
    assert store.away is None


async def test_a_store_that_takes_no_writes_is_closed_at_once(store: SqliteStore) -> None:
    store._writing.execute("PRAGMA query_only = on")
    with pytest.raises(StorageUnavailable):
        await store.accept(new())
    began = time.monotonic()
    await store.close()
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("name", ["SQLITE_FULL", "SQLITE_IOERR_SHMSIZE"])
def test_a_database_that_finds_no_room_to_be_opened_in_is_not_a_matter_of_configuration(name: str) -> None:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorname = name
    assert isinstance(unusable(Path("moltbot.db"), error), StorageFull)
    assert isinstance(storage_error(error), StorageFull)


@pytest.mark.parametrize("name", ["SQLITE_IOERR_WRITE", "SQLITE_IOERR_FSYNC"])
def test_a_disk_that_fails_is_not_told_to_be_full(name: str) -> None:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorname = name
    found = storage_error(error)
    assert isinstance(found, StorageUnavailable)
    assert found.message == f"the disk fails, or a quota of it is used up ({name}): nothing was stored"
