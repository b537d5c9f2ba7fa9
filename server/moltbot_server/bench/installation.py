"""A whole installation as `moltbot start` runs it: real processes, a workspace of its own, free ports; its costs."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from moltbot_server.bench.processes import processor_seconds
from moltbot_server.workspace import Workspace

_MOLTBOT = (sys.executable, "-m", "moltbot_server.cli")
_PORTS = ("--port", "0", "--grpc-port", "0", "--metrics-port", "0", "--log-level", "warning")
# What the shell that runs a benchmark happens to say of models is not what is measured, nor are answers that were kept.
_BUILT_IN = {
    "MODEL_TYPE": "",
    "MODEL_PATH": "",
    "CONTEXT_LENGTH": "",
    "MOLTBOT_SYSTEM_PROMPT": "",
    "MOLTBOT_CACHE_ANSWERS": "off",
    "MOLTBOT_FIRST_TUNING": "off",
}
_SIGNS = {"serving": "MoltBot is ready", "answer": "to the first word"}
_LEAVE = 30.0


class Installation:
    """A MoltBot that runs, with the built-in model unless its environment names another."""

    def __init__(self, workspace: Workspace, process: subprocess.Popen[str], until: str) -> None:
        """Wait for the stage `until`: `serving`, or `answer` to its first question.

        Raises:
            RuntimeError: it ended before that; the text is what it said.
        """
        self.workspace = workspace
        self.seconds_to: dict[str, float] = {}
        self.said: deque[str] = deque(maxlen=500)
        self._process = process
        self._began = time.perf_counter()
        self._await(until)
        # Nobody else reads: a full pipe would hold its processes up.
        self._reader = threading.Thread(target=self._drain, daemon=True)
        self._reader.start()
        told = self.status()
        self.grpc, self.http, self.metrics = told["core"]["grpc"], told["http"]["address"], told["core"]["metrics"]

    @property
    def bearer(self) -> str:
        """What the header `authorization` has to be."""
        return f"Bearer {self.workspace.read_key()}"

    @property
    def engine(self) -> str:
        """The address of the engine role by itself."""
        return f"unix:{self.workspace.engine_socket}"

    def status(self) -> dict[str, Any]:
        """Return what `moltbot status --json` says."""
        command = [*_MOLTBOT, "status", "--json", "--workspace", str(self.workspace.folder)]
        # Its exit status tells of a process that is being started again; what it says is wanted all the same.
        said: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=False).stdout)
        return said

    def memory(self) -> dict[str, float]:
        """Return the proportional memory of each process in MB, and of `all`."""
        said = self.status()
        sizes = {name: process["memory"] or 0 for name, process in said["processes"].items()} | {"all": said["memory"]}
        return {name: round(size / 1e6, 1) for name, size in sizes.items()}

    def pids(self) -> dict[str, int]:
        """Return the process ids by name."""
        return {name: process["pid"] for name, process in self.status()["processes"].items()}

    def counter(self, name: str) -> float:
        """Return the value of a metric of the core that has no labels."""
        with urllib.request.urlopen(f"{self.metrics}/metrics", timeout=10) as page:
            for line in page.read().decode().splitlines():
                if line.startswith(f"{name} "):
                    return float(line.split()[1])
        raise RuntimeError(f"the core has no metric {name}")

    def leave(self) -> None:
        """Ask it to leave, as Ctrl-C does, and wait.

        Raises:
            RuntimeError: it did not leave in time; it was killed.
        """
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(_LEAVE)
        except subprocess.TimeoutExpired:
            self._process.kill()  # its children are tied to its life
            self._process.wait()
            raise RuntimeError(f"MoltBot did not leave within {_LEAVE:g} s") from None
        finally:
            self._reader.join(_LEAVE)
            assert self._process.stdout is not None
            self._process.stdout.close()

    def _await(self, until: str) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.said.append(line)
            now = time.perf_counter() - self._began
            self.seconds_to.update({stage: now for stage, sign in _SIGNS.items() if sign in line})
            if until in self.seconds_to:
                return
        raise RuntimeError(f"moltbot start ended early:\n{''.join(self.said)}")

    def _drain(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.said.append(line)


@contextmanager
def started(
    *flags: str,
    workspace: Workspace | None = None,
    until: str = "serving",
    cpus: set[int] | None = None,
    **environment: str,
) -> Iterator[Installation]:
    """Run `moltbot start`, without a workspace in a temporary one; `cpus` are its processors, None for all."""
    if workspace is None:
        with tempfile.TemporaryDirectory(prefix="moltbot-bench-") as folder:
            place = Workspace(folder=Path(folder))
            with started(*flags, workspace=place, until=until, cpus=cpus, **environment) as installation:
                yield installation
        return
    process = subprocess.Popen(
        [*_MOLTBOT, "start", "--workspace", str(workspace.folder), *_PORTS, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **_BUILT_IN, **environment},
        preexec_fn=_pinned(cpus),
        process_group=0,  # Ctrl-C at a terminal goes to the benchmark alone, which ends it in order
    )
    try:
        installation = Installation(workspace, process, until)
        yield installation
    except BaseException:
        _cut(process)
        raise
    installation.leave()


def _cut(process: subprocess.Popen[str]) -> None:
    """Let a MoltBot leave at once, which two signals ask for: nobody wants to know any more how it does."""
    for number in (signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
    try:
        process.wait(_LEAVE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def step_aside(cpus: set[int] | None) -> None:
    """Leave the processors of an installation to it: this process, and those it starts from now on, use the others."""
    if cpus:
        others = set(range(os.cpu_count() or 1)) - cpus
        os.sched_setaffinity(0, others or cpus)


class Meter:
    """What an installation, the load upon it and the whole machine use of the processors, from now on."""

    def __init__(self, installation: Installation, *loads: Callable[[], float]) -> None:
        """`loads` tell the processor seconds that the load's processes have used."""
        self._loads = loads
        self._load = sum(load() for load in loads)
        self._processes = {name: psutil.Process(pid) for name, pid in installation.pids().items()}
        self._began, self._used, self._machine = time.perf_counter(), self._seconds(), psutil.cpu_times()

    def read(self) -> dict[str, float]:
        """Return shares of the machine's processors: used by the installation, used by the load, idle."""
        seconds, processors = time.perf_counter() - self._began, psutil.cpu_count() or 1
        used, machine = self._seconds() - self._used, psutil.cpu_times()
        passed = [now - then for now, then in zip(machine, self._machine, strict=True)]
        # Time of guests is counted in the user's already.
        total = sum(passed) - sum(getattr(machine, name, 0) - getattr(self._machine, name, 0) for name in _GUESTS)
        idle = (machine.idle + machine.iowait - self._machine.idle - self._machine.iowait) / max(total, 1e-9)
        return {
            "processors": processors,
            "installation_share": round(used / seconds / processors, 4),
            "load_share": round((sum(load() for load in self._loads) - self._load) / seconds / processors, 4),
            "machine_idle_share": round(idle, 4),
            "seconds": round(seconds, 1),
        }

    def _seconds(self) -> float:
        return sum(processor_seconds(self._processes).values())


_GUESTS = ("guest", "guest_nice")


def _pinned(cpus: set[int] | None) -> Callable[[], None] | None:
    return (lambda: os.sched_setaffinity(0, cpus)) if cpus else None


def spread(seconds: list[float]) -> dict[str, float]:
    """Return the mean, the median, the 99th percentile and the largest of times in milliseconds; nothing of none."""
    if not seconds:
        return {}
    ordered = sorted(seconds)
    return {
        "mean": round(statistics.fmean(ordered) * 1000, 2),
        "p50": round(statistics.median(ordered) * 1000, 2),
        "p99": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1000, 2),
        "max": round(ordered[-1] * 1000, 2),
    }
