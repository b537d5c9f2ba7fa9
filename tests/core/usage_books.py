"""Ledgers at work, with short ways to use them, and a store that can fail them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import Any

from moltbot_server.config_models import Budget, Price
from moltbot_server.errors import BudgetExceeded, StorageFull
from moltbot_server.store import Pending, Store, UsagePage, UsageQuery, UsageRow
from moltbot_server.store.sqlite import SqliteStore
from moltbot_server.turns import Usage
from moltbot_server.usage import Ledger

NOON = datetime(2026, 1, 30, 12, tzinfo=UTC).timestamp()
DAY = 86400.0
HUNDRED = Usage(input_tokens=80, output_tokens=20)
CHEAP = Price(input=1.0, output=2.0)
WORKSPACE_DAY = Budget(scope="workspace", period="day", max_tokens=200)


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class FailingStore(SqliteStore):
    """A store that refuses usage, or to forget it, when it is told so; it can hold its answers back."""

    full = keeps_old = False
    held: Pending[None] | None = None
    wrote = asyncio.Event()
    asked: asyncio.Event | None = None
    go_on: asyncio.Event | None = None

    def add_usage(self, rows: Sequence[UsageRow]) -> Pending[None]:
        """Refuse while full."""
        self.wrote.set()
        if self.held is not None:
            return self.held
        if not self.full:
            return super().add_usage(rows)
        refused: Pending[None] = Pending()
        refused.settle(StorageFull("full"))
        return refused

    async def forget_usage(self, before: str) -> None:
        """Refuse while old usage is kept."""
        if self.keeps_old:
            raise StorageFull("full")
        await super().forget_usage(before)

    async def list_usage(self, query: UsageQuery, **place: Any) -> UsagePage:
        """Find, then wait where that was asked for."""
        found = await super().list_usage(query, **place)
        if self.asked is not None and self.go_on is not None:
            self.asked.set()
            await self.go_on.wait()
        return found


class Books:
    """A ledger at work, with short ways to use it."""

    def __init__(self, store: Store, *budgets: Budget, now: float = NOON, **options: Any) -> None:
        self.clock = Clock(now)
        self.store = store
        self.ledger = Ledger(store, budgets, clock=self.clock, **options)

    def use(
        self,
        user: str = "ann",
        model: str = "m",
        usage: Usage = HUNDRED,
        *,
        workspace: str = "w",
        cached: bool = False,
        price: Price | None = None,
    ) -> None:
        """Count a turn."""
        self.ledger.record(workspace, user, model, usage, cached, self.clock.now, price)

    async def rows(self, *by: str, first: str = "2000-01-01", last: str = "2100-01-01") -> tuple[UsageRow, ...]:
        """Return what the store has."""
        query = UsageQuery(workspace="w", first=first, last=last, by=by or ("day", "model", "user"))
        return (await self.store.list_usage(query, after=None, limit=-1)).rows

    def refused(self, user: str = "ann", model: str = "m", workspace: str = "w") -> BudgetExceeded | None:
        """Return why a turn would be refused."""
        try:
            self.ledger.check(workspace, user, model)
        except BudgetExceeded as refusal:
            return refusal
        return None


@contextlib.asynccontextmanager
async def books(store: Store, *budgets: Budget, **options: Any) -> AsyncIterator[Books]:
    """Keep books in a store; they are closed at the end."""
    kept = Books(store, *budgets, **options)
    await kept.ledger.open()
    yield kept
    await kept.ledger.close()
