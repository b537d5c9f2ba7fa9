"""What ghz measured, as rows that a person can read."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

MILLISECOND = 1e6
"""Nanoseconds, in which ghz counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One scenario's outcome: calls, calls per second, latencies in milliseconds, and how the calls ended."""

    name: str
    count: int
    rps: float
    p50: float
    p95: float
    p99: float
    errors: int
    statuses: Mapping[str, int]

    @classmethod
    def of(cls, name: str, report: Mapping[str, Any]) -> Row:
        """Reads ghz's report."""
        latencies = sorted(call["latency"] / MILLISECOND for call in report["details"])
        statuses = report["statusCodeDistribution"]
        return cls(
            name=name,
            count=report["count"],
            rps=round(report["rps"], 1),
            p50=percentile(latencies, 0.50),
            p95=percentile(latencies, 0.95),
            p99=percentile(latencies, 0.99),
            errors=sum(number for status, number in statuses.items() if status != "OK"),
            statuses=statuses,
        )

    def as_json(self) -> dict[str, Any]:
        """Answers the row as plain values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of a ramp: calls per second that were offered and that began, and their p99 in milliseconds."""

    offered: int
    begun: float
    p99: float
    errors: int


def percentile(ordered: Sequence[float], share: float) -> float:
    """Answers the value that `share` of the sorted values do not exceed; 0 where there are none."""
    if not ordered:
        return 0.0
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2)


def steps(scenario: Mapping[str, Any], report: Mapping[str, Any]) -> Iterator[Step]:
    """Cuts a stepped open-loop run into its steps, so that the knee shows."""
    seconds = int(scenario["load-step-duration"].removesuffix("s"))
    calls = [(datetime.fromisoformat(_microseconds(call["timestamp"])), call) for call in report["details"]]
    if not calls:
        return
    first = min(begun for begun, _ in calls)
    rates = range(scenario["load-start"], scenario["load-end"] + 1, scenario["load-step"])
    for index, rate in enumerate(rates):
        inside = [call for begun, call in calls if index <= (begun - first).total_seconds() / seconds < index + 1]
        if inside:
            yield Step(
                offered=rate,
                begun=round(len(inside) / seconds, 1),
                p99=percentile(sorted(call["latency"] / MILLISECOND for call in inside), 0.99),
                errors=sum(call["status"] != "OK" for call in inside),
            )


def _microseconds(timestamp: str) -> str:
    """Cuts Go's nanoseconds, which Python does not read."""
    return re.sub(r"(\.\d{6})\d+", r"\1", timestamp)


def print_steps(rows: Iterator[Step]) -> None:
    """Prints a ramp."""
    print(f"  {'offered/s':>10} {'begun/s':>10} {'p99 ms':>10} {'errors':>7}")
    for row in rows:
        print(f"  {row.offered:>10} {row.begun:>10.1f} {row.p99:>10.2f} {row.errors:>7}")


def print_rows(rows: Sequence[Row]) -> None:
    """Prints the table of all scenarios."""
    columns = f"{'calls':>7} {'calls/s':>9} {'p50 ms':>8} {'p95 ms':>8} {'p99 ms':>8} {'errors':>7}  statuses"
    header = f"{'scenario':<22} {columns}"
    print(header + "\n" + "-" * len(header))
    for row in rows:
        statuses = ", ".join(f"{status} {number}" for status, number in sorted(row.statuses.items()))
        figures = f"{row.count:>7} {row.rps:>9.1f} {row.p50:>8.2f} {row.p95:>8.2f} {row.p99:>8.2f} {row.errors:>7}"
        print(f"{row.name:<22} {figures}  {statuses}")


def describe_machine(root: Path, ghz: Path) -> dict[str, str]:
    """Answers what a reader must know to compare the figures with others."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
    )
    return {
        "cores": str(os.cpu_count()),
        "processor": _processor(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "grpcio": metadata.version("grpcio"),
        "moltbot": metadata.version("moltbot"),
        "ghz": _ghz_version(ghz),
        "commit": commit.stdout.strip() or "unknown",
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists() and (match := re.search(r"model name\s*: (.+)", information.read_text("utf-8"))):
        return match[1].strip()
    return platform.processor() or platform.machine()


def _ghz_version(ghz: Path) -> str:
    """Reads the version that Go wrote into the program; `ghz --version` knows it only in official builds."""
    match = re.search(rb"mod\tgithub\.com/bojand/ghz\t(v[\w.-]+)", ghz.read_bytes())
    return match[1].decode("ascii") if match else "unknown"
