"""Cores that are ended at random moments under load: nobody loses anything, and nobody is told anything twice."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import fault_nodes
import fault_run
import pytest
from fault_stores import redis_program

KILLS = int(os.environ.get("KILLS", "100"))


def ended(tmp_path: Path, *arguments: str) -> str:
    """Carry orders out and return the lines at the end, which have to say that nothing is broken."""
    # Tests of many kinds may run beside these: with twice as many programs as processors, 3 s were the longest.
    command = [sys.executable, fault_run.__file__, "--folder", str(tmp_path), "--longest", "10", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    told = "\n".join(done.stdout.splitlines()[-20:])
    assert done.returncode == 0, f"{told}\n{done.stderr[-3000:]}"
    return told


def numbers(told: str) -> dict[str, int]:
    """Return the numbers of the last line."""
    return {name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", told.splitlines()[-1])}


def test_cores_that_are_killed_again_and_again_lose_and_repeat_nothing(tmp_path: Path) -> None:
    told = numbers(ended(tmp_path, "--kills", str(KILLS), "--rigs", "2", "--streams", "24", "--each", "15"))

    assert told["kills"] == KILLS
    assert told["turns"] > KILLS
    assert {name: told[name] for name in ("lost", "duplicated", "mixed", "out_of_order")} == {
        "lost": 0,
        "duplicated": 0,
        "mixed": 0,
        "out_of_order": 0,
    }


def test_who_reads_over_http_loses_and_repeats_nothing_though_adapters_are_killed(tmp_path: Path) -> None:
    told = ended(tmp_path, "--kills", "10", "--adapters", "2", "--streams", "16")

    assert numbers(told)["kills"] == 10
    assert numbers(told)["turns"] > 10
    assert " failed=0 " in told


@pytest.mark.skipif(redis_program() is None, reason="redis-server is not installed: type  scripts/tools redis")
def test_nothing_that_was_acknowledged_is_lost_when_redis_is_killed(tmp_path: Path) -> None:
    told = ended(
        tmp_path, "--kills", "10", "--how", "store", "--store", "redis", "--nodes", "2", "--sticky", "--streams", "16"
    )

    assert numbers(told)["kills"] == 10
    assert numbers(told)["turns"] > 10


@pytest.mark.skipif(redis_program() is None, reason="redis-server is not installed: type  scripts/tools redis")
@pytest.mark.parametrize("how", ["kill", "leave"])
def test_turns_of_a_node_that_is_gone_go_on_at_another_one_in_order(tmp_path: Path, how: str) -> None:
    told = ended(tmp_path, "--kills", "8", "--how", how, "--store", "redis", "--nodes", "3", "--streams", "24")

    assert numbers(told)["kills"] == 8
    assert numbers(told)["turns"] > 24
    assert " failed=0 " in told


def test_a_rolling_restart_is_seen_by_nobody(tmp_path: Path) -> None:
    told = ended(tmp_path, "--kills", "4", "--how", "leave", "--streams", "24")

    assert numbers(told)["lost"] == 0
    assert " failed=0 " in told


def test_workers_that_are_killed_are_stood_in_for_by_the_others(tmp_path: Path) -> None:
    told = ended(tmp_path, "--kills", "8", "--workers", "3", "--streams", "16")

    assert {name: numbers(told)[name] for name in ("kills", "lost", "duplicated", "mixed", "out_of_order")} == {
        "kills": 8,
        "lost": 0,
        "duplicated": 0,
        "mixed": 0,
        "out_of_order": 0,
    }


def test_workers_that_leave_one_after_the_other_are_missed_by_nobody(tmp_path: Path) -> None:
    told = ended(tmp_path, "--kills", "6", "--how", "leave", "--workers", "2", "--streams", "16")

    assert numbers(told)["lost"] == 0
    assert " failed=0 " in told


@pytest.mark.parametrize("flags", [("--workers", "2"), ("--rigs", "1")])
def test_cores_that_do_not_come_to_serve_are_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    monkeypatch.setattr(fault_nodes, "START", 0.01)
    assert fault_run.main(["--kills", "1", "--folder", str(tmp_path), *flags]) == fault_run.NOT_CARRIED_OUT
    told = capsys.readouterr()
    assert (told.out, "fault_run: n0 does not serve within 0.01 s" in told.err) == ("", True)
    assert "Traceback" not in told.err


@pytest.mark.parametrize("model", ["builtin", "scripted"])
def test_a_core_under_its_supervisor_comes_back_by_itself(tmp_path: Path, model: str) -> None:
    told = ended(tmp_path, "--kills", "5", "--supervised", "--streams", "8", "--model", model)

    assert numbers(told)["kills"] == 5
    assert " failed=0 " in told
