"""The benchmark of what stores cost runs whole, and compares each with the one that keeps nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from moltbot_server.bench.__main__ import main as bench
from moltbot_server.bench.arguments import program
from moltbot_server.bench.durability import _summary, bench_durability
from moltbot_server.bench.durability_command import durability_table
from moltbot_server.bench.local_rig import undisturbed
from redis_process import redis_server


def test_each_store_is_compared_with_memory_in_a_whole_installation() -> None:
    told: list[str] = []

    report = bench_durability(
        rounds=1, seconds=0.5, stores=("sqlite", "redis_always"), redis=Path(redis_server()), progress=told.append
    )

    for way in ("streams", "alone"):
        assert set(report["slices"][way]) == {"memory", "sqlite", "redis_always"}
        for found in report["slices"][way].values():
            assert 1 < found["tokens_per_second"] / found["turns_per_second"] < 400, "both are of one second"
            assert found["first_token_p50_ms"] > 0
            assert found["stages_ms"]["accept"] > 0
    for name in ("sqlite", "redis_always"):
        assert report[name]["tokens_ratio"] > 0
        assert len([bar for bar in report["bars"] if bar.startswith(f"{name}:")]) == 2
    assert "memory" not in report
    table = durability_table(report)
    assert all(name in table for name in ("memory", "sqlite", "redis_always", "one at a time"))
    assert "starting: sqlite" in told


def counted(tokens: float, first: float) -> dict[str, Any]:
    return {"tokens_per_second": tokens, "first_token_ms": {"p50": first}}


def test_rounds_are_compared_one_by_one_and_the_median_counts() -> None:
    rounds = [
        {"memory": counted(100.0, 10.0), "sqlite": counted(50.0, 11.0)},  # a bad moment of the machine
        {"memory": counted(100.0, 10.0), "sqlite": counted(95.0, 12.0)},
        {"memory": counted(50.0, 30.0), "sqlite": counted(48.0, 32.5)},
    ]

    found = _summary("sqlite", {"streams": rounds, "alone": rounds[:1]})

    assert (found["tokens_ratio"], found["first_token_added_ms"], found["first_token_added_alone_ms"]) == (0.95, 2, 1)
    assert found["tokens_ratios"] == {"lowest": 0.5, "highest": 0.96}


def test_a_slice_that_others_disturbed_is_repeated_and_the_quietest_counts() -> None:
    def slices(*others: float) -> Callable[[], dict[str, Any]]:
        left = [counted(float(number), 1.0) | {"processors": {"others": busy}} for number, busy in enumerate(others)]
        return lambda: left.pop(0)

    assert undisturbed(slices(0.1), 3)["tokens_per_second"] == 0
    assert undisturbed(slices(1.5, 0.9, 0.1, 9.0), 3)["tokens_per_second"] == 2
    assert undisturbed(slices(1.5, 0.9, 1.2), 2)["tokens_per_second"] == 1
    assert undisturbed(slices(1.5), 0)["tokens_per_second"] == 0


def test_nothing_is_measured_where_nothing_can_be_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match=r"nothing to compare: .* redis-server is not in the PATH"):
        bench_durability(rounds=1, seconds=0.2, stores=["redis_always"])


def test_machines_are_told_what_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert bench(["durability", "--rounds", "1", "--seconds", "0.2", "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["left_out"] == ["redis_always", "redis_everysec"]
    assert told.err.startswith("redis_always, redis_everysec: left out, for redis-server is not in the PATH")


@pytest.mark.parametrize("asked", [("durability", "--redis"), ("router", "--litellm"), ("local", "--llama-server")])
def test_a_program_that_is_not_there_is_told_before_anything_starts(
    asked: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench([*asked, "/nowhere/program"])
    assert f"argument {asked[1]}: there is no program /nowhere/program" in capsys.readouterr().err


def test_a_program_keeps_the_name_that_it_is_called_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Debian's redis-tools has one program that is a server, or looks at a file, by its name.
    (tmp_path / "redis-server").symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    for named in ("redis-server", str(tmp_path / "redis-server")):
        assert program(named) == tmp_path / "redis-server"
