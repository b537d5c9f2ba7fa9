"""What turns under way recorded, in files beside the database: whoever takes a node's turns over finds it there."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NoReturn

import pytest
from kept_turns import ended, key, new, said
from moltbot_server.store import sqlite_journal_files
from moltbot_server.store.protocol import JournalEntry
from moltbot_server.store.sqlite import SqliteStore
from moltbot_server.store.sqlite_journal_files import JournalFiles, folder_of, recorded
from moltbot_server.turns import Event, TextDelta, TurnInput, TurnKey

ASKED = TurnInput(parts=said("question"))


def turn(ordinal: int = 1) -> TurnKey:
    return TurnKey(session=key(), ordinal=ordinal)


def wrote(text: str, *, ordinal: int = 1, sequence: int = 1, epoch: int = 1) -> JournalEntry:
    event = Event(sequence=sequence, at=1.0, kind=TextDelta(text=text))
    return JournalEntry(key=turn(ordinal), events=(event,), epoch=epoch)


def texts(entries: list[JournalEntry]) -> list[str]:
    return [event.kind.text for entry in entries for event in entry.events if isinstance(event.kind, TextDelta)]


@pytest.fixture
def files(tmp_path: Path) -> JournalFiles:
    files = JournalFiles(tmp_path / "turns", "here")
    files.open()
    files.begin(turn())
    return files


@pytest.fixture
def others(tmp_path: Path) -> JournalFiles:
    return JournalFiles(tmp_path / "turns", "there")


def sizes(tmp_path: Path) -> list[int]:
    return [path.stat().st_size for path in sorted((tmp_path / "turns" / "here").iterdir())]


def test_what_a_node_appended_is_taken_in_order_and_then_forgotten(files: JournalFiles, others: JournalFiles) -> None:
    assert files.append([wrote("one"), wrote("two", sequence=2)])
    assert files.append([wrote("three", sequence=3)])

    assert others.others() == {"here"}
    assert texts(list(others.take("here"))) == ["one", "two", "three"]
    assert texts(list(others.take("here"))) == ["one", "two", "three"]  # what took it may have died of it
    others.forget(["here"])
    assert others.others() == set()
    assert list(others.take("here")) == []


def test_a_node_whose_files_were_taken_appends_no_more(files: JournalFiles, others: JournalFiles) -> None:
    assert files.append([wrote("seen")])
    assert texts(list(others.take("here"))) == ["seen"]

    assert not files.append([wrote("not to be seen", sequence=2)])
    assert not files.append([wrote("nor this", sequence=3)])
    files.begin(turn(2))
    assert not files.append([wrote("nor that", ordinal=2)])
    assert len(files) == 0


def test_only_what_a_turn_that_runs_says_at_its_epoch_is_appended(files: JournalFiles) -> None:
    assert not files.append([wrote("of nobody", ordinal=2)])
    assert not files.append([wrote("of another core", epoch=2)])
    files.begin(turn(), epoch=2)
    assert files.append([wrote("mine", epoch=2)])
    files.end(turn())
    assert not files.append([wrote("late", epoch=2, sequence=2)])


def test_the_last_file_is_emptied_and_others_are_deleted_when_their_turns_have_ended(
    files: JournalFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_journal_files, "LARGEST", 100)
    files.begin(turn(2))
    assert files.append([wrote("x" * 200)])
    assert files.append([wrote("y", ordinal=2)])
    first, second = sizes(tmp_path)
    assert first > 200 > second > 0

    files.end(turn(2))
    assert sizes(tmp_path) == [first, 0]
    files.end(turn())
    assert sizes(tmp_path) == [0]


@pytest.mark.parametrize("damage", ["cut", "zeros", "flipped"])
def test_what_was_not_written_whole_is_not_read_nor_what_is_behind_it(
    files: JournalFiles, others: JournalFiles, tmp_path: Path, damage: str
) -> None:
    assert files.append([wrote("whole")])
    (first,) = sizes(tmp_path)
    assert files.append([wrote("half", sequence=2)])
    path = tmp_path / "turns" / "here" / "1"
    data = path.read_bytes()
    middle = (first + len(data)) // 2
    damaged = {
        "cut": data[:middle],
        "zeros": data[:middle] + bytes(len(data) - middle),
        "flipped": data.replace(b"half", b"hulf"),
    }
    path.write_bytes(damaged[damage])

    assert texts(list(others.take("here"))) == ["whole"]


def test_half_a_write_is_undone_so_that_what_comes_behind_it_is_read(
    files: JournalFiles, others: JournalFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert files.append([wrote("before")])
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[: len(data) // 2]))
    assert not files.append([wrote("half", sequence=2)])
    monkeypatch.undo()
    assert files.append([wrote("after", sequence=2)])

    assert texts(list(others.take("here"))) == ["before", "after"]


def test_a_name_that_is_given_again_has_nothing_of_the_turn_before(files: JournalFiles, others: JournalFiles) -> None:
    files.begin(turn(2))
    assert files.append([wrote("of the first"), wrote("of the first", sequence=2), wrote("of the other", ordinal=2)])
    files.end(turn())  # it was not stored, or its session was deleted
    files.begin(turn())

    assert texts(list(others.take("here"))) == ["of the other"]


async def test_a_refused_turn_that_is_begun_again_at_once_keeps_what_it_said(
    files: JournalFiles, others: JournalFiles
) -> None:
    assert files.append([wrote("kept")])
    files.end_soon(turn())
    files.begin(turn())
    await asyncio.sleep(0)
    assert texts([entry for _, entry in recorded(files._folder)]) == ["kept"]

    files.end_soon(turn())
    await asyncio.sleep(0)
    assert list(others.take("here")) == []


def test_a_node_that_leaves_leaves_only_what_is_to_be_carried_on(files: JournalFiles, tmp_path: Path) -> None:
    assert files.append([wrote("to be carried on")])
    files.close()
    assert texts([entry for _, entry in recorded(tmp_path / "turns")]) == ["to be carried on"]

    idle = JournalFiles(tmp_path / "turns", "idle")
    idle.open()
    idle.close()
    assert os.listdir(tmp_path / "turns") == ["here"]


def test_what_another_release_wrote_is_passed_over(files: JournalFiles, others: JournalFiles, tmp_path: Path) -> None:
    assert files.append([wrote("read")])
    body = b"\x93\x01\x02\x03"
    head = sqlite_journal_files._HEAD.pack(len(body), sqlite_journal_files.zlib.crc32(body))
    with (tmp_path / "turns" / "here" / "1").open("ab") as file:
        file.write(head + body)
    assert files.append([wrote("read too", sequence=2)])

    assert texts(list(others.take("here"))) == ["read", "read too"]


# --- in a store ------------------------------------------------------------------------------------------------------


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(tmp_path / "moltbot.db")
    await store.open()
    yield store
    await store.close()


async def successor(tmp_path: Path) -> list[str]:
    """Return the text that the next core finds of turns under way."""
    later = SqliteStore(tmp_path / "moltbot.db")
    await later.open()
    try:
        orphans = await later.take_over()
        return [event.kind.text for orphan in orphans for event in orphan.turn.events]  # type: ignore[union-attr]
    finally:
        await later.close()


async def test_the_database_takes_what_the_files_cannot(
    store: SqliteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.accept(new(rest=ASKED))
    assert list(await store.append([wrote("in a file ")])) == []
    monkeypatch.setattr(os, "write", lambda *_: 0)
    assert list(await store.append([wrote("in the database ", sequence=2)])) == []
    monkeypatch.undo()
    assert list(await store.append([wrote("in a file again", sequence=3)])) == []
    await store.close()

    assert await successor(tmp_path) == ["in a file ", "in the database ", "in a file again"]


async def test_a_core_whose_turns_were_taken_is_told_so(store: SqliteStore, tmp_path: Path) -> None:
    await store.accept(new(rest=ASKED))
    assert list(await store.append([wrote("seen")])) == []
    store._lock.release()  # as if it were gone
    assert await successor(tmp_path) == ["seen"]

    assert list(await store.append([wrote("never seen", sequence=2)])) == [turn()]


async def test_nothing_is_left_of_turns_that_have_ended(store: SqliteStore, tmp_path: Path) -> None:
    asked = new(rest=ASKED)
    await store.accept(asked)
    await store.append([wrote("secret")])
    assert [path.stat().st_size > 0 for path in folder_of(tmp_path / "moltbot.db").glob("*/*")] == [True]
    await store.finish(ended(asked))

    assert [path.stat().st_size for path in folder_of(tmp_path / "moltbot.db").glob("*/*")] == [0]
    await store.close()
    assert os.listdir(folder_of(tmp_path / "moltbot.db")) == []


async def test_a_write_is_answered_when_it_is_on_the_disk(store: SqliteStore) -> None:
    """SQLite's word for it is FULL: a write-ahead log that is synced by each commit."""
    found = await store._writer.submit(lambda connection: connection.execute("PRAGMA synchronous").fetchone())
    assert found == (2,)


def test_a_disk_that_takes_nothing_is_said_once_and_again_when_it_happens_again(
    files: JournalFiles, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full() -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for _ in range(2):
        caplog.clear()
        with monkeypatch.context() as disk:
            disk.setattr(files, "_open_file", full)
            assert [files.append([wrote("a")]) for _ in range(3)] == [False] * 3
        assert [record.message for record in caplog.records] == ["what turns record goes to the database"]
        assert files.append([wrote("a")])
