"""The threads that work in groups: what goes together, and what does not wait."""

from __future__ import annotations

import asyncio
import sqlite3
from typing import Any

from moltbot_server.store.groups import GroupThread
from moltbot_server.store.pending import Pending

LONG = 30.0


class Job(Pending[int]):
    """Something to do."""


class Thread(GroupThread[Job]):
    """Answers each job with the number of its group."""

    def __init__(self) -> None:
        super().__init__(sqlite3.connect(":memory:", check_same_thread=False), name="groups")
        self.groups = 0

    def carry_out(self, connection: sqlite3.Connection, group: list[Job]) -> list[tuple[Job, Any]]:
        self.groups += 1
        return [(job, self.groups) for job in group]


async def test_what_may_wait_goes_with_what_may_not() -> None:
    thread = Thread()
    patient = thread.put(Job(), patience=LONG)
    await asyncio.sleep(0.01)
    assert thread.groups == 0

    async with asyncio.timeout(LONG / 2):
        assert [await thread.put(Job()), await patient] == [1, 1]
    await thread.close()


async def test_what_may_wait_goes_by_itself_when_it_has_waited() -> None:
    thread = Thread()
    async with asyncio.timeout(LONG / 2):
        assert await thread.put(Job(), patience=0.02) == 1
    await thread.close()


async def test_the_least_patient_one_decides() -> None:
    thread = Thread()
    first, second = thread.put(Job(), patience=LONG), thread.put(Job(), patience=0.02)
    async with asyncio.timeout(LONG / 2):
        assert [await first, await second] == [1, 1]
    await thread.close()


async def test_who_hurries_waits_no_longer_and_those_that_come_later_do() -> None:
    thread = Thread()
    thread.hurry()  # there is nobody
    first = thread.put(Job(), patience=LONG)
    async with asyncio.timeout(LONG / 2):
        thread.hurry()
        assert await first == 1
        second = thread.put(Job(), patience=LONG)
        await asyncio.sleep(0.01)
        assert thread.groups == 1
        thread.hurry()
        assert await second == 2
    await thread.close()
