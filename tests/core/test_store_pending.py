"""A write that is not answered yet, and those who wait for it."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref

import pytest
from moltbot_server.errors import MoltBotError, StorageFull
from moltbot_server.store import Pending


async def test_an_outcome_is_told_in_the_moment_that_it_is_known() -> None:
    pending: Pending[int] = Pending()
    heard: list[int | MoltBotError] = []
    pending.then(heard.append)
    assert heard == []

    pending.settle(7)

    assert heard == [7]


async def test_an_outcome_that_is_known_already_is_told_after_whoever_asks_has_gone_on() -> None:
    pending: Pending[int] = Pending()
    pending.settle(7)
    heard: list[int | MoltBotError] = []

    pending.then(heard.append)

    assert heard == []
    await asyncio.sleep(0)
    assert heard == [7]


async def test_it_can_be_awaited_before_and_after_its_outcome_is_known() -> None:
    pending: Pending[int] = Pending()
    waiting = asyncio.ensure_future(pending)
    await asyncio.sleep(0)
    pending.settle(7)

    assert await waiting == 7
    assert await pending == 7


async def test_what_the_store_could_not_do_is_raised_where_it_is_awaited() -> None:
    pending: Pending[int] = Pending()
    waiting = asyncio.ensure_future(pending)
    await asyncio.sleep(0)
    pending.settle(StorageFull("full"))

    with pytest.raises(StorageFull):
        await waiting


async def test_an_outcome_for_somebody_who_has_left_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    pending: Pending[int] = Pending()
    waiting = asyncio.ensure_future(pending)
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait({waiting})

    pending.settle(7)

    assert caplog.records == []


async def test_a_listener_that_raises_is_logged_and_hurts_nobody(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(outcome: int | MoltBotError) -> None:
        raise ValueError("not now")

    pending: Pending[int] = Pending()
    pending.then(refuse)

    pending.settle(7)

    assert [(record.levelno, bool(record.exc_info)) for record in caplog.records] == [(logging.ERROR, True)]
    assert await pending == 7


async def test_a_settled_write_keeps_no_listener_alive() -> None:
    class Turn:
        def hear(self, outcome: int | MoltBotError) -> None:
            pass

    pending: Pending[int] = Pending()
    turn = Turn()
    gone = weakref.ref(turn)
    pending.then(turn.hear)
    gc.disable()
    try:
        pending.settle(7)
        del turn
        assert gone() is None
    finally:
        gc.enable()
