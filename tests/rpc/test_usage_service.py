"""Usage and budgets as the owner of a workspace sees them over gRPC."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from moltbot.v1 import usage_pb2, usage_pb2_grpc
from moltbot_server.auth.keys import Authenticator
from moltbot_server.auth.policy import MEMBER
from moltbot_server.config_models import Budget, Price
from moltbot_server.store import UsageRow
from moltbot_server.testing import RunningServer, running_server
from moltbot_server.turns import Principal, Usage
from rpc_calls import details_of, reason_of, refused

BUDGETS = (
    Budget(scope="workspace", period="month", max_tokens=1_000_000, max_cost=12.5),
    Budget(scope="user", period="day", max_tokens=1_000, soft=True),
    Budget(scope="model", model="org/dear:8b", period="day", max_cost=1.0),
)
DAY, MODEL, USER = usage_pb2.USAGE_FIELD_DAY, usage_pb2.USAGE_FIELD_MODEL, usage_pb2.USAGE_FIELD_USER


class Usages:
    """UsageService of a core, with the owner's key unless another is given."""

    def __init__(self, core: RunningServer) -> None:
        self.core = core
        self.channel = core.channel()
        self.stub: Any = usage_pb2_grpc.UsageServiceStub(self.channel)

    async def list(self, **request: Any) -> usage_pb2.ListUsageResponse:
        """Return a page of what was used."""
        answer: usage_pb2.ListUsageResponse = await self.stub.ListUsage(
            usage_pb2.ListUsageRequest(**request), metadata=self.core.metadata
        )
        return answer

    async def budgets(self) -> usage_pb2.ListBudgetsResponse:
        """Return the budgets."""
        answer: usage_pb2.ListBudgetsResponse = await self.stub.ListBudgets(
            usage_pb2.ListBudgetsRequest(), metadata=self.core.metadata
        )
        return answer

    def use(self, user: str, model: str, tokens: int, price: Price | None = None) -> None:
        """Count a turn of the workspace, now."""
        self.core.core.ledger.record("default", user, model, Usage(input_tokens=tokens), False, time.time(), price)


@pytest.fixture
async def usages(tmp_path: Path) -> AsyncIterator[Usages]:
    """UsageService of a core with budgets."""
    async with running_server(tmp_path / "workspace", budgets=BUDGETS, currency="CNY") as core:
        usages = Usages(core)
        yield usages
        await usages.channel.close()


def today(back: int = 0) -> str:
    return (datetime.now(UTC).date() - timedelta(days=back)).isoformat()


async def test_what_was_used_a_moment_ago_is_listed_by_day_and_model_with_its_cost_and_total(usages: Usages) -> None:
    usages.use("ann", "m", 100, Price(input=0.5, output=0.0))
    usages.use("bob", "m", 11, Price(input=0.5, output=0.0))
    usages.use("bob", "n", 1)
    day = today()
    answer = await usages.list()

    assert answer == usage_pb2.ListUsageResponse(
        records=[
            usage_pb2.UsageRecord(day=day, model="models/m", turns=2, input_tokens=111, cost_micros=56),
            usage_pb2.UsageRecord(day=day, model="models/n", turns=1, input_tokens=1),
        ],
        total=usage_pb2.UsageRecord(turns=3, input_tokens=112, cost_micros=56),
        currency="CNY",
    )


async def test_nothing_used_is_an_empty_list_with_an_empty_total(usages: Usages) -> None:
    assert await usages.list() == usage_pb2.ListUsageResponse(total=usage_pb2.UsageRecord(), currency="CNY")


async def test_usage_is_told_apart_as_asked_and_chosen_by_day_model_and_user(usages: Usages) -> None:
    rows = [("2026-01-01", "m", "ann", 1), ("2026-01-02", "m", "bob", 2), ("2026-01-02", "org/n:8b", "ann", 4)]
    await usages.core.core.store.add_usage(
        [UsageRow(workspace="default", day=day, model=model, user=user, turns=n) for day, model, user, n in rows]
    )
    span = {"start_day": "2026-01-01", "end_day": "2026-01-31"}

    async def turns(**request: Any) -> list[tuple[str, str, str, int]]:
        records = (await usages.list(**{**span, **request})).records
        return [(record.day, record.model, record.user, record.turns) for record in records]

    assert await turns(group_by=[USER]) == [("", "", "ann", 5), ("", "", "bob", 2)]
    assert await turns(group_by=[USER, MODEL, USER], model="models/m") == [
        ("", "models/m", "ann", 1),
        ("", "models/m", "bob", 2),
    ]
    assert await turns(group_by=[DAY]) == [("2026-01-02", "", "", 6), ("2026-01-01", "", "", 1)]
    assert await turns(user="ann", model="models/org/n:8b") == [("2026-01-02", "models/org/n:8b", "", 4)]
    assert await turns(end_day="2026-01-01") == [("2026-01-01", "models/m", "", 1)]
    assert (await usages.list(**span, user="ann", page_size=1)).total.turns == 5


async def test_thirty_days_are_listed_unless_others_are_named(usages: Usages) -> None:
    await usages.core.core.store.add_usage(
        [UsageRow(workspace="default", day=today(back), model="m", turns=1) for back in (0, 30, 31)]
    )

    assert [record.day for record in (await usages.list()).records] == [today(), today(30)]
    assert len((await usages.list(start_day=today(31))).records) == 3


async def test_other_workspaces_are_not_seen(usages: Usages) -> None:
    await usages.core.core.store.add_usage([UsageRow(workspace="other", day=today(), model="m", turns=1)])

    assert (await usages.list()).total.turns == 0


async def test_pages_follow_each_other_while_more_is_used(usages: Usages) -> None:
    for number in range(7):
        usages.use(f"user {number}", "m", 1)
    asked = {"group_by": [DAY, MODEL, USER], "page_size": 3}
    users, token = [], ""
    for page in range(3):
        answer = await usages.list(**asked, page_token=token)
        users += [record.user for record in answer.records]
        token = answer.next_page_token
        assert bool(token) == (page < 2)
        assert answer.total.turns == 7 + page
        usages.use("user 0", "m", 1)

    assert users == [f"user {number}" for number in range(7)]


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({"start_day": "yesterday"}, "start_day"),
        ({"start_day": "2026-02-30"}, "start_day"),
        ({"start_day": "20260101"}, "start_day"),
        ({"start_day": "2026-W01-1"}, "start_day"),
        ({"start_day": "202\u0666-01-01"}, "start_day"),
        ({"end_day": "2026-1-1"}, "end_day"),
        ({"end_day": "0000-01-01"}, "end_day"),
        ({"start_day": "2026-02-02", "end_day": "2026-02-01"}, "start_day"),
        ({"start_day": "2024-01-01", "end_day": "2026-01-01"}, "start_day"),
        ({"start_day": "0001-01-01"}, "start_day"),
        ({"group_by": [DAY, usage_pb2.USAGE_FIELD_UNSPECIFIED]}, "group_by[1]"),
        ({"group_by": [77]}, "group_by[0]"),
        ({"model": "m"}, "model"),
        ({"page_size": -1}, "page_size"),
        ({"page_token": "bad"}, "page_token"),
    ],
)
async def test_what_cannot_be_answered_names_the_field(usages: Usages, request_: Any, field: str) -> None:
    error = await refused(usages.list(**request_))

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason_of(error) == ("INVALID_PAGE_TOKEN" if field == "page_token" else "INVALID_FIELD")
    assert field in str(details_of(error))


async def test_a_token_of_another_list_is_refused(usages: Usages) -> None:
    usages.use("ann", "m", 1)
    usages.use("ann", "n", 1)
    token = (await usages.list(page_size=1)).next_page_token

    assert [record.model for record in (await usages.list(page_token=token)).records] == ["models/n"]
    for other in ({"user": "ann"}, {"group_by": [MODEL]}, {"start_day": today(3)}, {"model": "models/n"}):
        assert reason_of(await refused(usages.list(page_token=token, **other))) == "INVALID_PAGE_TOKEN"


async def test_budgets_are_told_with_how_much_of_each_is_used(usages: Usages) -> None:
    dear = Price(input=2_500.0, output=0.0)
    usages.use("ann", "org/dear:8b", 100, dear)
    usages.use("bob", "m", 150)

    assert await usages.budgets() == usage_pb2.ListBudgetsResponse(
        budgets=[
            usage_pb2.Budget(
                scope="workspace",
                period="month",
                max_tokens=1_000_000,
                max_cost_micros=12_500_000,
                used_tokens=250,
                used_cost_micros=250_000,
            ),
            usage_pb2.Budget(scope="user", period="day", max_tokens=1_000, soft=True, used_tokens=150),
            usage_pb2.Budget(
                scope="models/org/dear:8b",
                period="day",
                max_cost_micros=1_000_000,
                used_tokens=100,
                used_cost_micros=250_000,
            ),
        ],
        currency="CNY",
    )


async def test_a_member_sees_neither(usages: Usages) -> None:
    member = Principal(workspace="default", key_id="m", role=MEMBER)
    usages.core.core.authenticator._principals.update(Authenticator({"a member's key": member})._principals)
    metadata = (("authorization", "Bearer a member's key"),)
    for call, request in (
        (usages.stub.ListUsage, usage_pb2.ListUsageRequest()),
        (usages.stub.ListBudgets, usage_pb2.ListBudgetsRequest()),
    ):
        assert reason_of(await refused(call(request, metadata=metadata))) == "PERMISSION_DENIED"


async def test_usage_and_budgets_outlive_a_restart(tmp_path: Path) -> None:
    for turns in (1, 2):
        async with running_server(tmp_path / "workspace", budgets=BUDGETS) as core:
            usages = Usages(core)
            usages.use("ann", "m", 10)
            assert (await usages.list()).total.turns == turns
            assert (await usages.budgets()).budgets[0].used_tokens == 10 * turns
            await usages.channel.close()
