"""What `moltbot bench local` compares: a MoltBot that runs, CTranslate2 by itself, and perhaps llama.cpp's server."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import psutil

from moltbot_server.bench import local_bare, local_load
from moltbot_server.bench.installation import Installation, started
from moltbot_server.bench.local_prompts import Workload
from moltbot_server.bench.processes import Child, processor_seconds
from moltbot_server.demo_model import ARTIFACT
from moltbot_server.models.tuning import ENVIRONMENT, Tuning, keep_tuning
from moltbot_server.workspace import Workspace

INLINE = "inline"
"""The form of an installation whose models run inside the core; without it they run in a process of their own."""

Counted = dict[str, Any]
_QUIET: Any = ENVIRONMENT


class Rig:
    """A MoltBot and CTranslate2 with one model, the same replicas and threads; their processes end with `stack`."""

    def __init__(self, stack: contextlib.ExitStack, folder: Path, tuning: Tuning, form: str = "") -> None:
        """`form` is `INLINE` or empty."""
        self._stack = stack
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="moltbot-bench-"))
        self._workspace = Workspace(folder=Path(place))
        self._workspace.create()
        keep_tuning(self._workspace, folder, folder.name, tuning)
        self._installation = stack.enter_context(_started(self._workspace, folder, form))
        self._processes = {name: psutil.Process(pid) for name, pid in self._installation.pids().items()}
        self._bare = stack.enter_context(Child("moltbot_server.bench.local_bare", cpus=None, **_QUIET))
        self._bare.tell(_line(local_bare.Plan(folder=str(folder), tuning=tuning)))
        self._bare.read()
        self._loads: dict[tuple[Workload, int], Child] = {}

    def streamed(self, workload: Workload, streams: int, seconds: float) -> Counted:
        """Count what the core streams to so many at a time, and the processors that each process keeps busy for it."""
        load = self._loads.get((workload, streams)) or self._load(workload, streams)
        busy = Busy(self._processes | {"client": psutil.Process(load.pid)})
        load.tell(str(seconds))
        return load.read() | {"processors": busy.read()}

    def bare(self, way: str, workload: Workload, rows: int, seconds: float) -> Counted:
        """Count what CTranslate2 writes by itself; see `local_bare.Job`."""
        busy = Busy({"bare": psutil.Process(self._bare.pid)})
        job: dict[str, Any] = {"way": way, "workload": workload, "rows": rows, "seconds": seconds}
        job |= {"warm": 1.0} if way == "one" else {}
        self._bare.tell(msgspec.json.encode(job).decode())
        return self._bare.read() | {"rows": rows, "processors": busy.read()}

    def _load(self, workload: Workload, streams: int) -> Child:
        load = self._stack.enter_context(Child("moltbot_server.bench.local_load"))
        address, key = self._installation.grpc, self._workspace.read_key()
        load.tell(_line(local_load.Plan(address=address, key=key, workload=workload, streams=streams)))
        self._loads[workload, streams] = load
        return load


QUIET = 0.2
"""Processors that other programs, and other machines on this one's processors, may use of a slice that counts."""


def undisturbed(slice_: Callable[[], Counted], patience: int) -> Counted:
    """Return a slice's counts: of the quietest of up to 1 + `patience` tries, no more than it takes for a quiet one."""
    tries = [slice_()]
    while tries[-1]["processors"]["others"] > QUIET and len(tries) <= patience:
        tries.append(slice_())
    return min(tries, key=lambda counted: float(counted["processors"]["others"]))


class Busy:
    """How many processors some processes keep busy from now on, and all others of this machine together."""

    def __init__(self, processes: Mapping[str, psutil.Process]) -> None:
        self._processes = processes
        self._began, self._before, self._idle = time.perf_counter(), self._used(), _idle()

    def read(self) -> dict[str, float]:
        """Return the processors by name, and those of all others as `others`."""
        passed = time.perf_counter() - self._began
        used = {name: (now - self._before[name]) / passed for name, now in self._used().items()}
        others = (psutil.cpu_count() or 1) - (_idle() - self._idle) / passed - sum(used.values())
        return {name: round(each, 2) for name, each in (used | {"others": max(0.0, others)}).items()}

    def _used(self) -> dict[str, float]:
        return processor_seconds(self._processes)


def _idle() -> float:
    """Return the processor time that nobody has used, in seconds."""
    times = psutil.cpu_times()
    return float(times.idle + getattr(times, "iowait", 0.0))


def _line(value: msgspec.Struct) -> str:
    return msgspec.json.encode(value).decode()


def _started(workspace: Workspace, folder: Path, form: str) -> contextlib.AbstractContextManager[Installation]:
    """Start a MoltBot as users do."""
    path = "" if folder == ARTIFACT else str(folder)
    return started(workspace=workspace, MODEL_PATH=path, MOLTBOT_ENGINE=form, MOLTBOT_THREADS="")
