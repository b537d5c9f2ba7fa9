"""Budgets: who has used one up is refused or warned, until its next period begins."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from kept_turns import Reopen
from moltbot_server.config_models import Budget, Price
from moltbot_server.errors import MoltBotError
from moltbot_server.store import Store
from moltbot_server.turns import Usage
from moltbot_server.usage import BudgetUse
from usage_books import CHEAP, DAY, NOON, WORKSPACE_DAY, FailingStore, books


@pytest.fixture
async def failing(tmp_path: Path) -> AsyncIterator[FailingStore]:
    """An open store that can fail."""
    store = FailingStore(tmp_path / "moltbot.db")
    await store.open()
    yield store
    await store.close()


async def test_a_hard_budget_refuses_until_its_next_period(store: Store) -> None:
    async with books(store, WORKSPACE_DAY) as kept:
        kept.use()
        assert kept.refused() is None
        kept.use("bob", "n")
        refusal = kept.refused()
        assert refusal is not None
        assert (refusal.reason, refusal.retryable, refusal.retry_after) == ("BUDGET_EXCEEDED", False, DAY / 2)
        assert refusal.message == (
            "this workspace has used up its daily budget of 200 tokens; the next one begins at 2026-01-31 00:00 UTC"
        )
        assert kept.refused(workspace="another") is None
        kept.clock.now += DAY / 2 - 0.5
        again = kept.refused()
        assert again is not None
        assert again.retry_after == 1.0
        kept.clock.now += 0.5
        assert kept.refused() is None


async def test_a_budget_of_users_is_of_each_by_themselves_and_of_nobody_without_a_name(store: Store) -> None:
    async with books(store, Budget(scope="user", period="month", max_tokens=100)) as kept:
        kept.use("ann")
        kept.use("")
        refusal = kept.refused("ann", "another model")
        assert refusal is not None
        assert refusal.message.startswith("this user has used up its monthly budget of 100 tokens; ")
        assert refusal.retry_after == 1.5 * DAY
        assert kept.refused("bob") is None
        assert kept.refused("") is None
        kept.clock.now += DAY
        assert kept.refused("ann")
        kept.clock.now += DAY
        assert kept.refused("ann") is None


async def test_a_budget_of_a_model_is_of_that_model_alone_and_of_its_cost(store: Store) -> None:
    budget = Budget(scope="model", model="dear", period="month", max_cost=0.5)
    price = Price(input=0.0, output=25_000.0)
    async with books(store, budget, currency="CNY") as kept:
        kept.use(model="dear", price=price)
        kept.use(model="cheap", price=price)
        assert kept.refused(model="dear")
        assert kept.refused(model="cheap") is None
        assert kept.refused(model="") is None
        reason = "the model dear has used up its monthly budget of 0.5 CNY; the next one begins at 2026-02-01 00:00 UTC"
        assert kept.ledger.exhausted("w", "dear") == reason
        assert kept.ledger.exhausted("w", "cheap") == kept.ledger.exhausted("another", "dear") == ""


async def test_a_model_is_not_exhausted_by_what_only_warns_or_holds_for_others(store: Store) -> None:
    soft = Budget(scope="model", model="m", period="day", max_tokens=1, soft=True)
    async with books(store, WORKSPACE_DAY, soft) as kept:
        kept.use()
        kept.use()
        assert kept.refused()
        assert kept.ledger.exhausted("w", "m") == ""


async def test_a_soft_budget_warns_and_refuses_nothing(store: Store) -> None:
    soft = Budget(scope="workspace", period="day", max_tokens=100, soft=True)
    softer = Budget(scope="user", period="month", max_tokens=50, soft=True)
    async with books(store, soft, softer) as kept:
        assert kept.ledger.check("w", "ann", "m") == ""
        kept.use()
        assert kept.ledger.check("w", "bob", "m") == (
            "this workspace has used up its daily budget of 100 tokens; the next one begins at 2026-01-31 00:00 UTC"
        )
        assert kept.ledger.check("w", "ann", "m").count("; the next one begins at") == 2


async def test_of_two_budgets_that_are_used_up_the_longer_wait_is_told(store: Store) -> None:
    month = Budget(scope="workspace", period="month", max_tokens=1)
    async with books(store, WORKSPACE_DAY, month, WORKSPACE_DAY) as kept:
        kept.use()
        kept.use()
        refusal = kept.refused()

    assert refusal is not None
    assert "monthly" in refusal.message
    assert refusal.retry_after == 1.5 * DAY


async def test_answers_from_a_cache_use_no_budget(store: Store) -> None:
    async with books(store, WORKSPACE_DAY) as kept:
        for _ in range(5):
            kept.use(cached=True, price=CHEAP)

        assert kept.refused() is None


async def test_budgets_hold_on_after_a_restart(store: Store, reopen: Reopen) -> None:
    user_month = Budget(scope="user", period="month", max_tokens=100)
    model_day = Budget(scope="model", model="m", period="day", max_tokens=100)
    budgets = (WORKSPACE_DAY, user_month, model_day)
    async with books(store, *budgets, now=NOON - DAY) as kept:
        kept.use()
        kept.clock.now += DAY
        kept.use("bob", "n")
    async with books(await reopen(), *budgets) as kept:
        used = {use.budget: use.tokens for use in kept.ledger.budgets("w")}
        assert used == {WORKSPACE_DAY: 100, user_month: 100, model_day: 0}
        assert kept.refused("ann")
        assert kept.refused("bob")
        assert kept.refused("cid") is None


async def test_new_budgets_count_what_was_used_before_they_were_made(store: Store) -> None:
    async with books(store) as kept:
        kept.use()
        kept.clock.now += DAY
        kept.use()
        month = Budget(scope="workspace", period="month", max_tokens=200)
        await kept.ledger.replace([month, WORKSPACE_DAY], "EUR")
        assert kept.ledger.currency == "EUR"
        assert [use.tokens for use in kept.ledger.budgets("w")] == [200, 100]
        assert kept.refused()
        kept.use()
        assert [use.tokens for use in kept.ledger.budgets("w")] == [300, 200]
        await kept.ledger.replace([], "EUR")
        assert kept.refused() is None


@pytest.mark.parametrize("later", [0.0, DAY])
async def test_turns_that_end_while_budgets_are_replaced_are_counted_once(failing: FailingStore, later: float) -> None:
    async with books(failing, WORKSPACE_DAY) as kept:
        kept.use()
        failing.asked, failing.go_on = asyncio.Event(), asyncio.Event()
        month = Budget(scope="workspace", period="month", max_tokens=10_000)
        replacing = asyncio.create_task(kept.ledger.replace([month, WORKSPACE_DAY], "USD"))
        await failing.asked.wait()
        kept.clock.now += later
        kept.use()
        kept.use("bob")
        failing.go_on.set()
        await replacing

        assert [use.tokens for use in kept.ledger.budgets("w")] == [300, 200 if later else 300]
        kept.use()
        assert [use.tokens for use in kept.ledger.budgets("w")] == [400, 300 if later else 400]


async def test_budgets_that_cannot_be_counted_leave_those_before_in_place(failing: FailingStore) -> None:
    async with books(failing, WORKSPACE_DAY) as kept:
        kept.use()
        kept.use()
        failing.full = True
        with pytest.raises(MoltBotError):
            await kept.ledger.replace([], "USD")
        assert kept.refused()
        failing.full = False


async def test_of_a_budget_of_users_the_one_who_used_most_of_it_is_told(store: Store) -> None:
    budget = Budget(scope="user", period="day", max_tokens=1_000_000, max_cost=0.001)
    async with books(store, budget) as kept:
        kept.use("dear", usage=Usage(output_tokens=10), price=Price(input=0.0, output=50.0))
        kept.use("talkative", usage=Usage(output_tokens=10_000))

        assert kept.ledger.budgets("w") == [BudgetUse(budget=budget, tokens=10, cost=500.0)]
        assert kept.ledger.budgets("nobody") == [BudgetUse(budget=budget, tokens=0, cost=0.0)]


@pytest.mark.parametrize("seed", range(20))
async def test_whatever_comes_between_every_turn_is_counted_once(failing: FailingStore, seed: int) -> None:
    chance = random.Random(seed)
    month = Budget(scope="workspace", period="month", max_tokens=10**9)
    user = Budget(scope="user", period="month", max_tokens=10**9)
    model = Budget(scope="model", model="m1", period="month", max_tokens=10**9)
    turns: Counter[tuple[str, str]] = Counter()
    background: list[asyncio.Task[None]] = []
    async with books(failing, month, user, model, now=NOON - 29 * DAY) as kept:
        for _ in range(300):
            match chance.choice(("use", "use", "use", "use", "flush", "disk", "day", "replace", "wait")):
                case "use":
                    who, what = f"u{chance.randrange(4)}", f"m{chance.randrange(3)}"
                    turns[who, what] += 1
                    kept.use(who, what)
                case "flush":
                    background.append(asyncio.create_task(kept.ledger.flush()))
                case "disk":
                    failing.full = not failing.full
                case "day":
                    kept.clock.now += DAY if chance.random() < 0.1 and kept.clock.now < NOON else 0
                case "replace":
                    background.append(asyncio.create_task(kept.ledger.replace([month, user, model], "USD")))
                case _:
                    await asyncio.sleep(chance.choice((0, 0.001)))
        failing.full = False
        await asyncio.gather(*background, return_exceptions=True)
        grown = [use.tokens for use in kept.ledger.budgets("w")]
        await kept.ledger.replace([month, user, model], "USD")
        fresh = [use.tokens for use in kept.ledger.budgets("w")]
        kept.use("u0", "m1")
        turns["u0", "m1"] += 1
        await kept.ledger.flush()
        rows = await kept.rows("model", "user")

    assert {(row.user, row.model): row.turns for row in rows} == turns
    users = Counter[str]()
    for (who, _), count in turns.items():
        users[who] += count
    users["u0"] -= 1
    models = sum(count for (_, what), count in turns.items() if what == "m1") - 1
    assert grown == fresh == [100 * (turns.total() - 1), 100 * max(users.values()), 100 * models]


async def test_what_another_core_used_counts_here_soon(store: Store) -> None:
    per_user = Budget(scope="user", period="day", max_tokens=200)
    async with books(store, WORKSPACE_DAY) as one, books(store, WORKSPACE_DAY, per_user) as other:
        following = asyncio.create_task(other.ledger.follow_others())
        other.use("ann")
        one.use("bob")
        async with asyncio.timeout(20):
            while other.refused("carl") is None:  # noqa: ASYNC110 - it learns it at a moment of its own
                await asyncio.sleep(0.01)
        refusal = other.refused("ann")
        assert refusal is not None
        assert refusal.message.startswith("this workspace has used up")
        assert [use.tokens for use in other.ledger.budgets("w")] == [200, 100], "each turn counts once"
        assert one.refused() is None, "who does not look does not know"
        following.cancel()
        await asyncio.wait({following})
