"""`moltbot bench core`: whole turns of the core against a bare grpc.aio server, in pairs within one run.

A turn of the core is authenticated, checked, accepted and finished in SQLite with synchronous=FULL, counted, and
answered by the scripted engine: with an echo for `unary_ratio`, with 32 deltas for the streams. The bare server echoes,
or streams 32 small messages. Both run as
processes of their own on the same processors, the load comes from others; slices of the two alternate, and each pair
gives a ratio. Reported is the median, with the lowest and the highest.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moltbot_server.bench.processes import Child
from moltbot_server.workspace import Workspace

PAIRS = (
    ("unary_ratio", "run_turn", "echo_unary", "calls"),
    ("stream_ratio", "stream_turn", "echo_stream", "messages"),
    ("coalesced_ratio", "stream_turn_coalesced", "echo_stream", "calls"),
)
LOADERS = 2


def bench_core(
    *, seconds: float = 2.0, rounds: int = 5, in_flight: int = 64, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Run the benchmark and return its figures: slices of `seconds`, `in_flight` calls from each load process."""
    cpus = sorted(os.sched_getaffinity(0))
    # With four processors or more, servers and load do not share any.
    split = len(cpus) >= 4
    served, loaded = (set(cpus[:2]), set(cpus[2:])) if split else (None, None)
    report: dict[str, Any] = {
        "machine": machine(),
        "seconds": seconds,
        "rounds": rounds,
        "in_flight": in_flight * LOADERS,
    }
    with tempfile.TemporaryDirectory(prefix="moltbot-bench-") as folder, contextlib.ExitStack() as stack:
        workspace = Workspace(folder=Path(folder))
        workspace.create()
        ports = ("--grpc-port", "0", "--metrics-port", "0", "--log-level", "warning")
        core = stack.enter_context(
            Child("moltbot_server", "--workspace", folder, *ports, cpus=served, MODEL_TYPE="scripted")
        )
        echo = stack.enter_context(Child("moltbot_server.bench.echo", cpus=served))
        addresses = {"core": core.read()["grpc"], "echo": echo.read()["grpc"]}
        loads = _Loads(stack, addresses, workspace.read_key(), in_flight, loaded)
        for figure, turn, bare, unit in PAIRS:
            progress(f"{figure}: {rounds} pairs of {seconds:g} s")
            loads.run(turn, seconds / 2)
            loads.run(bare, seconds / 2)
            pairs = []
            for number in range(rounds):
                order = (turn, bare) if number % 2 == 0 else (bare, turn)
                pairs.append({kind: _slice(loads, kind, seconds, core if kind == turn else echo) for kind in order})
            report[figure], report[figure.replace("ratio", "detail")] = _summary(pairs, turn, bare, unit)
    return report


class _Loads:
    """The load processes of each kind, started when first needed."""

    def __init__(
        self, stack: contextlib.ExitStack, addresses: dict[str, str], key: str, in_flight: int, cpus: set[int] | None
    ) -> None:
        self._stack, self._addresses, self._key = stack, addresses, key
        self._in_flight, self._cpus = in_flight, cpus
        self._children: dict[str, list[Child]] = {}

    def run(self, kind: str, seconds: float) -> dict[str, Any]:
        """Make load of a kind for a while and return the sum of what the processes counted."""
        children = self._children.get(kind) or self._start(kind)
        for child in children:
            child.tell(str(seconds))
        results = [child.read() for child in children]
        if any(result["errors"] for result in results):
            raise RuntimeError(f"calls failed: {[result['first_error'] for result in results]}")
        summed = {name: sum(result[name] for result in results) for name in ("calls", "messages")}
        slowest = {name: max(result[name] for result in results) for name in ("p50_ms", "p99_ms")}
        return {**summed, **slowest}

    def _start(self, kind: str) -> list[Child]:
        target = "echo" if kind.startswith("echo") else "core"
        plan = {
            "address": self._addresses[target],
            "kind": kind,
            "key": self._key if target == "core" else "",
            "in_flight": self._in_flight,
            "channels": 4,
        }
        self._children[kind] = [
            self._stack.enter_context(Child("moltbot_server.bench.load", cpus=self._cpus)) for _ in range(LOADERS)
        ]
        for child in self._children[kind]:
            child.tell(json.dumps(plan))
        return self._children[kind]


def _slice(loads: _Loads, kind: str, seconds: float, server: Child) -> dict[str, float]:
    before = server.cpu_seconds()
    counted = loads.run(kind, seconds)
    used = server.cpu_seconds() - before
    return {
        "calls": counted["calls"] / seconds,
        "messages": counted["messages"] / seconds,
        "cpu_us": used / max(1, counted["calls"]) * 1e6,
        "p50_ms": counted["p50_ms"],
        "p99_ms": counted["p99_ms"],
    }


def _summary(pairs: list[dict[str, dict[str, float]]], turn: str, bare: str, unit: str) -> tuple[float, dict[str, Any]]:
    ratios = [pair[turn][unit] / pair[bare][unit] for pair in pairs]
    median = {
        kind: {name: round(statistics.median(pair[kind][name] for pair in pairs), 3) for name in pairs[0][kind]}
        for kind in (turn, bare)
    }
    detail = {"lowest": round(min(ratios), 3), "highest": round(max(ratios), 3), "per_second": unit, **median}
    return round(statistics.median(ratios), 3), detail


def machine() -> dict[str, Any]:
    """Return what a figure depends on: processors, versions, commit and date."""
    names = ("grpcio", "protobuf", "uvloop", "ctranslate2", "moltbot")
    return {
        "processors": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "python": platform.python_version(),
        "kernel": platform.release(),
        **{name: version(name) for name in names},
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _commit() -> str:
    """Return the commit of a checkout; empty where MoltBot is installed, or git is not."""
    here = Path(__file__)
    asked = ["git", "-C", str(here.parent)]
    try:
        subprocess.run([*asked, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True)
        told = subprocess.run([*asked, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return told.stdout.strip()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
