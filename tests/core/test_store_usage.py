"""What was used, as every store keeps and lists it."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import pytest
from kept_turns import keep, new, texts
from moltbot_server.errors import StorageUnavailable
from moltbot_server.store import Store, UsagePage, UsageQuery, UsageRow
from moltbot_server.store.sqlite import SCHEMA_VERSION, SqliteStore


def used(day: int, model: str, user: str, turns: int = 1, cost: float = 0.0) -> UsageRow:
    return UsageRow(workspace="w", day=f"2026-01-{day:02}", model=model, user=user, turns=turns, cost=cost)


async def test_usage_is_listed_newest_day_first_and_goes_on_after_any_place(store: Store) -> None:
    made = [used(day, model, user) for day in (2, 1) for model in ("a", "b") for user in ("", "x", "y")]
    await store.add_usage(made)
    for by, length in ((("day", "model", "user"), 12), (("model", "user"), 6), (("day",), 2), (("user",), 3)):
        query = UsageQuery(workspace="w", first="2026-01-01", last="2026-01-31", by=by)
        whole = (await store.list_usage(query, after=None, limit=-1)).rows
        paged: list[UsageRow] = []
        while page := (await store.list_usage(query, after=_place(paged), limit=2)).rows:
            paged += page
        assert tuple(paged) == whole
        assert len(whole) == length
        assert sum(row.turns for row in whole) == 12
    assert (await store.list_usage(_all(), after=None, limit=-1)).rows == tuple(made)


def _place(rows: Sequence[UsageRow]) -> tuple[str, str, str] | None:
    return (rows[-1].day, rows[-1].model, rows[-1].user) if rows else None


def _all(**fields: str) -> UsageQuery:
    return UsageQuery(workspace="w", first="2026-01-01", last="2026-01-31", by=("day", "model", "user"), **fields)


async def test_usage_is_chosen_by_days_model_and_user_and_the_total_is_of_all_that_was_chosen(store: Store) -> None:
    await store.add_usage([used(1, "a", "x"), used(2, "a", "y", 2), used(3, "b", "x", 4, 1.5), used(3, "a", "", 8)])
    await store.add_usage([used(3, "b", "x", 16, 0.5), UsageRow(workspace="other", day="2026-01-02", turns=32)])
    chosen = {
        "all": await store.list_usage(_all(), after=None, limit=1),
        "model": await store.list_usage(_all(model="a"), after=None, limit=1),
        "user": await store.list_usage(_all(user="x"), after=None, limit=1),
        "none": await store.list_usage(_all(user="z"), after=None, limit=1),
    }

    assert {name: page.total.turns for name, page in chosen.items()} == {"all": 31, "model": 11, "user": 21, "none": 0}
    assert chosen["user"].rows == (used(3, "b", "x", 20, 2.0),)
    assert chosen["none"] == UsagePage(rows=(), total=UsageRow(workspace="w"))
    short = UsageQuery(workspace="w", first="2026-01-02", last="2026-01-02", by=("user",))
    assert [row.turns for row in (await store.list_usage(short, after=None, limit=9)).rows] == [2]


async def test_names_of_users_are_data_and_nothing_else(store: Store) -> None:
    names = ["'; DROP TABLE usage; --", "\x00", "张伟", "%", 'a"b', "é" * 256]
    await store.add_usage([used(1, "a", name) for name in names])
    found = (await store.list_usage(_all(), after=None, limit=-1)).rows

    assert {row.user for row in found} == set(names)
    assert [(await store.list_usage(_all(user=name), after=None, limit=-1)).total.turns for name in names] == [1] * 6


async def test_a_closed_store_says_so(store: Store) -> None:
    await store.close()
    with pytest.raises(StorageUnavailable):
        await store.list_usage(_all(), after=None, limit=1)
    with pytest.raises(StorageUnavailable):
        await store.add_usage([used(1, "a", "x")])


async def test_a_broken_database_says_so(tmp_path: Path) -> None:
    broken = SqliteStore(tmp_path / "broken.db")
    await broken.open()
    (tmp_path / "broken.db").unlink()
    with pytest.raises(StorageUnavailable):
        await broken.list_usage(_all(), after=None, limit=1)
    await broken.close()


SECOND_SCHEMA = """
PRAGMA journal_mode = WAL;
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
INSERT INTO sessions VALUES ('w', 's', 'hello', '', 'web', 1.0, 2.0, 0, 0);
INSERT INTO turns VALUES ('w', 's', 1, 'r', x'64', 'cancelled', 1.0, 2.0, 'm',
    x'9182a474797065a474657874a474657874a568656c6c6f',
    x'9182a474797065a474657874a474657874a36f6c64', NULL, 'cancelled');
PRAGMA user_version = 2;
"""
"""A database as the release before usage made it."""


async def test_a_database_from_before_usage_was_kept_goes_on_and_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "moltbot.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(SECOND_SCHEMA)
    for number in (1, 2):  # opened twice: the step is taken once
        store = SqliteStore(path)
        await store.open()
        await store.add_usage([used(1, "a", "x")])
        await keep(store, new(number + 1, text="more"), answer="new")
        assert (await store.list_usage(_all(), after=None, limit=-1)).total.turns == number
        assert await texts(store) == ["hello", "old", *["more", "new"] * number]
        await store.close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
