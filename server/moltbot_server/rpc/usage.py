"""UsageService: what the caller's workspace used and cost, and how much of its budgets is left. For its owner alone."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta

from moltbot.v1 import usage_pb2, usage_pb2_grpc

from moltbot_server.errors import InvalidField
from moltbot_server.rpc import names
from moltbot_server.rpc.interceptors import Call
from moltbot_server.store import Store, UsageQuery, UsageRow
from moltbot_server.usage import KEPT_DAYS, BudgetUse, Ledger

_FIELDS = {
    usage_pb2.USAGE_FIELD_DAY: "day",
    usage_pb2.USAGE_FIELD_MODEL: "model",
    usage_pb2.USAGE_FIELD_USER: "user",
}
_UNLESS_TOLD = (usage_pb2.USAGE_FIELD_DAY, usage_pb2.USAGE_FIELD_MODEL)
_DAYS_BACK = 30
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}\Z")


class UsageService(usage_pb2_grpc.UsageServiceServicer):
    """Serves usage and budgets."""

    def __init__(self, store: Store, ledger: Ledger, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._ledger = ledger
        self._clock = clock

    async def ListUsage(self, request: usage_pb2.ListUsageRequest, call: Call) -> usage_pb2.ListUsageResponse:  # type: ignore[override]
        """Answer what was used, the newest day first, with what the last second brought."""
        size = names.page_size(request.page_size, default=100, most=1000)
        query = self._query(request, call.principal.workspace)
        # A token goes on with the list as it was asked for, also when "today" has become another day.
        scope = ("usage", request.start_day, request.end_day, *query.by, "", query.model, query.user)
        after = names.read_text_token(scope, request.page_token)
        await self._ledger.flush()
        found = await self._store.list_usage(query, after=after, limit=size + 1)
        page = found.rows[:size]
        last = page[-1] if len(found.rows) > size else None
        return usage_pb2.ListUsageResponse(
            records=[_record(row) for row in page],
            next_page_token=names.write_token(scope, (last.day, last.model, last.user)) if last else "",
            total=_record(found.total),
            currency=self._ledger.currency,
        )

    async def ListBudgets(self, request: usage_pb2.ListBudgetsRequest, call: Call) -> usage_pb2.ListBudgetsResponse:  # type: ignore[override]
        """Answer the budgets, in the order of the configuration."""
        budgets = self._ledger.budgets(call.principal.workspace)
        return usage_pb2.ListBudgetsResponse(budgets=[_budget(use) for use in budgets], currency=self._ledger.currency)

    def _query(self, request: usage_pb2.ListUsageRequest, workspace: str) -> UsageQuery:
        today = datetime.fromtimestamp(self._clock(), UTC).date()
        first = _day(request.start_day, "start_day") or today - timedelta(days=_DAYS_BACK)
        last = _day(request.end_day, "end_day") or today
        if first > last:
            raise InvalidField("start_day", f"{first} is after the last day, {last}")
        if (last - first).days >= KEPT_DAYS:
            raise InvalidField("start_day", f"ask for at most {KEPT_DAYS} days at once; usage is kept for as long")
        return UsageQuery(
            workspace=workspace,
            first=first.isoformat(),
            last=last.isoformat(),
            by=_fields(request),
            model=names.read_model(request.model, "model"),
            user=request.user,
        )


def _day(text: str, field: str) -> date | None:
    if not text:
        return None
    try:
        if _DAY.match(text):
            return date.fromisoformat(text)
    except ValueError:
        pass
    raise InvalidField(field, "use a day such as `2026-01-31`")


def _fields(request: usage_pb2.ListUsageRequest) -> tuple[str, ...]:
    for index, field in enumerate(request.group_by):
        if field not in _FIELDS:
            raise InvalidField(f"group_by[{index}]", "use USAGE_FIELD_DAY, USAGE_FIELD_MODEL or USAGE_FIELD_USER")
    asked = request.group_by or _UNLESS_TOLD
    return tuple(name for field, name in _FIELDS.items() if field in asked)


def _record(row: UsageRow) -> usage_pb2.UsageRecord:
    return usage_pb2.UsageRecord(
        day=row.day,
        model=f"models/{row.model}" if row.model else "",
        user=row.user,
        turns=row.turns,
        input_tokens=row.input_tokens,
        output_tokens=row.output_tokens,
        cached_input_tokens=row.cached_input_tokens,
        cached_turns=row.cached_turns,
        cost_micros=round(row.cost),
    )


def _budget(use: BudgetUse) -> usage_pb2.Budget:
    budget = use.budget
    return usage_pb2.Budget(
        scope=f"models/{budget.model}" if budget.scope == "model" else budget.scope,
        period=budget.period,
        max_tokens=budget.max_tokens,
        max_cost_micros=round(budget.max_cost * 1e6),
        soft=budget.soft,
        used_tokens=use.tokens,
        used_cost_micros=round(use.cost),
    )
