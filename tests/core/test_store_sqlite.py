"""The embedded store when things break: the disk, the file, another program, a write that cannot be."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import sqlite3
import stat
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
from kept_turns import TIMES, ended, everything, keep, key, new, said, texts
from moltbot_server.errors import StorageDamaged, StorageFull, StorageUnavailable
from moltbot_server.store.outbox import delivery_of
from moltbot_server.store.sqlite import SqliteStore
from moltbot_server.store.sqlite_journal_files import JournalFiles
from moltbot_server.store.sqlite_schema import SCHEMA_VERSION
from moltbot_server.turns import Completed, FinishReason, Place, Role, TurnInput, TurnState, encode


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


async def test_what_is_answered_is_synced_and_only_its_owner_reads_it(store: SqliteStore, path: Path) -> None:
    await keep(store, new())

    mode, level = [store._writing.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
    assert (mode, level) == ("wal", 2)
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0, file.name


async def test_a_disk_that_is_full_at_the_start_may_have_room_later(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(JournalFiles, "open", full)
    with pytest.raises(StorageFull, match="the disk is full") as told:
        await SqliteStore(path).open()
    assert told.value.retry_after
    monkeypatch.undo()

    def full_database(_: object) -> None:
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorname = "SQLITE_FULL"
        raise error

    monkeypatch.setattr(SqliteStore, "_connect", full_database)
    with pytest.raises(StorageFull, match="the disk is full") as told:
        await SqliteStore(path).open()
    assert told.value.retry_after


async def test_a_bad_write_hurts_no_other_of_its_group(store: SqliteStore) -> None:
    store._writer.submit(lambda _: time.sleep(0.1))
    turns = [new(ordinal) for ordinal in range(1, 60)]
    good = [store.accept(turn) for turn in turns[:30]]
    bad_row = store.accept(new(session="bad", title="\ud800"))
    bad_write = store._writer.submit(lambda connection: connection.execute("INSERT INTO nowhere VALUES (1)"))
    broken = store._writer.submit(lambda _: 1 // 0)
    good += [store.accept(turn) for turn in turns[30:]]

    for write in (bad_row, bad_write, broken):
        with pytest.raises(StorageUnavailable):
            await write
    assert await asyncio.gather(*good) == [None] * 59
    assert len(await texts(store)) == 59


async def test_a_write_that_breaks_half_way_leaves_nothing(store: SqliteStore) -> None:
    def half(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO sessions VALUES ('w', 'half', '', '', '', 1, 1, 0, 0)")
        raise ValueError("half way")

    with pytest.raises(StorageUnavailable):
        await store._writer.submit(half)
    await keep(store, new())
    assert await everything(store) == ["s"]


async def test_a_locked_database_refuses_all_writes_in_the_time_of_one_and_recovers(
    store: SqliteStore, path: Path
) -> None:
    await keep(store, new())
    store._writing.execute("PRAGMA busy_timeout = 300")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    began = time.monotonic()
    outcomes = await asyncio.gather(*(store.accept(new(n)) for n in range(2, 102)), return_exceptions=True)

    assert {type(outcome) for outcome in outcomes} == {StorageUnavailable}
    assert all(outcome.retry_after for outcome in outcomes)  # type: ignore[union-attr]
    assert time.monotonic() - began < 2
    assert await texts(store) == ["question", "answer"]
    other.execute("ROLLBACK")
    other.close()
    assert await store.accept(new(2)) is None


async def test_readers_do_not_wait_for_a_writer(store: SqliteStore, path: Path) -> None:
    await keep(store, new())
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    assert await asyncio.wait_for(texts(store), 1) == ["question", "answer"]
    other.execute("ROLLBACK")
    other.close()


def opened(path: Path) -> None:
    """Open a store and close it again."""

    async def both() -> None:
        store = SqliteStore(path)
        await store.open()
        await store.close()

    asyncio.run(both())


async def test_a_database_of_the_release_before_keeps_what_is_in_it_and_takes_more(path: Path) -> None:
    store = SqliteStore(path)
    await store.open()
    await keep(store, new(1, text="one"), answer="whole")
    await keep(store, new(2, text="two"), answer="ha", state=TurnState.CANCELLED)
    await store.close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            "ALTER TABLE turns DROP COLUMN finish; ALTER TABLE turns DROP COLUMN rest; DROP TABLE journal;"
            "ALTER TABLE turns DROP COLUMN deadline; ALTER TABLE turns DROP COLUMN epoch; DROP TABLE usage;"
            "DROP TABLE outbox;"
            "DROP INDEX turns_running; CREATE INDEX turns_running ON turns (state) WHERE state = 'running';"
            "ALTER TABLE sessions DROP COLUMN node; ALTER TABLE sessions DROP COLUMN version;"
            "ALTER TABLE turns DROP COLUMN node;"
            "PRAGMA user_version = 1;"
        )

    for number in (3, 4):  # opened twice: the step is taken once
        store = SqliteStore(path)
        await store.open()
        await keep(store, new(number, text="more"), answer="whole")
        messages = await store.list_messages(key(), after=(0, 0), limit=100)
        await store.close()

    ends = [message.finish_reason for message in messages if message.role is Role.ASSISTANT]
    assert ends == [None, FinishReason.CANCELLED, FinishReason.STOP, FinishReason.STOP]
    assert [message.text for message in messages] == ["one", "whole", "two", "ha", "more", "whole", "more", "whole"]
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)


# As the release before made it (schema 4), with a turn that ended and one that ran when its core was stopped.
RELEASE_BEFORE = """
CREATE TABLE sessions (
    workspace TEXT NOT NULL, id TEXT NOT NULL, title TEXT NOT NULL, user TEXT NOT NULL, channel TEXT NOT NULL,
    create_time REAL NOT NULL, update_time REAL NOT NULL, base_ordinal INTEGER NOT NULL, ephemeral INTEGER NOT NULL,
    PRIMARY KEY (workspace, id)
) WITHOUT ROWID;
CREATE INDEX sessions_by_use ON sessions (workspace, ephemeral, update_time DESC, id);
CREATE TABLE turns (
    workspace TEXT NOT NULL, session TEXT NOT NULL, ordinal INTEGER NOT NULL, request_id TEXT NOT NULL,
    digest BLOB NOT NULL, state TEXT NOT NULL, create_time REAL NOT NULL, end_time REAL NOT NULL DEFAULT 0,
    model TEXT NOT NULL DEFAULT '', question BLOB NOT NULL, answer BLOB, events BLOB, finish TEXT NOT NULL DEFAULT ''
);
CREATE UNIQUE INDEX turns_by_session ON turns (workspace, session, ordinal);
CREATE UNIQUE INDEX turns_by_request ON turns (workspace, request_id);
CREATE INDEX turns_running ON turns (state) WHERE state = 'running';
CREATE TABLE usage (
    workspace TEXT NOT NULL, day TEXT NOT NULL, model TEXT NOT NULL, user TEXT NOT NULL, turns INTEGER NOT NULL,
    input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, cached_input_tokens INTEGER NOT NULL,
    cached_turns INTEGER NOT NULL, cost REAL NOT NULL,
    PRIMARY KEY (workspace, day, model, user)
) WITHOUT ROWID;
ALTER TABLE turns ADD COLUMN rest BLOB;
ALTER TABLE turns ADD COLUMN deadline REAL NOT NULL DEFAULT 0;
ALTER TABLE turns ADD COLUMN epoch INTEGER NOT NULL DEFAULT 1;
CREATE TABLE journal (
    workspace TEXT NOT NULL, session TEXT NOT NULL, ordinal INTEGER NOT NULL, sequence INTEGER NOT NULL,
    events BLOB NOT NULL, PRIMARY KEY (workspace, session, ordinal, sequence)
) WITHOUT ROWID;
INSERT INTO sessions VALUES ('w', 's', 'title', 'ann', 'web', 1, 2, 0, 0);
PRAGMA user_version = 4;
"""


@pytest.mark.parametrize("address", ["", "unix:/nowhere"], ids=["one core", "a worker"])
async def test_turns_of_the_release_before_are_carried_on_and_their_session_goes_on(path: Path, address: str) -> None:
    asked = TurnInput(parts=(), model="m")
    ended_row = (encode(said("one")), encode(said("whole")), None, "stop", None)
    running_row = (encode(said("two")), None, None, "", encode(asked))
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(RELEASE_BEFORE)
        for ordinal, state, row in ((1, "completed", ended_row), (2, "running", running_row)):
            connection.execute(
                "INSERT INTO turns (workspace, session, ordinal, request_id, digest, state, create_time, question, "
                "answer, events, finish, rest) VALUES ('w', 's', ?, ?, x'64', ?, 1, ?, ?, ?, ?, ?)",
                (ordinal, f"r{ordinal}", state, *row),
            )
        connection.commit()

    store = SqliteStore(path, address=address)
    await store.open()
    (orphan,) = await store.take_over()
    assert (orphan.turn.key, orphan.epoch) == (new(2).key, 2)
    assert orphan.input == TurnInput(parts=said("two"), model="m")
    await store.finish(msgspec.structs.replace(ended(new(2), answer="too"), epoch=2))
    await keep(store, new(3, text="three"))
    assert await texts(store) == ["one", "whole", "two", "too", "three", "answer"]
    loaded = await store.load_session(key(), 10)
    assert loaded is not None
    assert (loaded.last_ordinal, loaded.running_on, len(loaded.messages)) == (3, "", 6)
    await store.close()


def test_a_database_of_a_newer_release_is_left_alone(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    connection.close()
    before = path.read_bytes()

    with pytest.raises(StorageUnavailable, match="newer release"):
        opened(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"not a database at all" * 100, b"SQLite format 3\x00" + b"\xff" * 4000])
def test_a_file_that_is_no_database_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)

    with pytest.raises(StorageUnavailable):
        opened(path)


async def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises((StorageUnavailable, OSError)):
        await SqliteStore(tmp_path / "file" / "moltbot.db").open()
    with pytest.raises(StorageUnavailable):
        await SqliteStore(tmp_path).open()


@pytest.fixture
async def filled(path: Path) -> Path:
    """A closed database of sixty sessions."""
    store = SqliteStore(path)
    await store.open()
    for number in range(60):
        question, answer = QUESTION.format(*[number] * 40), ANSWER.format(*[number] * 40)
        await keep(store, new(1, session=f"s{number}", text=question), answer=answer)
    await store.close()
    return path


def test_a_damaged_page_is_noticed_and_never_served(filled: Path) -> None:
    whole = filled.read_bytes()
    size = int.from_bytes(whole[16:18], "big")
    chance = random.Random(3)
    noticed = 0
    for page in range(1, len(whole) // size, 3):
        damaged = bytearray(whole)
        damaged[page * size : page * size + size] = chance.randbytes(size)
        filled.write_bytes(bytes(damaged))
        noticed += asyncio.run(_damage(filled))

    assert noticed > 0


QUESTION, ANSWER = "question {} " * 40, "answer {} " * 40


async def _damage(path: Path) -> int:
    """Read everything there is; return 1 when the damage was noticed. What is read must be what was written."""
    store = SqliteStore(path)
    seen = 0
    try:
        await store.open()
    except (StorageDamaged, StorageUnavailable):
        return 1
    try:
        for number in range(60):
            try:
                read = await texts(store, f"s{number}")
            except (StorageDamaged, StorageUnavailable):
                seen = 1
                continue
            assert read in ([], [QUESTION.format(*[number] * 40), ANSWER.format(*[number] * 40)]), (
                "damaged text was served"
            )
            seen = seen or int(read == [])
    finally:
        await store.close()
    return seen


async def test_a_damaged_row_is_refused_and_the_others_are_served(store: SqliteStore, path: Path) -> None:
    damaged, whole = new(session="damaged"), new(session="whole")
    for turn in (damaged, whole):
        await keep(store, turn)
    connection = sqlite3.connect(path)
    connection.execute("UPDATE turns SET events = x'c1', answer = x'93ff' WHERE session = 'damaged'")
    connection.commit()
    connection.close()

    for read in (store.find_turn(damaged.key), texts(store, "damaged"), store.load_session(key("damaged"), 10)):
        with pytest.raises(StorageDamaged):
            await read
    assert await store.find_turn(whole.key) is not None
    assert await texts(store, "whole") == ["question", "answer"]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


async def test_a_damaged_turn_of_a_core_that_is_gone_keeps_no_other_one_from_being_carried_on(
    store: SqliteStore, path: Path
) -> None:
    for name in "abc":
        await store.accept(new(session=name, request_id=name, rest=TurnInput(parts=said("question"))))
    await store.close()
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE turns SET rest = x'c1' WHERE session = 'b'")
    after = SqliteStore(path)
    await after.open()

    assert [orphan.turn.key.session.session for orphan in await after.take_over()] == ["a", "c"]
    found = await after.find_turn(new(session="b").key)
    assert found is not None
    assert (found.state, found.retryable) == (TurnState.FAILED, True)
    await after.close()


async def test_a_full_disk_refuses_writes_serves_reads_and_recovers_by_itself(tiny_disk: Path) -> None:
    store = SqliteStore(tiny_disk / "moltbot.db")
    await store.open()
    stored = 0

    async def fill() -> None:
        nonlocal stored
        for ordinal in range(1, 1000):
            await keep(store, new(ordinal, text="x" * 4000))
            stored = ordinal

    with pytest.raises(StorageFull) as caught:
        await fill()
    assert caught.value.retry_after
    assert stored > 10
    assert len(await texts(store)) >= min(100, 2 * stored)
    found = await store.find_turn(new(stored).key)
    assert found is not None
    assert found.events

    subprocess.run(["mount", "-o", "remount,size=8m", str(tiny_disk)], check=True)  # noqa: ASYNC221 - a moment
    turn = new(2000, text="there is room again")
    assert await store.accept(turn) is None
    await store.finish(ended(turn))
    assert (await texts(store, "s"))[0].startswith("x")
    await store.close()


async def test_two_thousand_writes_share_their_syncs(store: SqliteStore) -> None:
    groups = []
    write = store._writer._write

    def counted(connection: sqlite3.Connection, group: list[object]) -> object:
        groups.append(len(group))
        return write(connection, group)  # type: ignore[arg-type]

    store._writer._write = counted  # type: ignore[method-assign,assignment]
    await asyncio.gather(*(store.accept(new(ordinal)) for ordinal in range(1, 2001)))

    assert sum(groups) == 2000
    assert len(groups) < 200
    assert max(groups) <= 512


async def test_a_database_that_forgets_as_much_as_it_is_given_does_not_grow(store: SqliteStore) -> None:
    sizes = []
    for round_ in range(6):
        turns = [new(session=f"{round_}-{number}", text="x" * 2000) for number in range(400)]
        await asyncio.gather(*(store.accept(turn) for turn in turns), *(store.finish(ended(turn)) for turn in turns))
        while await store.prune(next(TIMES), ephemeral=False):
            continue
        sizes.append(store._writing.execute("PRAGMA page_count").fetchone()[0])
    assert sizes[-1] <= 1.2 * sizes[0], sizes


def traced(store: SqliteStore) -> list[str]:
    """Return where the writer's statements are noted; those that say when sessions were used come once a second."""
    heard: list[str] = []

    def hear(statement: str) -> None:
        if not statement.startswith("UPDATE sessions SET update_time"):
            heard.append(statement.split()[0])

    store._writing.set_trace_callback(hear)
    return heard


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
    await store.finish(msgspec.structs.replace(end, delivery=delivery_of(turn.key, asked, last)))

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
