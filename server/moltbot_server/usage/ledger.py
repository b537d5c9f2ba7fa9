"""The ledger: what turns used, summed in memory, written in groups, and held against budgets.

Counting a turn adds a few numbers on the event loop's thread; the store hears of the sums once a second. A clean stop
loses nothing. A core that is killed loses what turns used in its last second; the turns themselves are in the store.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence

import msgspec

from moltbot_server.config_models import Budget, Price
from moltbot_server.errors import BudgetExceeded, MoltBotError, StorageUnavailable
from moltbot_server.metrics import Metrics
from moltbot_server.store import Store, UsageQuery, UsageRow
from moltbot_server.turns import Usage
from moltbot_server.usage.budgets import OTHERS, BudgetUse, Limit, Spent, day_of, days_before, period_end, period_start

log = logging.getLogger(__name__)

KEPT_DAYS = 400
"""Usage of so many days is kept: a year, and the month to compare it with."""

_WRITE_EVERY = 1.0
_LAST_WRITE = 2.0  # seconds that the end of a core waits for it
_CALM = 20.0  # times as long as counting took, until it is done again
_MOST_ACCOUNTS = 10_000
"""Users, each with each model, that are told apart in a workspace and a day."""
_MOST_MODELS = 1_000
"""Models that are told apart beyond that, for all other users together."""


class _Account:
    """What a user used of a model since it was last written. `spent`: the sums of budgets that it counts for.

    Where many users share an account, `spent` is None: whose budgets count is looked up for each turn.
    """

    __slots__ = (
        "cached_input_tokens",
        "cached_turns",
        "cost",
        "input_tokens",
        "model",
        "output_tokens",
        "spent",
        "turns",
        "user",
        "workspace",
    )

    def __init__(self, workspace: str, user: str, model: str, spent: tuple[Spent, ...] | None) -> None:
        self.workspace, self.user, self.model, self.spent = workspace, user, model, spent
        self._clear()

    def row(self, day: str) -> UsageRow:
        """Return what was used since the last time."""
        return UsageRow(
            workspace=self.workspace,
            day=day,
            model=self.model,
            user=self.user,
            turns=self.turns,
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            cached_input_tokens=self.cached_input_tokens,
            cached_turns=self.cached_turns,
            cost=self.cost,
        )

    def take(self, day: str) -> UsageRow:
        """Return what was used since the last time, and begin anew."""
        row = self.row(day)
        self._clear()
        return row

    def _clear(self) -> None:
        self.turns = self.input_tokens = self.output_tokens = self.cached_input_tokens = self.cached_turns = 0
        self.cost = 0.0


class Ledger:
    """Counts what turns use, keeps it in a store, and says who has used up a budget.

    Belongs to the event loop's thread. `clock` tells Unix seconds. A day begins when its first turn ends or is checked.
    """

    def __init__(
        self,
        store: Store,
        budgets: Sequence[Budget] = (),
        *,
        currency: str = "USD",
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.currency = currency
        self._store = store
        self._budgets = tuple(budgets)
        self._metrics = metrics
        self._clock = clock
        self._limits: tuple[Limit, ...] = ()
        self._accounts: dict[tuple[str, str, str], _Account] = {}
        self._opened: Counter[str] = Counter()
        self._dirty: list[_Account] = []
        self._unwritten: dict[tuple[str, str, str, str], UsageRow] = {}
        self._day, self._day_ends = "", 0.0
        self._aged = False
        self._timer: asyncio.TimerHandle | None = None
        self._turn_to_write = asyncio.Lock()
        self._writing: set[asyncio.Task[MoltBotError | None]] = set()
        self._is_behind = False
        self._closed = False

    async def open(self) -> None:
        """Learn from the store what was used in the periods that run.

        Raises:
            MoltBotError: the store cannot tell.
        """
        await self.replace(self._budgets, self.currency)

    async def close(self) -> None:
        """Write what is not written yet, before the store is closed."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        try:
            async with asyncio.timeout(_LAST_WRITE):
                error = await self._write_now()
        except TimeoutError:
            error = StorageUnavailable("the store takes too long")  # what it takes yet before it is closed is kept
        if error is not None:
            log.error("what was used at the end is lost", extra={"error": error.message, "rows": len(self._unwritten)})

    # --- counting ------------------------------------------------------------------------------------------------

    def record(
        self, workspace: str, user: str, model: str, usage: Usage, cached: bool, at: float, price: Price | None
    ) -> None:
        """Count a turn that was answered at the Unix time `at`; once for each turn.

        `cached`: from a cache of ours, which takes no tokens and costs nothing. Without a `price` the cost is 0.
        """
        if at >= self._day_ends:
            self._begin_day(at)
        account = self._accounts.get((workspace, user, model)) or self._open_account(workspace, user, model)
        if not account.turns:
            self._note(account)
        account.turns += 1
        if cached:
            account.cached_turns += 1
            return
        tokens = usage.input_tokens + usage.output_tokens
        account.input_tokens += usage.input_tokens
        account.output_tokens += usage.output_tokens
        account.cached_input_tokens += usage.cached_input_tokens
        cost = 0.0
        if price is not None:
            cost = cost_of(usage, price)
            account.cost += cost
            if self._metrics is not None:
                self._metrics.spent(model, cost)
        spents = account.spent
        for spent in self._spents(workspace, user, model, new=False) if spents is None else spents:
            spent.tokens += tokens
            spent.cost += cost

    def _note(self, account: _Account) -> None:
        """Have an account written within a second."""
        self._dirty.append(account)
        self._write_soon()

    def _open_account(self, workspace: str, user: str, model: str) -> _Account:
        """Return a new account, or one that is shared where too many are told apart already."""
        opened = self._opened[workspace]
        shared = opened >= _MOST_ACCOUNTS
        if shared:
            user, model = OTHERS, model if opened < _MOST_ACCOUNTS + _MOST_MODELS else OTHERS
            if (found := self._accounts.get((workspace, user, model))) is not None:
                return found
        spent = None if shared else self._spents(workspace, user, model, new=True)
        account = self._accounts[workspace, user, model] = _Account(workspace, user, model, spent)
        self._opened[workspace] += 1
        return account

    def _spents(self, workspace: str, user: str, model: str, *, new: bool) -> tuple[Spent, ...]:
        """Return the sums of budgets to which these add. With `new` they are made where there are none yet.

        Without, those of the workspace and of a model are made all the same: there are few of them.
        """
        found = (
            limit.account(workspace, user, model, new=new or limit.budget.scope != "user") for limit in self._limits
        )
        return tuple(spent for spent in found if spent is not None)

    def _today(self) -> float:
        """Return the time, and have its day counted."""
        if (now := self._clock()) >= self._day_ends:
            self._begin_day(now)
        return now

    def _begin_day(self, now: float) -> None:
        """Put away what was used in the day before, and count another day."""
        for account in self._dirty:
            self._put_away(account.take(self._day))
        self._dirty.clear()
        self._accounts.clear()
        self._opened.clear()
        self._day, self._day_ends = day_of(now), period_end("day", now)
        for limit in self._limits:
            limit.renew(now)
        self._aged = True
        self._write_soon()

    # --- budgets -------------------------------------------------------------------------------------------------

    def check(self, workspace: str, user: str, model: str) -> str:
        """Return what a caller is to be told of soft budgets that are used up, most often nothing.

        Turns under way are answered to their end whatever they use: a budget is passed by what is under way at most.
        An empty `model` stands for one that is not known yet, an empty `user` for nobody.

        Raises:
            BudgetExceeded: a hard budget is used up; `retry_after` is the time to its next period.
        """
        if not self._limits:
            return ""
        now = self._today()
        warnings: list[str] = []
        refusal, wait = "", 0.0
        for limit in self._limits:
            if not (text := limit.reached(workspace, user, model, self.currency)):
                continue
            if limit.budget.soft:
                warnings.append(text)
            elif limit.ends - now > wait:
                refusal, wait = text, limit.ends - now
        if refusal:
            raise BudgetExceeded(refusal, retry_after=float(math.ceil(wait)))
        return "; ".join(warnings)

    def exhausted(self, workspace: str, model: str) -> str:
        """Return why a model must not be asked for this workspace now, or nothing: its own hard budget is used up."""
        if not self._limits:
            return ""
        self._today()
        own = (limit for limit in self._limits if limit.budget.scope == "model" and not limit.budget.soft)
        return next(filter(None, (limit.reached(workspace, "", model, self.currency) for limit in own)), "")

    def budgets(self, workspace: str) -> Sequence[BudgetUse]:
        """Return the budgets that hold for a workspace, and how much of each is used."""
        self._today()
        return [limit.use(workspace) for limit in self._limits]

    async def replace(self, budgets: Sequence[Budget], currency: str) -> None:
        """Let other budgets hold, with what was used in their periods so far.

        Raises:
            MoltBotError: the store cannot tell what was used; the budgets before hold on.
        """
        async with self._turn_to_write:
            await self._count(budgets, currency)

    async def follow_others(self) -> None:
        """Learn again and again what others that share the store have used, for as long as this is not cancelled.

        What they used counts here within two seconds, or later where there is so much to count that it would take a
        twentieth of the time.
        """
        pause = _WRITE_EVERY
        while True:
            await asyncio.sleep(pause)
            if not self._budgets:
                continue
            began = time.monotonic()
            try:
                async with self._turn_to_write:
                    await self._count(self._budgets, self.currency)
            except MoltBotError as error:
                log.debug("what others used cannot be counted now", extra={"error": error.message})
            pause = max(_WRITE_EVERY, _CALM * (time.monotonic() - began))

    async def _count(self, budgets: Sequence[Budget], currency: str) -> None:
        """Count all that was used in the periods that run, here and elsewhere; one at a time."""
        while True:
            now, day = self._today(), self._day
            if error := await self._write():
                raise error
            limits = [await self._counted(Limit(budget, now)) for budget in budgets]
            if day == self._day:
                break  # else a day began meanwhile, and what was counted may be of the one before
        # From here on nothing waits. What was used since the store was asked is in the accounts alone.
        rows = [account.row(day) for account in self._dirty]
        for limit in limits:
            limit.count(rows)
        self._limits, self._budgets, self.currency = tuple(limits), tuple(budgets), currency
        for account in self._accounts.values():
            if account.spent is not None:
                account.spent = self._spents(account.workspace, account.user, account.model, new=True)

    async def _counted(self, limit: Limit) -> Limit:
        """Return a budget with what the store has of its period."""
        first = period_start(limit.budget.period, limit.ends - 1.0)
        query = UsageQuery(first=first, last=self._day, by=limit.told_apart_by, model=limit.budget.model)
        limit.count((await self._store.list_usage(query, after=None, limit=-1)).rows)
        return limit

    # --- writing -------------------------------------------------------------------------------------------------

    async def flush(self) -> None:
        """Have all that was counted until now stored.

        Raises:
            MoltBotError: the store cannot; it is tried again.
        """
        if error := await self._write_now():
            raise error

    def _write_soon(self) -> None:
        if self._timer is None and not self._closed:
            self._timer = asyncio.get_running_loop().call_later(_WRITE_EVERY, self._begin_to_write)

    def _begin_to_write(self) -> asyncio.Task[MoltBotError | None]:
        """Start a write; whoever waits for it may leave, it goes on."""
        if self._timer is not None:
            self._timer.cancel()  # what it was set for is written now
            self._timer = None
        task = asyncio.create_task(self._write_in_turn())
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)
        return task

    async def _write_now(self) -> MoltBotError | None:
        return await asyncio.shield(self._begin_to_write())

    async def _write_in_turn(self) -> MoltBotError | None:
        async with self._turn_to_write:
            error = await self._write()
        if error is not None:
            if not self._is_behind:
                fields = {"error": error.message}
                log.warning("what was used cannot be written now; it is tried until it can be", extra=fields)
            self._write_soon()
        elif self._is_behind:
            log.info("what was used is written again")
        self._is_behind = error is not None
        return error

    async def _write(self) -> MoltBotError | None:
        """Write what was used since the last time; return why that cannot be. One at a time."""
        for account in self._dirty:
            self._put_away(account.take(self._day))
        self._dirty.clear()
        rows, self._unwritten = self._unwritten, {}
        try:
            if rows:
                await self._store.add_usage([*rows.values()])
                rows = {}
            if self._aged:
                await self._store.forget_usage(days_before(self._day, KEPT_DAYS))
                self._aged = False
        except MoltBotError as error:
            for row in rows.values():
                self._put_away(row)
            return error
        return None

    def _put_away(self, row: UsageRow) -> None:
        """Keep a row until it is written, together with another one of the same name."""
        key = (row.workspace, row.day, row.model, row.user)
        other = self._unwritten.get(key)
        self._unwritten[key] = row if other is None else _added(row, other)


def cost_of(usage: Usage, price: Price) -> float:
    """Return what a turn costs, in millionths of the currency: prices are per million tokens."""
    cached = min(usage.cached_input_tokens, usage.input_tokens)
    cached_price = price.input if price.cached_input is None else price.cached_input
    return (usage.input_tokens - cached) * price.input + cached * cached_price + usage.output_tokens * price.output


def _added(one: UsageRow, other: UsageRow) -> UsageRow:
    return msgspec.structs.replace(
        one,
        turns=one.turns + other.turns,
        input_tokens=one.input_tokens + other.input_tokens,
        output_tokens=one.output_tokens + other.output_tokens,
        cached_input_tokens=one.cached_input_tokens + other.cached_input_tokens,
        cached_turns=one.cached_turns + other.cached_turns,
        cost=one.cost + other.cost,
    )
