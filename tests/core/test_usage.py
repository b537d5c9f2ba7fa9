"""The ledger: what turns use is counted by day, model and user, and kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from kept_turns import Reopen, keep, new
from moltbot_server.config_models import Budget, Price
from moltbot_server.errors import StorageFull
from moltbot_server.metrics import Metrics
from moltbot_server.store import Pending, Store, UsageQuery, UsageRow
from moltbot_server.turns import Usage
from moltbot_server.usage import OTHERS
from moltbot_server.usage import ledger as ledger_module
from moltbot_server.usage.ledger import cost_of
from prometheus_client.parser import text_string_to_metric_families
from usage_books import CHEAP, DAY, WORKSPACE_DAY, FailingStore, books


@pytest.fixture
async def failing(tmp_path: Path) -> AsyncIterator[FailingStore]:
    """An open store that can fail."""
    store = FailingStore(tmp_path / "moltbot.db")
    await store.open()
    yield store
    await store.close()


async def test_turns_are_summed_by_day_model_and_user(store: Store) -> None:
    async with books(store) as kept:
        kept.use(usage=Usage(input_tokens=10, output_tokens=3, cached_input_tokens=4), price=CHEAP)
        kept.use(usage=Usage(input_tokens=5, output_tokens=1), price=CHEAP)
        kept.use("bob")
        kept.use(model="n", cached=True, price=CHEAP)
        kept.use(workspace="elsewhere")
        kept.clock.now += DAY
        kept.use()
        await kept.ledger.flush()
        found = await kept.rows()

    ann: dict[str, Any] = {"workspace": "w", "user": "ann"}
    assert found == (
        UsageRow(**ann, day="2026-01-31", model="m", turns=1, input_tokens=80, output_tokens=20),
        UsageRow(
            **ann,
            day="2026-01-30",
            model="m",
            turns=2,
            input_tokens=15,
            output_tokens=4,
            cached_input_tokens=4,
            cost=23.0,
        ),
        UsageRow(workspace="w", user="bob", day="2026-01-30", model="m", turns=1, input_tokens=80, output_tokens=20),
        UsageRow(**ann, day="2026-01-30", model="n", turns=1, cached_turns=1),
    )


@pytest.mark.parametrize(
    ("price", "cost"),
    [
        (Price(input=3.0, output=15.0), 100 * 3.0 + 10 * 15.0),
        (Price(input=3.0, output=15.0, cached_input=0.3), 60 * 3.0 + 40 * 0.3 + 10 * 15.0),
        (Price(input=3.0, output=15.0, cached_input=0.0), 60 * 3.0 + 10 * 15.0),
        (Price(input=0.0, output=0.0), 0.0),
    ],
)
def test_a_turn_costs_what_its_tokens_cost_in_millionths(price: Price, cost: float) -> None:
    usage = Usage(input_tokens=100, output_tokens=10, cached_input_tokens=40)

    assert cost_of(usage, price) == pytest.approx(cost)


def test_more_cached_than_read_makes_no_credit() -> None:
    usage = Usage(input_tokens=10, cached_input_tokens=40)

    assert cost_of(usage, Price(input=3.0, output=0.0, cached_input=0.3)) == pytest.approx(3.0)


async def test_sums_grow_over_writes_and_restarts(store: Store, reopen: Reopen) -> None:
    async with books(store) as kept:
        kept.use()
        await kept.ledger.flush()
        kept.use()
    async with books(await reopen()) as kept:
        kept.use()
        await kept.ledger.flush()
        (row,) = await kept.rows()

    assert (row.turns, row.input_tokens, row.output_tokens) == (3, 240, 60)


async def test_what_was_used_is_written_by_itself_within_seconds(failing: FailingStore) -> None:
    async with books(failing) as kept:
        for turns in (1, 2):
            failing.wrote = asyncio.Event()
            kept.use()
            await asyncio.wait_for(failing.wrote.wait(), 10)
            await keep(failing, new(turns))  # written after it, by the same thread
            assert [row.turns for row in await kept.rows()] == [turns]


async def test_writes_that_fail_are_tried_again_and_nothing_is_lost_or_counted_twice(failing: FailingStore) -> None:
    async with books(failing) as kept:
        kept.use()
        failing.full = True
        for _ in range(3):
            kept.use()
            with pytest.raises(StorageFull):
                await kept.ledger.flush()
        assert await kept.rows() == ()
        failing.full = False
        kept.use()
        await kept.ledger.flush()
        await kept.ledger.flush()
        (row,) = await kept.rows()

    assert (row.turns, row.input_tokens) == (5, 400)


async def test_that_nothing_can_be_written_is_said_once_and_so_is_that_it_can_be_again(
    failing: FailingStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", ledger_module.__name__)
    async with books(failing) as kept:
        for _ in range(2):
            failing.full = True
            for _ in range(3):
                kept.use()
                with pytest.raises(StorageFull):
                    await kept.ledger.flush()
            failing.full = False
            for _ in range(3):
                kept.use()
                await kept.ledger.flush()

    assert [record.message for record in caplog.records] == 2 * [
        "what was used cannot be written now; it is tried until it can be",
        "what was used is written again",
    ]


async def test_what_is_written_is_not_written_again_when_old_usage_cannot_be_forgotten(failing: FailingStore) -> None:
    async with books(failing) as kept:
        failing.keeps_old = True
        kept.clock.now += DAY
        kept.use()
        with pytest.raises(StorageFull):
            await kept.ledger.flush()
        failing.keeps_old = False
        await kept.ledger.flush()

        assert [row.turns for row in await kept.rows()] == [1]


async def test_whoever_waits_for_a_write_may_leave_and_nothing_is_lost(failing: FailingStore) -> None:
    async with books(failing) as kept:
        failing.held, failing.wrote = Pending(), asyncio.Event()
        kept.use()
        waiting = asyncio.create_task(kept.ledger.flush())
        await failing.wrote.wait()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        failing.held.settle(StorageFull("full"))
        failing.held = None
        kept.use()
        await kept.ledger.flush()

        assert [row.turns for row in await kept.rows()] == [2]


async def test_a_ledger_that_was_flushed_and_closed_writes_no_more(
    failing: FailingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "_WRITE_EVERY", 0.05)
    async with books(failing) as kept:
        kept.use()
        await kept.ledger.flush()
    before = asyncio.all_tasks()
    begun: set[asyncio.Task[Any]] = set()
    until = asyncio.get_running_loop().time() + 0.2
    while asyncio.get_running_loop().time() < until:
        await asyncio.sleep(0)
        begun |= asyncio.all_tasks() - before
    assert begun == set()


async def test_a_full_disk_at_the_end_does_not_keep_the_ledger_from_closing(failing: FailingStore) -> None:
    async with books(failing) as kept:
        kept.use()
        failing.full = True


async def test_many_users_are_told_apart_up_to_a_number_and_the_rest_summed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "_MOST_ACCOUNTS", 10)
    monkeypatch.setattr(ledger_module, "_MOST_MODELS", 2)
    async with books(store, Budget(scope="user", period="day", max_tokens=150), WORKSPACE_DAY) as kept:
        for number in range(100):
            kept.use(f"user {number}", "m" if number < 50 else f"model {number}")
        kept.use("user 3")
        await kept.ledger.flush()
        users = {row.user: row.turns for row in await kept.rows("user")}
        models = {row.model: row.turns for row in await kept.rows("model")}

        assert users == {**{f"user {number}": 1 for number in range(10)}, "user 3": 2, OTHERS: 90}
        assert models == {"m": 51, "model 50": 1, OTHERS: 49}
        assert [use.tokens for use in kept.ledger.budgets("w")] == [200, 101 * 100]
        kept.clock.now += DAY
        kept.use("user 99")
        await kept.ledger.flush()
        newest = (await kept.rows())[0]
        assert (newest.day, newest.user) == ("2026-01-31", "user 99")


async def test_a_user_who_is_known_is_held_to_the_budget_also_where_users_are_summed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "_MOST_ACCOUNTS", 1)
    async with books(store, Budget(scope="user", period="day", max_tokens=200)) as kept:
        kept.use("ann", "m")
        kept.use("ann", "another")
        kept.use("bob", "m")
        kept.use("bob", "m")

        assert kept.refused("ann")
        assert not kept.refused("bob")
        assert not kept.refused(OTHERS)


async def test_usage_of_long_ago_is_forgotten(store: Store) -> None:
    async with books(store) as kept:
        kept.use()
        kept.use(workspace="another")
        kept.clock.now += 400 * DAY
        kept.use()
        await kept.ledger.flush()
        assert [row.day for row in await kept.rows()] == ["2027-03-06", "2026-01-30"]
        kept.clock.now += DAY
        kept.use()
        await kept.ledger.flush()
        assert [row.day for row in await kept.rows()] == ["2027-03-07", "2027-03-06"]
        every = UsageQuery(first="2000-01-01", last="2100-01-01", by=())
        assert [row.workspace for row in (await store.list_usage(every, after=None, limit=-1)).rows] == ["w"]


async def test_costs_are_counted_for_prometheus_with_few_labels(store: Store) -> None:
    metrics = Metrics()
    async with books(store, metrics=metrics) as kept:
        for number in range(300):
            kept.use(model=f"m{number}", price=Price(input=0.0, output=50_000.0))
        kept.use(model="free")
    page = metrics.page().decode()
    costs = {
        sample.labels["model"]: sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == "moltbot_cost_total"
    }

    assert costs["m0"] == 1.0
    assert costs["others"] == 100.0
    assert len(costs) == 201
