"""`moltbot usage` as people run it: beside a core that serves, and from the database where none does."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from cli_process import Home
from moltbot_server.store import UsageRow
from moltbot_server.store.sqlite import SqliteStore

BUDGETS = """\
currency: CNY
budgets:
  - {scope: workspace, period: month, max_tokens: 2000, max_cost: 5}
  - {scope: user, period: day, max_tokens: 150, soft: true}
  - {scope: model, model: dear, period: month, max_cost: 10}
"""
TODAY = datetime.now(UTC).date()


def row(back: int, model: str, user: str, turns: int, cost: float = 0.0) -> UsageRow:
    """Return what was used some days ago: 100 tokens read and 10 written in each turn."""
    day = (TODAY - timedelta(days=back)).isoformat()
    tokens = {"input_tokens": 100 * turns, "output_tokens": 10 * turns}
    return UsageRow(workspace="default", day=day, model=model, user=user, turns=turns, cost=cost, **tokens)


async def used(home: Home) -> None:
    """Fill the database of the workspace."""
    assert (await home.run("init")).status == 0
    store = SqliteStore(home.workspace / "moltbot.db")
    await store.open()
    await store.add_usage(
        [row(0, "dear", "ann", 1, 2_500_000.0), row(0, "moltbot-demo", "bob", 12), row(40, "m", "", 1)]
    )
    await store.close()


async def test_before_the_first_start_nothing_was_used_and_nothing_is_made(home: Home) -> None:
    told = await home.run("usage")

    assert (told.status, told.out, told.err) == (
        0,
        "Nothing was used: MoltBot has not run in ~/.moltbot yet.\n",
        "",
    )
    assert not home.workspace.exists()
    assert (await home.run("usage", "--json")).json["total"]["turns"] == 0


async def test_usage_is_told_from_the_database_and_from_a_core_alike(home: Home) -> None:
    await used(home)
    asked = [
        (),
        ("--by", "user"),
        ("--by", "day,model,user", "--since", (TODAY - timedelta(days=40)).isoformat()),
        ("--model", "models/dear", "--user", "ann"),
    ]
    resting = [await home.run("usage", *words) for words in asked]
    resting_json = (await home.run("usage", "--json")).json
    async with home.started():
        serving = await asyncio.gather(*(home.run("usage", *words) for words in asked))
        serving_json = (await home.run("usage", "--json")).json

    assert [told.out for told in serving] == [told.out for told in resting]
    assert {told.status for told in serving} == {0}
    assert resting[0].out == (
        "DAY         MODEL         TURNS  (CACHED)   READ  (CACHED)  WRITTEN  COST USD\n"
        f"{TODAY}  dear              1         -    100         -       10    2.5000\n"
        f"{TODAY}  moltbot-demo     12         -  1,200         -      120         -\n"
        "total                        13         -  1,300         -      130    2.5000\n"
    )
    assert [line.split()[0] for line in resting[1].out.splitlines()] == ["USER", "ann", "bob", "total"]
    assert len(resting[2].out.splitlines()) == 5
    assert resting[3].out.splitlines()[-1].split()[:2] == ["total", "1"]
    assert (resting_json.pop("running"), serving_json.pop("running")) == (False, True)
    assert serving_json == resting_json
    assert serving_json["records"][0] == {
        "day": TODAY.isoformat(),
        "model": "dear",
        "turns": 1,
        "cached_turns": 0,
        "input_tokens": 100,
        "cached_input_tokens": 0,
        "output_tokens": 10,
        "cost": 2.5,
    }


async def test_a_span_without_usage_is_told_in_words(home: Home) -> None:
    await used(home)
    told = await home.run("usage", "--since", "2020-01-01", "--until", "2020-01-31", "--model", "dear", "--user", "x")

    assert (told.status, told.out) == (0, "Nothing was used of dear by x from 2020-01-01 to 2020-01-31.\n")


async def test_budgets_are_told_by_a_core_that_serves(home: Home) -> None:
    await used(home)
    (home.workspace / "moltbot.yaml").write_text(BUDGETS)
    resting = await home.run("usage", "--budgets")
    async with home.started():
        told = await home.run("usage", "--budgets")
        as_json = (await home.run("usage", "--budgets", "--json")).json

    assert resting.status == 69
    assert "start it with" in resting.err
    assert told.out == (
        "FOR            IN A   TOKENS                COST CNY             WHEN USED UP\n"
        "the workspace  month  1,430 of 2,000 (72%)  2.50 of 5.00 (50%)   refuses\n"
        "each user      day    1,320 of 150 (880%)   -                    warns\n"
        "dear           month  -                     2.50 of 10.00 (25%)  refuses\n"
        "Of each user's budget, the one who used most of it.\n"
    )
    assert as_json["currency"] == "CNY"
    assert as_json["budgets"][1] == {
        "scope": "user",
        "period": "day",
        "soft": True,
        "max_tokens": 150,
        "used_tokens": 1320,
        "max_cost": 0.0,
        "used_cost": 0.0,
    }


async def test_a_budget_for_a_model_that_is_not_there_is_told_at_the_start_and_when_it_is_read_again(
    home: Home,
) -> None:
    assert (await home.run("init")).status == 0
    (home.workspace / "moltbot.yaml").write_text(BUDGETS)
    told = "a budget is for the model `{}`, which is not here now: nothing counts for it"
    async with home.started() as started:
        (home.workspace / "moltbot.yaml").write_text(BUDGETS.replace("dear", "scriptd"))
        reloaded = await home.run("route", "reload")
        as_json = (await home.run("route", "reload", "--json")).json

    assert f"Take note: {home.workspace}/moltbot.yaml:5: {told.format('dear')}." in started.said
    assert (reloaded.status, f"Take note: {told.format('scriptd')}; did you mean `scripted`?" in reloaded.out) == (
        0,
        True,
    )
    assert as_json["notices"] == [f"{told.format('scriptd')}; did you mean `scripted`?"]


async def test_a_budget_of_one_token_is_told_as_one(home: Home) -> None:
    assert (await home.run("init")).status == 0
    (home.workspace / "moltbot.yaml").write_text("budgets: [{scope: workspace, period: day, max_tokens: 1}]\n")
    async with home.started():
        assert (await home.run("chat", "Hello")).status == 0
        refused = await home.run("chat", "--json", "Hello")

    error = refused.json["error"]
    assert "this workspace has used up its daily budget of 1 token; " in error["message"]
    assert (error["reason"], error["retryable"], error["retry_after"] >= 1) == ("BUDGET_EXCEEDED", False, True)


async def test_without_budgets_it_says_where_they_are_explained(home: Home) -> None:
    async with home.started():
        told = await home.run("usage", "--budgets")

    assert told.out == "There are no budgets. docs/usage.md says how they are made.\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--since", "yesterday"), "'yesterday' is no day such as 2026-01-31"),
        (("--by", "day,hour"), "'hour' is none of day, model and user"),
        (("--by", ""), "'' is none of day, model and user"),
        (("--since", "2026-01-02", "--until", "2026-01-01"), "--since 2026-01-02 is after --until 2026-01-01"),
        (("--since", "2020-01-01", "--until", "2026-01-01"), "usage is kept and told for 400 days"),
    ],
)
async def test_a_wrong_use_says_what_is_wrong(home: Home, words: tuple[str, ...], said: str) -> None:
    told = await home.run("usage", *words)

    assert (told.status, told.out) == (2, "")
    assert said in told.err


async def test_a_database_that_cannot_be_read_is_told(home: Home) -> None:
    home.workspace.mkdir()
    (home.workspace / "moltbot.db").write_bytes(b"no database at all" * 100)
    told = await home.run("usage")
    as_json = await home.run("usage", "--json")

    assert (told.status, told.out) == (1, "")
    assert "cannot be read" in told.err
    assert as_json.json["error"]["status"] == 1
