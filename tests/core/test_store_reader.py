"""The thread that reads: what it is asked, what it answers when it cannot, and its end."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from functools import partial

import msgspec
import pytest
from moltbot_server.errors import StorageDamaged, StorageUnavailable
from moltbot_server.store.reader import GroupReader


def connect() -> sqlite3.Connection:
    return sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)


async def test_queries_are_answered_in_the_order_in_which_they_were_asked_off_the_loops_thread() -> None:
    reader = GroupReader(connect())
    order: list[int] = []

    def query(number: int, connection: sqlite3.Connection) -> tuple[int, str]:
        order.append(number)
        return number, threading.current_thread().name

    answers = await asyncio.gather(*(reader.read(partial(query, n)) for n in range(100)))
    await reader.close()

    assert answers == [(number, "moltbot-reader") for number in range(100)]
    assert order == list(range(100))


@pytest.mark.parametrize(
    "fault",
    [
        sqlite3.OperationalError("no such table"),
        msgspec.DecodeError("not MessagePack"),
        ValueError("a mistake of ours"),
    ],
    ids=["the database", "what is stored", "the code"],
)
async def test_a_query_that_fails_is_told_to_its_asker_and_hurts_no_other(fault: Exception) -> None:
    def broken(connection: sqlite3.Connection) -> int:
        raise fault

    reader = GroupReader(connect())
    bad, good = reader.read(broken), reader.read(lambda connection: connection.execute("SELECT 7").fetchone()[0])

    with pytest.raises(StorageDamaged if isinstance(fault, msgspec.DecodeError) else StorageUnavailable):
        await bad
    assert await good == 7
    await reader.close()


async def test_what_was_asked_before_the_end_is_answered_and_what_comes_after_is_refused() -> None:
    reader = GroupReader(connect())
    before = reader.read(lambda _: 7)
    await reader.close()

    assert await before == 7
    with pytest.raises(StorageUnavailable):
        await reader.read(lambda _: 7)
