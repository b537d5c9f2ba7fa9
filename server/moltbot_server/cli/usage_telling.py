"""What `moltbot usage` does: asks the core, or reads the database where none runs, and prints a table or JSON."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sqlite3
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import partial
from typing import Any, TypeVar

import grpc
from moltbot.channel import open_channel
from moltbot.errors import from_status
from moltbot.v1 import usage_pb2, usage_pb2_grpc

from moltbot_server.cli.asking import Place
from moltbot_server.cli.model_place import Models, told
from moltbot_server.cli.store_opening import open_redis
from moltbot_server.cli.tables import fitted
from moltbot_server.cli.terminal import Exit, Failure, command, harmless, shown
from moltbot_server.store import UsagePage, UsageQuery, UsageRow
from moltbot_server.store.sqlite_usage import read_usage
from moltbot_server.usage import KEPT_DAYS, OTHERS

_Answer = TypeVar("_Answer")
_DAYS_BACK = 30
_LARGEST_PAGE = 1000
_NUMBERS = ("turns", "cached_turns", "input_tokens", "cached_input_tokens", "output_tokens")
_TITLES = ("TURNS", "(CACHED)", "READ", "(CACHED)", "WRITTEN")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """Which usage is to be told; days are inclusive."""

    first: date
    last: date
    by: tuple[str, ...]
    model: str
    user: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    """What was used: records and their total as `_record` makes them."""

    records: Sequence[Mapping[str, Any]]
    total: Mapping[str, Any]
    currency: str


@told
def tell_usage(given: argparse.Namespace) -> int:
    """Print usage, or budgets; return the exit status."""
    models = Models.of(given)
    place = models.core()
    if given.budgets:
        if place is None:
            start = command("start", models.workspace)
            raise Failure(
                f"MoltBot is not running, and only it counts budgets: start it with `{start}`.", Exit.UNAVAILABLE
            )
        answer = asyncio.run(ask_budgets(place))
        budgets = [_budget(budget) for budget in answer.budgets]
        as_json: dict[str, Any] = {"currency": answer.currency, "budgets": budgets}
        print(json.dumps(as_json, ensure_ascii=False) if given.json else _budget_table(budgets, answer.currency))
        return int(Exit.OK)
    asked = _asked(given)
    found = asyncio.run(_ask_usage(place, asked)) if place else _read(models, asked)
    days = {"since": asked.first.isoformat(), "until": asked.last.isoformat()}
    if given.json:
        told = {"running": place is not None, **days, "by": asked.by, "currency": found.currency}
        print(json.dumps({**told, "records": found.records, "total": found.total}, ensure_ascii=False))
    elif found.records:
        print(_usage_table(found, asked.by))
    elif place is None and not _shares(models) and not models.workspace.database.exists():
        print(f"Nothing was used: MoltBot has not run in {shown(models.workspace.folder)} yet.")
    else:
        print(f"Nothing was used{_of(asked)} from {days['since']} to {days['until']}.")
    return int(Exit.OK)


def _asked(given: argparse.Namespace) -> _Asked:
    last = given.until or datetime.now(UTC).date()
    first = given.since or last - timedelta(days=min(_DAYS_BACK, last.toordinal() - 1))
    if first > last:
        raise Failure(f"--since {first} is after --until {last}", Exit.USAGE)
    if (last - first).days >= KEPT_DAYS:
        raise Failure(f"--since {first} is too far back: usage is kept and told for {KEPT_DAYS} days", Exit.USAGE)
    return _Asked(first=first, last=last, by=given.by, model=given.model.removeprefix("models/"), user=given.user)


# --- where it comes from -----------------------------------------------------------------------------------------


async def _ask_usage(place: Place, asked: _Asked) -> _Told:
    """Return what a core tells, all pages of it."""
    request = usage_pb2.ListUsageRequest(
        start_day=asked.first.isoformat(),
        end_day=asked.last.isoformat(),
        group_by=[usage_pb2.UsageField.Value(f"USAGE_FIELD_{field.upper()}") for field in asked.by],
        model=f"models/{asked.model}" if asked.model else "",
        user=asked.user,
        page_size=_LARGEST_PAGE,
    )

    async def all_pages(stub: Any, metadata: Any) -> _Told:
        records: list[Mapping[str, Any]] = []
        while True:
            page = await stub.ListUsage(request, metadata=metadata)
            records += [_record(record, asked.by, record.cost_micros) for record in page.records]
            if not page.next_page_token:
                return _Told(
                    records=records, total=_record(page.total, (), page.total.cost_micros), currency=page.currency
                )
            request.page_token = page.next_page_token

    return await _call(place, all_pages)


async def ask_budgets(place: Place) -> usage_pb2.ListBudgetsResponse:
    """Return the budgets of a core and what was used of each; raises MoltBotClientError."""

    async def once(stub: Any, metadata: Any) -> usage_pb2.ListBudgetsResponse:
        answer: usage_pb2.ListBudgetsResponse = await stub.ListBudgets(
            usage_pb2.ListBudgetsRequest(), metadata=metadata
        )
        return answer

    return await _call(place, once)


async def _call(place: Place, body: Callable[[Any, Any], Awaitable[_Answer]]) -> _Answer:
    channel = open_channel(place.address, None)
    try:
        return await body(usage_pb2_grpc.UsageServiceStub(channel), (("authorization", f"Bearer {place.key}"),))
    except grpc.aio.AioRpcError as error:
        raise from_status(error, place.address) from None
    finally:
        await channel.close()


def _read(models: Models, asked: _Asked) -> _Told:
    """Return what the database has while no core runs: all of it, since a core that leaves writes what it counted."""
    from moltbot_server.app import WORKSPACE  # late: with it come all parts of a core

    query = UsageQuery(
        workspace=WORKSPACE,
        first=asked.first.isoformat(),
        last=asked.last.isoformat(),
        by=asked.by,
        model=asked.model,
        user=asked.user,
    )
    page = asyncio.run(_page_of_redis(models, query)) if _shares(models) else _page_of_database(models, query)
    records = [_record(row, asked.by, row.cost) for row in page.rows]
    return _Told(records=records, total=_record(page.total, (), page.total.cost), currency=models.settings.currency)


def _shares(models: Models) -> bool:
    return models.settings.store.type == "redis"


async def _page_of_redis(models: Models, query: UsageQuery) -> UsagePage:
    async with open_redis(models.settings, fit=False) as store:
        return await store.list_usage(query, after=None, limit=-1)


def _page_of_database(models: Models, query: UsageQuery) -> UsagePage:
    path = models.workspace.database
    if not path.exists() or models.settings.store.type == "memory":
        return UsagePage(rows=(), total=UsageRow(workspace=query.workspace))
    try:
        return read_usage(path, query, after=None, limit=-1)
    except sqlite3.Error as error:
        raise Failure(f"the database {path} cannot be read: {error}") from None


def _record(row: Any, by: Sequence[str], cost: float) -> dict[str, Any]:
    """Return what stands of a sum in the JSON; `cost` is in millionths, and told in the currency itself."""
    names = {field: getattr(row, field).removeprefix("models/" if field == "model" else "") for field in by}
    return {**names, **{number: getattr(row, number) for number in _NUMBERS}, "cost": round(cost / 1e6, 6)}


def _budget(budget: usage_pb2.Budget) -> dict[str, Any]:
    """Return what stands of a budget in the JSON."""
    return {
        "scope": budget.scope,
        "period": budget.period,
        "soft": budget.soft,
        "max_tokens": budget.max_tokens,
        "used_tokens": budget.used_tokens,
        "max_cost": budget.max_cost_micros / 1e6,
        "used_cost": budget.used_cost_micros / 1e6,
    }


# --- in words ----------------------------------------------------------------------------------------------------


def _usage_table(found: _Told, by: Sequence[str]) -> str:
    head = [*(field.upper() for field in by), *_TITLES, f"COST {found.currency}"]
    body = [[*(_name(field, record[field]) for field in by), *_cells(record)] for record in found.records]
    total = ["total", *[""] * (len(by) - 1), *_cells(found.total)]
    return _aligned([head, *body, total], left=len(by))


def _name(field: str, value: str) -> str:
    if value == OTHERS:
        return f"(other {field}s)"
    return value or "-"


def _cells(record: Mapping[str, Any]) -> list[str]:
    cost = record["cost"]
    money = in_money(cost, places=4) if cost else "-"
    return [*(f"{record[number]:,}" if record[number] else "-" for number in _NUMBERS), money]


def in_money(amount: float, *, places: int) -> str:
    """Return an amount for people, with so many digits behind the point, or more where it is small; 0 as 0."""
    if not amount:
        return "0"
    return f"{amount:,.{max(places, 1 - math.floor(math.log10(abs(amount))))}f}"


def _budget_table(budgets: Sequence[Mapping[str, Any]], currency: str) -> str:
    if not budgets:
        return "There are no budgets. docs/usage.md says how they are made."
    rows = [["FOR", "IN A", "TOKENS", f"COST {currency}", "WHEN USED UP"]]
    for budget in budgets:
        scope = budget["scope"].removeprefix("models/")
        rows.append(
            [
                {"workspace": "the workspace", "user": "each user"}.get(budget["scope"], scope),
                budget["period"],
                _share(budget["used_tokens"], budget["max_tokens"], "{:,d}".format),
                _share(budget["used_cost"], budget["max_cost"], partial(in_money, places=2)),
                "warns" if budget["soft"] else "refuses",
            ]
        )
    note = "\nOf each user's budget, the one who used most of it." if "user" in {b["scope"] for b in budgets} else ""
    return _aligned(rows, left=len(rows[0])) + note


def _share(used: float, most: float, form: Callable[[Any], str]) -> str:
    if not most:
        return "-"
    return f"{form(used)} of {form(most)} ({used / most:.0%})"


def _aligned(rows: Sequence[Sequence[str]], *, left: int) -> str:
    """Return rows as a table whose first `left` columns begin together; the others end together."""
    rows = [[" ".join(harmless(cell).split()) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return fitted(lines, rows)


def _of(asked: _Asked) -> str:
    parts = [f" of {asked.model}" if asked.model else "", f" by {asked.user}" if asked.user else ""]
    return harmless("".join(parts))
