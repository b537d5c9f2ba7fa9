"""A core that is asked for many turns of all kinds keeps nothing of them: no memory, task, file, row or key."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import soak
from fault_stores import redis_program
from soak import Rest, Soaked

TURNS = int(os.environ.get("TURNS", "20000"))


@pytest.mark.parametrize("store", ["sqlite", "redis"])
def test_nothing_is_left_over_after_many_turns(tmp_path: Path, store: str) -> None:
    if store == "redis" and redis_program() is None:
        pytest.skip("redis-server is not installed: type  scripts/tools redis")
    report = tmp_path / "soak.json"
    command = [sys.executable, soak.__file__, "--turns", str(TURNS), "--store", store, "--json", str(report)]

    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)

    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    told = json.loads(report.read_text())
    assert told["turns"] >= TURNS
    assert told["problems"] == []


def rest(*, left: int = 0, **fields: int) -> Rest:
    values = {"resident": 1, "tasks": 2, "files": 3, "threads": 4, "under_way": 0} | fields
    return Rest(**values, left={"rows of turns": left})


@pytest.mark.parametrize(
    ("after", "problem"),
    [
        (rest(tasks=3), "there were 2 tasks and now there are 3"),
        (rest(files=9), "there were 3 files and now there are 9"),
        (rest(threads=9), "there were 4 threads and now there are 9"),
        (rest(under_way=1), "1 turns are under way still"),
        (rest(left=7), "7 rows of turns are left"),
    ],
)
def test_whatever_is_left_over_is_told(after: Rest, problem: str) -> None:
    soaked = Soaked(turns=100, before=rest(), after=after, samples=[(50, 1000), (100, 1000)])

    assert soaked.problems(1.0) == [problem]


def test_memory_that_grows_with_each_turn_is_told() -> None:
    samples = [(turn, 1_000_000 + 3 * turn) for turn in range(1000, 101_000, 1000)]
    grown = Soaked(turns=100_000, before=rest(), after=rest(resident=300_000_000), samples=samples)
    waves = Soaked(turns=100_000, before=rest(), after=rest(), samples=[(turn, turn % 2000) for turn, _ in samples])

    assert grown.problems(1.0) == ["each turn left 3.00 bytes of memory behind"]
    assert waves.problems(1.0) == []
