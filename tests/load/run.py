"""Drives a core with ghz through the scenarios beside this file, and prints what each measured.

    python tests/load/run.py [--address HOST:PORT] [--only NAME ...] [--seconds N] [--out FOLDER]

Without an address it starts cores of its own, each in a fresh workspace with the engine that a scenario's tag `engine`
names, on cores of the machine that ghz does not use where there are four or more. With an address it drives that core,
whatever its engine is, with the key of the workspace that the `moltbot` command would use. Every scenario is bounded by
its configuration; results are written as JSON to build/load/, with the machine, the versions and the commit.
Ends with 1 when a call ended with anything but OK, unless the scenario's tag `overload` expects it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from driven_core import running_core
from load_report import Row, describe_machine, print_rows, print_steps, steps

ROOT = Path(__file__).resolve().parents[2]
SCENARIOS = Path(__file__).parent
PROTOSET = "moltbot.binpb"
"""The contract's descriptors: with them ghz asks the core for no reflection."""
SLACK = 60
"""Seconds that ghz may take beyond the bound of a scenario."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A core to drive: where it listens and the file with its key as gRPC metadata."""

    address: str
    metadata: Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the scenarios that were asked for; answers the exit status."""
    parser = argparse.ArgumentParser(description="Drives a core with ghz.")
    parser.add_argument("--address", help="a core that runs already, as HOST:PORT")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="scenarios to run, without .json")
    parser.add_argument("--seconds", type=int, help="how long each scenario lasts, instead of what it says")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "load")
    options = parser.parse_args(arguments)
    scenarios = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(SCENARIOS.glob("*.json"))}
    if unknown := set(options.only or ()) - set(scenarios):
        parser.error(f"no scenario {', '.join(sorted(unknown))}; there are {', '.join(scenarios)}")
    chosen = {name: scenarios[name] for name in options.only or scenarios}
    options.out.mkdir(parents=True, exist_ok=True)
    buf = [Path(sys.executable).parent / "buf", "build", "--as-file-descriptor-set", "--output", options.out / PROTOSET]
    subprocess.run(buf, cwd=ROOT, check=True)

    if options.seconds:
        chosen = {name: {**scenario, "duration": f"{options.seconds}s"} for name, scenario in chosen.items()}
    rows: list[Row] = []
    for engine in dict.fromkeys(scenario["tags"]["engine"] for scenario in chosen.values()):
        with target(options.address, engine) as core:
            for name, scenario in chosen.items():
                if scenario["tags"]["engine"] == engine:
                    rows.append(drive(name, scenario, core, options.out))
    machine = describe_machine(ROOT, ghz())
    (options.out / "summary.json").write_text(
        json.dumps({"machine": machine, "scenarios": [row.as_json() for row in rows]}, indent=2) + "\n", "utf-8"
    )
    print("\n" + " · ".join(f"{key} {value}" for key, value in machine.items()) + "\n")
    print_rows(rows)
    return int(any(row.errors for row in rows if "overload" not in chosen[row.name]["tags"]))


def ghz() -> Path:
    """Answers the ghz that `make load` installed, or the one of the system."""
    own = ROOT / ".tools" / "bin" / "ghz"
    if own.exists():
        return own
    for folder in os.get_exec_path():
        if (path := Path(folder) / "ghz").exists():
            return path
    raise SystemExit("ghz is not installed: type  make load  which installs it")


@contextmanager
def target(address: str | None, engine: str) -> Iterator[Target]:
    """Answers a core with that engine, started here unless an address is given, and its key in a private file."""
    with tempfile.TemporaryDirectory(prefix="moltbot-load-") as folder, running_core(engine, address) as core:
        metadata = Path(folder) / "metadata.json"
        metadata.touch(mode=0o600)
        metadata.write_text(json.dumps({"authorization": f"Bearer {core.key}"}), "utf-8")
        yield Target(address=core.address, metadata=metadata)


def drive(name: str, scenario: dict[str, Any], core: Target, out: Path) -> Row:
    """Runs one scenario, leaves its report in `out` and answers its figures."""
    report_file = out / f"{name}.json"
    print(f"{scenario['tags']['title']}, {scenario['duration']} ...", flush=True)
    command: list[str | Path] = [
        ghz(),
        "--insecure",
        "--config",
        SCENARIOS / f"{name}.json",
        "--protoset",
        out / PROTOSET,
    ]
    command += ["--metadata-file", core.metadata, "--format", "json", "--output", report_file]
    command += ["--duration", scenario["duration"], core.address]
    bound = int(scenario["duration"].removesuffix("s")) + SLACK
    status = subprocess.run(command, cwd=ROOT, timeout=bound, stdin=subprocess.DEVNULL, check=False).returncode
    if status:
        raise SystemExit(f"{name}: ghz ended with status {status}")
    report = json.loads(report_file.read_text("utf-8"))
    report["options"].pop("metadata", None)  # the key does not belong in a result that people pass on
    report_file.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    if scenario.get("load-schedule") == "step":
        print_steps(steps(scenario, report))
    return Row.of(name, report)


if __name__ == "__main__":
    raise SystemExit(main())
