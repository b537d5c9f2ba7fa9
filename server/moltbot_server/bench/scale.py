"""`moltbot bench scale`: what more workers bring, on this machine, with the load that asks them on it as well.

One, two and four cores wait side by side, each set on a port and a database of its own; slices of load go to one set
after the other, every other round in the opposite order. A turn is a `RunTurn` of a session: authenticated, accepted
and finished in SQLite with synchronous=FULL, answered by the scripted engine in the core. The load comes from
processes of their own, whose clients speak no more of gRPC than it takes: on a machine that all share, what they use
is not there for the cores. Nothing is pinned to a processor.
"""

from __future__ import annotations

import contextlib
import json
import socket
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from moltbot_server.bench.core import machine
from moltbot_server.bench.processes import Child
from moltbot_server.bench.scale_balance import balance
from moltbot_server.workspace import Workspace

Report = dict[str, Any]


def bench_scale(
    *,
    workers: Sequence[int] = (1, 2, 4),
    seconds: float = 4.0,
    rounds: int = 9,
    in_flight: int = 256,
    connections: int = 64,
    loaders: int = 2,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Run the benchmark and return its figures.

    Slices take `seconds`; `in_flight` calls on so many `connections` come from all `loaders`, which are processes.
    """
    with tempfile.TemporaryDirectory(prefix="moltbot-bench-") as folder, contextlib.ExitStack() as stack:
        sets = [_Set(stack, Path(folder) / str(count), count) for count in workers]
        for each in sets:
            progress(f"{each.count} workers start")
            each.ready(in_flight // loaders, max(1, connections // loaders), loaders)
            each.slice(seconds / 2)
        found: list[dict[int, dict[str, float]]] = []
        for number in range(rounds):
            progress(f"round {number + 1} of {rounds}: slices of {seconds:g} s")
            order = sets if number % 2 == 0 else sets[::-1]
            found.append({each.count: each.slice(seconds) for each in order})
        progress("how connections spread")
        spread = {each.count: balance(each.port, each.pids) for each in sets if each.count > 1}
    asked = {"seconds": seconds, "rounds": rounds, "in_flight": in_flight, "connections": connections}
    return {"machine": machine(), **asked, "loaders": loaders, **_summary(found, workers), "balance": spread}


class _Set:
    """Cores that share a port and a database, and the processes that ask them."""

    def __init__(self, stack: contextlib.ExitStack, folder: Path, count: int) -> None:
        self.count = count
        self._stack = stack
        self._workspace = Workspace(folder=folder)
        self._workspace.create()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port: int = listener.getsockname()[1]
        words = ("--workspace", str(folder), "--grpc-port", str(self.port), "--metrics-port", "0")
        self._cores = [
            stack.enter_context(
                Child(
                    *("moltbot_server", *words, "--log-level", "warning", "--workers", str(count)),
                    *(("--worker", str(number)) if count > 1 else ()),
                    MODEL_TYPE="scripted",
                )
            )
            for number in range(1, count + 1)
        ]
        self._loads: list[Child] = []

    @property
    def pids(self) -> list[int]:
        """The processes of the cores."""
        return [core.pid for core in self._cores]

    def ready(self, in_flight: int, connections: int, loaders: int) -> None:
        """Wait until all cores serve, then start what asks them: so much each."""
        for core in self._cores:
            core.read()
        plan = {
            "address": f"127.0.0.1:{self.port}",
            "key": self._workspace.read_key(),
            "in_flight": in_flight,
            "channels": connections,
        }
        for _ in range(loaders):
            load = self._stack.enter_context(Child("moltbot_server.bench.lean_load"))
            load.tell(json.dumps(plan))
            self._loads.append(load)

    def slice(self, seconds: float) -> dict[str, float]:
        """Make load for a while; return turns a second, latencies, and how many processors were busy with what."""
        psutil.cpu_percent()
        before = self._used()
        for load in self._loads:
            load.tell(str(seconds))
        results = [load.read() for load in self._loads]
        cores, loads = (after - begun for after, begun in zip(self._used(), before, strict=True))
        busy = psutil.cpu_percent() / 100 * (psutil.cpu_count() or 1)
        if any(result["errors"] for result in results):
            raise RuntimeError(f"calls failed: {[result['first_error'] for result in results]}")
        calls = sum(result["calls"] for result in results)
        return {
            "turns_per_s": calls / seconds,
            "p50_ms": max(result["p50_ms"] for result in results),
            "p99_ms": max(result["p99_ms"] for result in results),
            "core_us": cores / max(1, calls) * 1e6,
            "load_us": loads / max(1, calls) * 1e6,
            "cores_busy": cores / seconds,
            "load_busy": loads / seconds,
            "others_busy": max(0.0, busy - (cores + loads) / seconds),
        }

    def _used(self) -> tuple[float, float]:
        return sum(core.cpu_seconds() for core in self._cores), sum(load.cpu_seconds() for load in self._loads)


def _summary(found: Sequence[dict[int, dict[str, float]]], workers: Sequence[int]) -> Report:
    """Return the medians of the rounds, and what each number of workers brings against the first one."""
    first = workers[0]
    report: Report = {
        "turns_per_s": {
            str(count): round(statistics.median(part[count]["turns_per_s"] for part in found)) for count in workers
        }
    }
    detail: Report = {}
    for count in workers:
        parts = [part[count] for part in found]
        detail[str(count)] = {name: round(statistics.median(part[name] for part in parts), 3) for name in parts[0]}
        if count != first:
            ratios = [part[count]["turns_per_s"] / part[first]["turns_per_s"] for part in found]
            report[f"speedup_{count}"] = round(statistics.median(ratios), 3)
            detail[str(count)] |= {"lowest": round(min(ratios), 3), "highest": round(max(ratios), 3)}
    return {**report, "detail": detail}


def scale_table(report: Report) -> str:
    """Return the report for people."""
    head = f"{'workers':>7}{'turns/s':>10}{'speedup':>9}   p50 / p99 ms     us a turn: cores, load"
    lines = [f"{head}   processors: cores, load, others"]
    for count, turns in report["turns_per_s"].items():
        one = report["detail"][count]
        speedup = f"{report[f'speedup_{count}']:.2f}x" if f"speedup_{count}" in report else ""
        lines.append(
            f"{count:>7}{turns:>10,}{speedup:>9}   {one['p50_ms']:6.1f} / {one['p99_ms']:6.1f}"
            f"{one['core_us']:>15.0f}{one['load_us']:>8.0f}"
            f"{one['cores_busy']:>19.1f}{one['load_busy']:>7.1f}{one['others_busy']:>7.1f}"
        )
    for count, spread in report["balance"].items():
        lines += ["", f"{count} workers: share of the connections that the busiest one has (1/{count} would be even)"]
        lines += [
            f"{number:>7} connections: {found['mean']:.0%} on average, {found['worst']:.0%} at worst"
            for number, found in spread.items()
        ]
    return "\n".join(lines)
