"""One SQLite file for several processes: all of them write, and read at once what the others wrote."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import moltbot_server.store.sqlite_use as sqlite_use
import pytest
from kept_turns import keep, key, new, said, texts
from moltbot_server.errors import StorageUnavailable
from moltbot_server.store import UsageRow
from moltbot_server.store.moving import export
from moltbot_server.store.sqlite import SqliteStore
from moltbot_server.store.sqlite_check import check_database
from moltbot_server.store.sqlite_moving import SqliteRecords
from moltbot_server.turns import TurnInput

TURNS = 30
_WRITER = """
import asyncio, sys
from pathlib import Path
sys.path.append(sys.argv[1])
from kept_turns import keep, new
from moltbot_server.store.sqlite import SqliteStore

async def main():
    store = SqliteStore(Path(sys.argv[2]), address="unix:/" + sys.argv[3])
    await store.open()
    for number in range(int(sys.argv[4])):
        await keep(store, new(1, session=f"s{sys.argv[3]}-{number}"))
    await store.close()

asyncio.run(main())
"""


@asynccontextmanager
async def opened(path: Path, count: int) -> AsyncIterator[list[SqliteStore]]:
    """Open a file as several nodes."""
    stores = [SqliteStore(path, address=f"unix:/{number}") for number in range(count)]
    await asyncio.gather(*(store.open() for store in stores))
    try:
        yield stores
    finally:
        await asyncio.gather(*(store.close() for store in stores))


def writer(path: Path, name: str) -> subprocess.Popen[bytes]:
    """Start a process that stores turns."""
    words = (sys.executable, "-c", _WRITER, str(Path(__file__).parent), str(path), name, str(TURNS))
    return subprocess.Popen(words, stderr=subprocess.PIPE)


def test_processes_that_start_at_once_make_one_database_and_all_write_it(tmp_path: Path) -> None:
    path = tmp_path / "moltbot.db"
    processes = [writer(path, name) for name in ("a", "b", "c", "d")]
    for process in processes:
        told = process.communicate(timeout=60)[1]
        assert process.returncode == 0, told.decode()
    findings = list(check_database(path, in_use=False, progress=lambda share, what: None))
    assert [finding.text for finding in findings if finding.weight != "note"] == []
    assert asyncio.run(SqliteRecords(path).count()) == 4 * TURNS * 2


async def test_what_one_has_written_the_others_read_at_once(tmp_path: Path) -> None:
    async with opened(tmp_path / "moltbot.db", 3) as stores:
        for number, store in enumerate(stores):
            await keep(store, new(1, session=f"s{number}"))
            for other in stores:
                assert await texts(other, f"s{number}") == ["question", "answer"]


async def test_others_hear_when_a_session_was_used_last_although_nothing_more_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(time=lambda: now)
    monkeypatch.setattr(sqlite_use, "time", clock)
    now = 1_000.0
    async with opened(tmp_path / "moltbot.db", 2) as (one, other):

        async def used() -> float:
            found = await other.list_sessions("w", user="", channel="", before=None, limit=10)
            return found[0].update_time

        await one.take_over()
        for number, at in ((1, 1.0), (2, 2.0), (3, 3.0)):
            assert await one.accept(new(number, create_time=at, opens_session=True)) is None
        assert await used() == 2.0, "it is not written with each turn"
        await one.take_over()  # which is asked ten times a second
        assert await used() == 2.0
        now += 2.0
        await one.take_over()
        assert await used() == 3.0


async def test_who_writes_all_the_time_lets_others_write_as_well(tmp_path: Path) -> None:
    async with opened(tmp_path / "moltbot.db", 2) as (greedy, modest):
        over = asyncio.Event()

        async def write() -> None:
            number = 0
            while not over.is_set():
                number += 1
                rows = [UsageRow(workspace="w", day="2026-01-01", model=f"m{number}-{each}") for each in range(50)]
                await asyncio.gather(*(greedy.add_usage([row]) for row in rows))

        writing = asyncio.create_task(write())
        async with asyncio.timeout(30):
            for number in range(20):
                await keep(modest, new(1, session=f"s{number}"))
        over.set()
        await writing


async def test_the_write_ahead_log_is_bounded_however_many_write_and_read(tmp_path: Path) -> None:
    path, most, written = tmp_path / "moltbot.db", 0, 0
    async with opened(path, 3) as stores:
        over = asyncio.Event()

        async def read(store: SqliteStore) -> None:
            while not over.is_set():
                await store.load_session(key("s1"), 200)
                await asyncio.sleep(0)

        reading = [asyncio.create_task(read(store)) for store in stores]
        for number in range(40):
            for place, store in enumerate(stores):
                rows = [
                    UsageRow(workspace="w", day="2026-01-01", model=f"{place}-{number}-{each}-{'x' * 9000}")
                    for each in range(100)
                ]
                await store.add_usage(rows)
                written += 100 * 9000
            most = max(most, path.with_name("moltbot.db-wal").stat().st_size)
        over.set()
        await asyncio.gather(*reading)
    assert written > 100 << 20
    assert most < 40 << 20


async def test_a_store_is_checked_and_exported_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "moltbot.db"
    async with opened(path, 2) as stores:
        await keep(stores[0], new(1, session="first"))
        over = asyncio.Event()

        async def write(place: int) -> None:
            number = 0
            while not over.is_set():
                number += 1
                await keep(stores[place], new(1, session=f"s{place}-{number}"))

        writing = [asyncio.create_task(write(place)) for place in (0, 1)]
        for number in range(3):
            findings = await asyncio.to_thread(
                lambda: list(check_database(path, in_use=True, progress=lambda share, what: None))
            )
            assert not [finding for finding in findings if finding.weight == "grave"]
            place = tmp_path / f"{number}.jsonl"
            with place.open("wb") as file:
                written = await export(SqliteRecords(path), file, lambda count: None)
            assert sum(1 for line in place.read_text().splitlines() if json.loads(line)) >= written > 0
        over.set()
        await asyncio.gather(*writing)


async def test_a_folder_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("no folder")
    with pytest.raises(StorageUnavailable, match="run"):
        await SqliteStore(tmp_path / "moltbot.db", address="unix:/x").open()


async def test_a_node_that_closed_its_store_is_gone_for_the_others(tmp_path: Path) -> None:
    async with opened(tmp_path / "moltbot.db", 1) as (store,):
        other = SqliteStore(tmp_path / "moltbot.db", address="unix:/other")
        await other.open()
        assert store.nodes.address_of(other.nodes.node) == "unix:/other"
        await other.close()
        assert store.nodes.address_of(other.nodes.node) == ""


async def test_a_core_by_itself_takes_all_that_workers_left_and_clears_their_files_away(tmp_path: Path) -> None:
    async with opened(tmp_path / "moltbot.db", 2) as (one, other):
        await one.accept(new(1, session="a", rest=TurnInput(parts=said("question"))))
        await other.accept(new(1, session="b", rest=TurnInput(parts=said("question"))))
    assert len(list((tmp_path / "run" / "nodes").iterdir())) == 2
    alone = SqliteStore(tmp_path / "moltbot.db")
    await alone.open()
    taken = await alone.take_over()
    assert [orphan.turn.key.session.session for orphan in taken] == ["a", "b"]
    assert list((tmp_path / "run" / "nodes").iterdir()) == []
    await alone.close()
