"""`moltbot bench router`: its parts in short, with real processes, and that its load catches what users would see."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from moltbot_server.bench import router, router_faults
from moltbot_server.bench.router_lines import read
from moltbot_server.bench.router_load import Asked, Job, Load
from moltbot_server.bench.router_rig import KEYS, LiteLlm, Rig
from moltbot_server.bench.router_speed import Comparison
from moltbot_server.testing_provider import MockProvider, Script

WORDS = "eins zwei drei"


def quiet(text: str) -> None:
    """Hear of a benchmark's progress and say nothing."""


# --- the load ---------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def load_on(script: dict[str, Any]) -> AsyncIterator[tuple[Load, Job]]:
    """Run a mock provider by a script, and yield a load with a job of three turns for it."""
    load = Load()
    async with MockProvider(Script.read({"text": WORDS, **script})).running() as mock:
        address = mock.address.removeprefix("http://")
        yield load, Job(kind="http", address=address, key="k", models=("any",), streams=1, turns=3, texts=(WORDS,))
    await load.close()


async def asked_of(script: dict[str, Any]) -> list[Asked]:
    async with load_on(script) as (load, job), asyncio.timeout(20):
        return await load.run(job, asyncio.Event())


async def test_whole_answers_are_timed_and_their_words_compared() -> None:
    asked = await asked_of({"first_token": "50ms", "pace": "10ms"})

    assert [each.problem for each in asked] == ["", "", ""]
    assert all(0.045 < each.first - each.sent < each.ended - each.sent for each in asked)
    assert all(each.ended - each.first > 0.015 for each in asked)


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ({"faults": ["error status=503"]}, "HTTP 503"),
        ({"faults": ["cut after=1"], "pace": "5ms"}, "the connection broke"),
        ({"faults": ["broken_sse how=no_done"]}, "without [DONE]"),
        ({"faults": ["empty"]}, "an unexpected answer: ''"),
        ({"text": "eins zwei vier"}, "an unexpected answer: 'eins zwei vier'"),
    ],
    ids=["refused", "cut", "no end", "empty", "other words"],
)
async def test_what_a_user_would_see_go_wrong_is_told(script: dict[str, Any], problem: str) -> None:
    asked = await asked_of(script)

    assert len(asked) == 3
    assert all(problem in each.problem for each in asked)


async def test_nobody_listening_is_a_problem_of_each_turn() -> None:
    load = Load()
    job = Job(kind="http", address="127.0.0.1:1", key="k", streams=1, turns=2)

    asked = await load.run(job, asyncio.Event())

    assert all("refused" in each.problem.lower() for each in asked)
    assert len(asked) == 2


def test_an_error_inside_a_stream_is_no_answer() -> None:
    event = b'data: {"error": {"message": "gave up"}}\n\ndata: [DONE]\n\n'
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % len(event)

    assert "gave up" in read(head + event, 0.0).problem


# --- the parts --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """A MoltBot between mocks."""
    with contextlib.ExitStack() as stack:
        yield Rig(stack, loaders=1)


def test_mixed_faults_are_counted_with_the_calls_that_they_cost(rig: Rig) -> None:
    found = router_faults.mixed(rig, 150, quiet)

    assert {name: part["visible_failures"] for name, part in found.items()} == {
        "mixed_faults": 0,
        "mixed_faults_kept_on": 0,
        "dead_primary": 0,
    }
    kept_on = found["mixed_faults_kept_on"]
    assert kept_on["turns"] == 150
    assert 1.1 < kept_on["attempts_per_turn"] < 1.5
    assert sum(kept_on["calls"].values()) == round(kept_on["attempts_per_turn"] * 150)
    assert 0 < kept_on["answered_by_first"] < 150
    assert found["dead_primary"]["answered_by_first"] == 0
    assert found["dead_primary"]["attempts_per_turn"] < 1.1


def test_turns_that_change_over_are_told_from_the_others(rig: Rig) -> None:
    found = router_faults.switches(rig, 1.5, quiet)

    for kind in ("errs", "hangs"):
        assert 0 < found[kind]["switched"] < found[kind]["turns"]
        assert found[kind]["visible_failures"] == 0
    assert found["hangs"]["first_token_ms"]["p50"] >= 300
    assert found["hangs"]["others_first_token_ms"]["p50"] < 300


def test_a_model_that_heals_is_seen_to_come_back(rig: Rig) -> None:
    found = router_faults.healing(rig, [0.5], quiet, after=4.0)

    (row,) = found["outages"]
    assert row["visible_failures"] == 0
    assert 0 < row["calls_while_down"] < row["turns"]
    assert found["return_s"] is not None
    assert 0 <= found["return_s"] < 4


def test_reloads_change_who_answers_and_fail_nobody(rig: Rig) -> None:
    keys = [key.text for key in rig.vault.keys]

    found = router_faults.reloads(rig, 20, quiet)

    assert found["failed_turns"] == 0
    assert min(found["by_model"].values()) > 0
    assert found["keys_changed"] == 2
    assert keys == [*KEYS[:2]]
    assert [key.text for key in rig.vault.keys] == [*KEYS[2:4]]


def test_doors_are_compared_round_by_round(rig: Rig) -> None:
    rig.configure()
    rig.reload()
    speed = Comparison(rig, None, seconds=0.4, rounds=2, tell=quiet)

    found = speed.flat_out(4)

    direct, ours = found["doors"]["direct"], found["doors"]["moltbot"]
    assert (direct["visible_failures"], ours["visible_failures"]) == (0, 0)
    assert min(direct["turns_per_s"], ours["turns_per_s"]) > 0
    assert len(ours["rounds"]) == 2
    assert 0 < found["direct_ratio"]["lowest"] <= found["direct_ratio"]["median"]
    assert found["added_ttft_ms_p50"]["lowest"] <= found["added_ttft_ms_p50"]["median"]
    assert {"core", "http", "mocks", "load", "machine"} == set(ours["processors"])
    dead = speed.dead_first(4)
    assert dead["doors"].keys() == {"moltbot"}
    assert dead["doors"]["moltbot"]["visible_failures"] == 0


def test_streams_of_a_paced_model_ask_at_once_or_one_after_the_other(rig: Rig) -> None:
    rig.configure()
    rig.reload()
    speed = Comparison(rig, None, seconds=1.5, rounds=1, tell=quiet)

    spread, together = speed.paced(together=False), speed.paced(together=True)

    for found in (spread, together):
        assert found["doors"]["moltbot"]["visible_failures"] == 0
        direct, ours = found["doors"]["direct"], found["doors"]["moltbot"]
        assert ours["full_ms"]["p50"] > 500
        added = ours["first_token_ms"]["p50"] - direct["first_token_ms"]["p50"]
        assert found["added_ttft_ms_p50"]["median"] == pytest.approx(added, abs=0.02)


def test_each_stream_asks_first_after_its_delay(rig: Rig) -> None:
    delays = (0.0, 0.3, 0.6)
    job = msgspec.structs.replace(rig.direct(streams=3, turns=3, texts=rig.texts), delays=delays)
    rig.first.follow(pace="40ms")  # a turn lasts for longer than the longest delay

    asked = rig.loads.run(job)
    rig.first.follow()

    sent = sorted(each.sent for each in asked)
    assert [later - sent[0] >= 0.9 * delay for later, delay in zip(sent, delays, strict=True)] == [True] * 3


def test_a_door_that_answers_nobody_breaks_off(rig: Rig) -> None:
    rig.first.follow(faults=["error status=500"])
    try:
        with pytest.raises(RuntimeError, match="direct answered nobody"):
            Comparison(rig, None, seconds=0.2, rounds=1, tell=quiet).flat_out(2)
    finally:
        rig.first.follow()


def test_a_litellm_that_is_not_there_is_told(rig: Rig, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack, pytest.raises(RuntimeError, match="nowhere cannot be started: No such file"):
        LiteLlm(stack, tmp_path / "nowhere", rig)


def test_a_litellm_that_does_not_start_is_told_with_what_it_said(rig: Rig, tmp_path: Path) -> None:
    program = tmp_path / "litellm"
    program.write_text("#!/bin/sh\necho no such model >&2\nexit 3\n")
    program.chmod(0o755)

    with contextlib.ExitStack() as stack, pytest.raises(RuntimeError, match="LiteLLM did not start: no such model"):
        LiteLlm(stack, program, rig)


def test_identical_questions_cost_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_faults, "_AT_ONCE", 40)

    found = router_faults.single_flight("deterministic", quiet)

    assert (found["questions"], found["visible_failures"], found["upstream_calls"]) == (40, 0, 1)
    assert found["said_to_be_cached"] == 39


def test_figures_stand_beside_what_they_have_to_be() -> None:
    part = {"visible_failures": 0, "attempts_per_turn": 1.31}
    report = {
        "mixed_faults": part | {"attempts_per_turn": 1.01},
        "mixed_faults_kept_on": part,
        "dead_primary": part | {"attempts_per_turn": 1.2, "visible_failures": 3},
    }

    bars = dict(router._bars(report))

    assert {name: (each["value"], each["met"]) for name, each in bars.items()} == {
        "visible_failures": (3, False),
        "attempts_per_turn": (1.31, True),
        "attempts_per_turn_dead_primary": (1.2, False),
    }
    assert router._headline(report)["visible_failures"] == 3


def test_the_command_prints_json_for_machines_alone() -> None:
    command = [sys.executable, "-m", "moltbot_server.bench", "router", "--only", "dead", "--seconds", "0.5"]

    ended = subprocess.run([*command, "--rounds", "1", "--json"], capture_output=True, text=True, check=True)

    report = json.loads(ended.stdout)
    assert set(report["bars"]) == {
        "dead_first_turns_per_s",
        "dead_first_first_token_p50_ms",
        "dead_first_failures",
    }
    assert report["options"]["parts"] == ["dead"]
    assert report["machine"]["processors"] > 0
