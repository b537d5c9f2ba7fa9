"""How long the acceptance of a turn may wait for company."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from moltbot_server.store import EndedTurn, NewTurn
from moltbot_server.store.patience import MOST, Patience
from moltbot_server.store.protocol import JournalEntry
from moltbot_server.store.sqlite import SqliteStore
from moltbot_server.turns import Event, SessionKey, TextDelta, TextPart, TurnKey, TurnState

MANY = 16


def key(number: int) -> TurnKey:
    return TurnKey(session=SessionKey(workspace="w", session=f"s{number}"), ordinal=1)


def text(number: int) -> list[JournalEntry]:
    return [JournalEntry(key=key(number), events=(Event(sequence=2, at=1.0, kind=TextDelta(text="a")),))]


class Clock:
    """The time, as far as patience knows it."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def learned(clock: Clock, seconds: float) -> Patience:
    """Return what has seen a hundred turns that had their first text after so many seconds."""
    patience = Patience()
    for number in range(100):
        patience.begin(key(number), MANY)
        clock.now += seconds
        patience.told(key(number))
        clock.now += 1000
        patience.told(key(number))
        patience.end(key(number))
    return patience


def test_nothing_waits_before_anything_is_known() -> None:
    assert Patience().begin(key(1), MANY) == 0.0


def test_a_turn_waits_for_a_part_of_what_its_model_takes_and_not_for_long(clock: Clock) -> None:
    assert learned(clock, 0.012).begin(key(200), MANY) == pytest.approx(0.004, rel=0.02)
    assert learned(clock, 3.0).begin(key(200), MANY) == MOST


def test_one_that_is_nearly_alone_waits_for_nobody(clock: Clock) -> None:
    assert learned(clock, 3.0).begin(key(200), 3) == 0.0


def test_a_turn_that_has_ended_teaches_nothing(clock: Clock) -> None:
    patience = learned(clock, 0.003)
    patience.begin(key(200), MANY)
    patience.end(key(200))
    clock.now += 1000
    patience.told(key(200))
    assert patience.begin(key(201), MANY) == pytest.approx(0.001, rel=0.02)


def new(number: int) -> NewTurn:
    return NewTurn(
        key=key(number), request_id=f"r{number}", digest=b"d", create_time=1.0, question=(TextPart(text="q"),)
    )


async def test_acceptances_wait_for_an_end_and_nobody_waits_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moltbot_server.store.patience.MOST", 30.0)
    store = SqliteStore(tmp_path / "moltbot.db")
    await store.open()
    for number in range(10):
        await store.accept(new(number))
    await store.append(text(0))
    store._patience._usual = 1000.0
    async with asyncio.timeout(15):
        waiting = store.accept(new(10))
        end = EndedTurn(
            key=key(0), state=TurnState.COMPLETED, end_time=2.0, events=(), answer=(TextPart(text="a"),), model="m"
        )
        await store.finish(end)
        assert await waiting is None

        waiting = store.accept(new(11))
        store.hurry(key(11))
        assert await waiting is None
    await store.close()
