"""Budgets: how much of each is used up, by whom, and when its next period begins. Days and months are those of UTC."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from moltbot_server.config_models import Budget, Period
from moltbot_server.store import UsageRow

OTHERS = "~others"
"""The name under which users, or models, beyond the most that are told apart in a day are summed."""

_MICROS = 1_000_000


class Spent:
    """Tokens read and written, and their cost in millionths, of one subject of a budget in its period."""

    __slots__ = ("cost", "tokens")

    def __init__(self) -> None:
        self.tokens = 0
        self.cost = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetUse:
    """A budget and what is used of it; `cost` in millionths. Of each user's budget: by the one who used most of it."""

    budget: Budget
    tokens: int
    cost: float


class Limit:
    """A budget with what each of its subjects has spent in the period that runs."""

    __slots__ = ("_max_cost", "_spent", "budget", "ends")

    def __init__(self, budget: Budget, now: float) -> None:
        """`now` is a Unix time in the period that is to be counted."""
        self.budget = budget
        self.ends = period_end(budget.period, now)
        self._max_cost = budget.max_cost * _MICROS
        self._spent: dict[str, dict[str, Spent]] = {}

    @property
    def told_apart_by(self) -> tuple[str, ...]:
        """What usage has to be told apart by to be counted here."""
        return () if self.budget.scope == "workspace" else (self.budget.scope,)

    def renew(self, now: float) -> None:
        """Begin with nothing if another period runs now."""
        if now >= self.ends:
            self.ends = period_end(self.budget.period, now)
            self._spent.clear()

    def account(self, workspace: str, user: str, model: str, *, new: bool) -> Spent | None:
        """Return what is to be added to when these use something, None if the budget does not concern them.

        Without `new`, None also for whom nothing was counted yet.
        """
        subject = self._subject(user, model)
        if subject is None:
            return None
        subjects = self._spent.get(workspace)
        if subjects is None:
            subjects = self._spent.setdefault(workspace, {}) if new else {}
        spent = subjects.get(subject)
        if spent is None and new:
            spent = subjects[subject] = Spent()
        return spent

    def count(self, rows: Iterable[UsageRow]) -> None:
        """Add what was used before."""
        for row in rows:
            if (spent := self.account(row.workspace, row.user, row.model, new=True)) is not None:
                spent.tokens += row.input_tokens + row.output_tokens
                spent.cost += row.cost

    def reached(self, workspace: str, user: str, model: str, currency: str) -> str:
        """Return that the budget is used up, in words; empty while something of it is left."""
        spent = self.account(workspace, user, model, new=False)
        if spent is None:
            return ""
        budget = self.budget
        if budget.max_tokens and spent.tokens >= budget.max_tokens:
            return self._in_words(f"{budget.max_tokens:,} token{'s' if budget.max_tokens > 1 else ''}")
        if budget.max_cost and spent.cost >= self._max_cost:
            return self._in_words(f"{Decimal(repr(budget.max_cost)).normalize():,f} {currency}")
        return ""

    def use(self, workspace: str) -> BudgetUse:
        """Return what is used of the budget in a workspace."""
        most = max(self._spent.get(workspace, {}).values(), key=self._share, default=Spent())
        return BudgetUse(budget=self.budget, tokens=most.tokens, cost=most.cost)

    def _in_words(self, amount: str) -> str:
        scope, period = self.budget.scope, self.budget.period
        whose = f"the model {self.budget.model}" if scope == "model" else f"this {scope}"
        often = {"day": "daily", "month": "monthly"}[period]
        start = f"{_moment(self.ends):%Y-%m-%d %H:%M} UTC"
        return f"{whose} has used up its {often} budget of {amount}; the next one begins at {start}"

    def _share(self, spent: Spent) -> float:
        budget = self.budget
        tokens = spent.tokens / budget.max_tokens if budget.max_tokens else 0.0
        return max(tokens, spent.cost / self._max_cost if self._max_cost else 0.0)

    def _subject(self, user: str, model: str) -> str | None:
        """Return whose spending counts: the budget has one sum for each name."""
        scope = self.budget.scope
        if scope == "workspace":
            return ""
        if scope == "user":
            # Nobody is refused for what many others used together.
            return user if user and user != OTHERS else None
        return model if model and model == self.budget.model else None


def day_of(at: float) -> str:
    """Return the day of a Unix time, as `YYYY-MM-DD`."""
    return _moment(at).date().isoformat()


def days_before(day: str, count: int) -> str:
    """Return the day that lies `count` days before another."""
    return (datetime.fromisoformat(day) - timedelta(days=count)).date().isoformat()


def period_start(period: Period, at: float) -> str:
    """Return the first day of the period of a Unix time."""
    day = _moment(at).date()
    return (day if period == "day" else day.replace(day=1)).isoformat()


def period_end(period: Period, at: float) -> float:
    """Return the Unix time at which the period of a time is over."""
    day = _moment(at).replace(hour=0, minute=0, second=0, microsecond=0)
    if period == "day":
        return (day + timedelta(days=1)).timestamp()
    return (day.replace(day=1) + timedelta(days=32)).replace(day=1).timestamp()


def _moment(at: float) -> datetime:
    return datetime.fromtimestamp(at, UTC)
