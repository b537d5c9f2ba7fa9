"""The benchmark of what stores cost runs whole, and compares each with the one that keeps nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from moltbot_server.bench.durability import _summary, bench_durability
from moltbot_server.bench.durability_command import durability_table
from moltbot_server.bench.durability_rig import Kept
from moltbot_server.bench.local_rig import undisturbed
from redis_process import redis_server


def test_each_store_is_compared_with_memory_in_a_whole_installation() -> None:
    told: list[str] = []

    report = bench_durability(
        rounds=1, seconds=0.5, stores=("sqlite", "redis_always"), redis=redis_server(), progress=told.append
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


def test_stores_in_redis_are_left_out_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with contextlib.ExitStack() as stack:
        assert Kept.begin(stack, "redis_always") is None
