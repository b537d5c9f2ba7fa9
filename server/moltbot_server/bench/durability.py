"""`moltbot bench durability`: what it costs that nothing is lost.

A MoltBot for each store runs as `moltbot start` runs it, with the built-in model: one that keeps turns in SQLite, one
on a Redis that waits for the disk at each write, one on a Redis that does so each second, and one that keeps nothing
but in memory. A process of its own streams turns from one after the other, 16 at a time and one at a time. Each round
goes through all of them, every other one in the opposite order, and gives each store a ratio and a difference to the
one that keeps nothing. Reported is the median, with the lowest and the highest.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from moltbot_server.bench.core import machine
from moltbot_server.bench.durability_rig import MEMORY, STORES, Kept
from moltbot_server.bench.local_rig import Counted, undisturbed
from moltbot_server.bench.serving_crowd import bar

STREAMS = 16
MOST_ADDED = 3.0
"""Milliseconds that a store may add to the median first token."""
LEAST_TOKENS = 0.9
"""The share of its tokens a second that a store leaves."""
_WAYS = {"streams": STREAMS, "alone": 1}
LEFT_OUT = "left out, for redis-server is not in the PATH (`--redis` names one)"
_RELATIVE = ("core", "client", "engine", "http", "redis", "others")

Progress = Callable[[str], None]


def bench_durability(
    *,
    rounds: int = 6,
    seconds: float = 6.0,
    redis: Path | None = None,
    stores: Collection[str] = tuple(STORES),
    patience: int = 0,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Run the benchmark and return its figures: `rounds` rounds of slices of `seconds`.

    `redis` is the path of redis-server; without it, and where none is installed, its stores are left out. A slice that
    others disturbed is repeated up to `patience` times, see `local_rig.undisturbed`.

    Raises:
        RuntimeError: a turn failed, a process ended early, or there is no store to compare.
    """
    server = str(redis or shutil.which("redis-server") or "")
    asked = [name for name in stores if name != MEMORY]
    compared = [name for name in asked if server or not STORES[name]]
    left_out = [name for name in asked if name not in compared]
    if left_out:
        progress(f"{', '.join(left_out)}: {LEFT_OUT}")
    if not compared:
        raise RuntimeError(f"there is nothing to compare: {LEFT_OUT}")
    load = [round(each, 2) for each in os.getloadavg()]
    report: dict[str, Any] = {
        "machine": machine() | {"load_before": load},
        "rounds": rounds,
        "seconds": seconds,
        "patience": patience,
        "streams": STREAMS,
        "left_out": left_out,
    }
    with contextlib.ExitStack() as stack:
        kept: dict[str, Kept] = {}
        for name in (MEMORY, *compared):
            progress(f"starting: {name}")
            kept[name] = Kept.begin(stack, name, redis=server)
        done = {way: _rounds(kept, way, count, rounds, seconds, patience, progress) for way, count in _WAYS.items()}
    bars: dict[str, Any] = {}
    for name in kept:
        if name != MEMORY:
            report[name] = _summary(name, done)
            bars[f"{name}: first token, ms more"] = bar(report[name]["first_token_added_ms"], "<=", MOST_ADDED)
            bars[f"{name}: tokens/s of memory's"] = bar(report[name]["tokens_ratio"], ">=", LEAST_TOKENS)
    report["bars"] = bars
    report["slices"] = {way: {name: _typical(name, found, seconds) for name in kept} for way, found in done.items()}
    report["every_round"] = {
        way: [{name: _brief(counted) for name, counted in each.items()} for each in found]
        for way, found in done.items()
    }
    return report


def _rounds(
    kept: Mapping[str, Kept],
    way: str,
    streams: int,
    rounds: int,
    seconds: float,
    patience: int,
    progress: Progress,
) -> list[dict[str, Counted]]:
    done = []
    names = list(kept)
    for each in kept.values():
        each.stream(streams, seconds / 3)  # connections, caches and files are warm then
    for number in range(rounds):
        progress(f"{way}: round {number + 1} of {rounds}")
        order = names if number % 2 == 0 else names[::-1]
        done.append({name: undisturbed(partial(kept[name].stream, streams, seconds), patience) for name in order})
    return done


def _summary(name: str, done: Mapping[str, Sequence[Mapping[str, Counted]]]) -> dict[str, Any]:
    ratios = [each[name]["tokens_per_second"] / each[MEMORY]["tokens_per_second"] for each in done["streams"]]
    found: dict[str, Any] = {"tokens_ratio": round(statistics.median(ratios), 3), "tokens_ratios": _ends(ratios)}
    for way, figure in (("streams", "first_token_added_ms"), ("alone", "first_token_added_alone_ms")):
        added = [_first(each[name]) - _first(each[MEMORY]) for each in done[way]]
        found[figure] = round(statistics.median(added), 2)
        found[f"{figure}_ends"] = _ends(added)
    return found


def _first(counted: Counted) -> float:
    return float(counted["first_token_ms"]["p50"])


def _ends(values: Sequence[float]) -> dict[str, float]:
    return {"lowest": round(min(values), 3), "highest": round(max(values), 3)}


def _typical(name: str, found: Sequence[Mapping[str, Counted]], seconds: float) -> dict[str, Any]:
    """Return the medians of one store's slices of so many seconds, and where the time and the processors went."""
    own = [each[name] for each in found]
    used = {part: statistics.median(each["processors"].get(part, 0.0) for each in own) for part in _RELATIVE}
    stages = {stage: statistics.median(each["stages_ms"][stage] for each in own) for stage in own[0]["stages_ms"]}
    return {
        "tokens_per_second": round(statistics.median(each["tokens_per_second"] for each in own), 1),
        "first_token_p50_ms": round(statistics.median(_first(each) for each in own), 2),
        "turns_per_second": round(statistics.median(each["answers"] for each in own) / seconds, 1),
        "stages_ms": {stage: round(value, 2) for stage, value in stages.items()},
        "processors": {part: round(value, 2) for part, value in used.items()},
    }


def _brief(counted: Counted) -> dict[str, float]:
    return {
        "tokens_per_second": counted["tokens_per_second"],
        "first_token_p50_ms": _first(counted),
        "others": counted["processors"]["others"],
    }
