"""Turns and ends that a single statement writes, and what it leaves to others as it was."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from kept_turns import ended, keep, new, texts
from moltbot_server.store import GUESSED, EndedTurn, NewTurn
from moltbot_server.store.outbox import delivery_of
from moltbot_server.store.protocol import JournalEntry
from moltbot_server.store.sqlite import SqliteStore
from moltbot_server.store.sqlite_at_once import Row, write_at_once
from moltbot_server.store.sqlite_turns import TAKEN_OVER
from moltbot_server.turns import Completed, Place, TurnInput


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    """An open store, in which one turn runs, of a session of that turn."""
    store = SqliteStore(tmp_path / "moltbot.db")
    await store.open()
    assert await store.accept(RUNS) is None
    await store._flush_used()  # which takes a transaction once a second
    yield store
    await store.close()


RUNS = new(1, session="runs")


def write(store: SqliteStore, *rows: Row) -> bool:
    """Write rows with the store's own connection, which nobody else uses now."""
    return write_at_once(store._writing, store.node, rows, ())


def contents(store: SqliteStore) -> list[tuple[Any, ...]]:
    """Return all rows of turns and sessions."""
    return [row for table in ("turns", "sessions") for row in store._writing.execute(f"SELECT * FROM {table}")]


def statements(store: SqliteStore) -> dict[str, None]:
    """Return where the writer's statements are noted: one that runs triggers comes again for each step of theirs."""
    heard: dict[str, None] = {}
    store._writing.set_trace_callback(lambda statement: heard.setdefault(statement))
    return heard


async def test_turns_and_ends_that_come_together_are_one_statement(store: SqliteStore) -> None:
    heard = statements(store)
    turns = [new(number, session=f"s{number % 3}", opens_session=number <= 3) for number in range(1, 20)]
    writes = [*map(store.accept, turns), store.finish(ended(RUNS))]

    assert [await each for each in writes] == [None] * 20  # type: ignore[misc]
    assert [each.split()[0] for each in heard] == ["INSERT"]
    assert await texts(store, "runs") == ["question", "answer"]
    assert [len(await texts(store, f"s{number}")) for number in range(3)] == [6, 7, 6]


async def test_a_turn_that_ended_before_it_was_stored_is_one_row(store: SqliteStore) -> None:
    turn = new(1, rest=TurnInput(parts=new().question))
    heard = statements(store)
    writes = [store.accept(turn), store.finish(ended(turn))]

    assert [await each for each in writes] == [None, None]  # type: ignore[misc]
    assert [each.split()[0] for each in heard] == ["INSERT"]
    assert await texts(store) == ["question", "answer"]
    assert store._writing.execute("SELECT rest FROM turns WHERE session = 's'").fetchall() == [(None,)]


@pytest.mark.parametrize("count", [*range(1, 14), 31, 33, 500, 512])
async def test_any_number_of_turns_is_written_whole(store: SqliteStore, count: int) -> None:
    before = len(contents(store))
    assert write(store, *(new(number, opens_session=number == 1) for number in range(1, count + 1)))
    assert len(contents(store)) == before + count + 1


async def test_what_is_stored_at_once_is_as_what_is_stored_by_a_transaction(tmp_path: Path) -> None:
    rest = TurnInput(parts=RUNS.question)
    turns = [new(1, title="title", user="user", channel="slack", rest=rest, deadline=7.0)]
    turns += [new(2, opens_session=False, rest=rest), new(1, session="t", ephemeral=True)]
    end = ended(turns[1])
    found = []
    for way in ("at once", "a transaction"):
        store = SqliteStore(tmp_path / f"{way}.db")
        await store.open()
        store._turns._node = store._places.node = "n"
        if way == "a transaction":
            store._writer._at_once = lambda *_: False
        heard = statements(store)
        assert [await store.accept(turn) for turn in turns] == [None] * 3
        assert await store.finish(end) is None
        assert next(iter(heard)).split()[0] == ("INSERT" if way == "at once" else "BEGIN")
        await store._flush_used()
        found.append(contents(store))
        await store.close()
    assert [row[-1] > 0 for rows in found for row in rows[3:]] == [True] * 4, "their versions are drawn"
    first, second = ([*rows[:3], *(row[:-1] for row in rows[3:])] for rows in found)
    assert first == second


@dataclass(frozen=True, slots=True)
class Unusual:
    """Rows that a single statement does not write, and what stands in their way."""

    rows: Callable[[SqliteStore], Sequence[Row]]
    before: str = ""


def _delivered() -> EndedTurn:
    asked = TurnInput(parts=RUNS.question, reply_to=Place(channel="slack", address="C1"))
    end = ended(RUNS)
    last = end.events[-1].kind
    assert isinstance(last, Completed)
    return msgspec.structs.replace(end, delivery=delivery_of(RUNS.key, asked, last))


UNUSUAL = {
    "a request_id that is another turn's": Unusual(lambda _: [new(2, request_id=RUNS.request_id)]),
    "a number that is another turn's": Unusual(lambda _: [new(1, session="runs", request_id="other")]),
    "one number for two": Unusual(lambda _: [new(3), new(3, request_id="other")]),
    "a session that was taken for new": Unusual(lambda _: [new(2, session="runs", version=GUESSED)]),
    "a session that is not there any more": Unusual(lambda _: [new(2, session="gone", version=5)]),
    "a session of another node": Unusual(
        lambda _: [new(2, session="runs", version=5)], "UPDATE sessions SET node = 'other'"
    ),
    "a session of nobody": Unusual(lambda _: [new(2, session="runs", version=5)], "UPDATE sessions SET node = ''"),
    "an end of a turn that was taken over": Unusual(lambda _: [ended(RUNS)], "UPDATE turns SET epoch = 2"),
    "an end of a turn of another node": Unusual(lambda _: [ended(RUNS)], "UPDATE turns SET node = 'other'"),
    "an end of a turn that is not there any more": Unusual(lambda _: [ended(RUNS)], "DELETE FROM turns"),
    "an end with something to deliver": Unusual(lambda _: [_delivered()]),
    "what happened in a turn": Unusual(lambda _: [(JournalEntry(key=RUNS.key, events=ended(RUNS).events),)]),
}


@pytest.mark.parametrize("case", UNUSUAL)
async def test_what_is_unusual_is_left_with_all_that_came_with_it(store: SqliteStore, case: str) -> None:
    unusual = UNUSUAL[case]
    if unusual.before:
        store._writing.execute(unusual.before)
    before = contents(store)
    usual: list[NewTurn] = [new(1, session="usual"), new(2, session="usual", opens_session=False)]
    assert not write(store, usual[0], *unusual.rows(store), usual[1])
    assert contents(store) == before
    assert write(store, *usual)


async def test_an_end_of_a_turn_that_was_kept_in_the_table_is_left(store: SqliteStore) -> None:
    assert not write_at_once(store._writing, store.node, [ended(RUNS)], {RUNS.key})


async def test_the_others_of_a_group_are_stored_beside_one_that_another_core_has_taken_over(store: SqliteStore) -> None:
    store._writing.execute("UPDATE turns SET epoch = 2, node = 'other'")
    writes = [store.accept(new(1)), store.finish(ended(RUNS))]

    assert await writes[0] is None
    with pytest.raises(type(TAKEN_OVER)):
        await writes[1]
    assert (await texts(store), await texts(store, "runs")) == (["question"], ["question"])


async def test_a_title_is_given_to_a_session_that_has_none(store: SqliteStore) -> None:
    await keep(store, new(1, title=""))
    assert await store.accept(new(2, title="later")) is None
    assert await store.accept(new(3, title="last")) is None
    assert store._writing.execute("SELECT title FROM sessions WHERE id = 's'").fetchall() == [("later",)]


async def test_an_error_of_the_database_is_none_of_the_rows(store: SqliteStore) -> None:
    store._writing.execute("PRAGMA query_only = ON")
    with pytest.raises(sqlite3.OperationalError):
        write(store, new(1))
