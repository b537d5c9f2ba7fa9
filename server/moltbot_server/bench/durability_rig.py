"""The MoltBots that `moltbot bench durability` compares, each with a store of its own."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import msgspec
import psutil

from moltbot_server.bench import local_load
from moltbot_server.bench.installation import started
from moltbot_server.bench.local_prompts import Workload
from moltbot_server.bench.local_rig import Busy, Counted
from moltbot_server.bench.processes import Child
from moltbot_server.demo_model import ARTIFACT
from moltbot_server.models.tuning import keep_tuning, tuning_for
from moltbot_server.workspace import Workspace, find_workspace

MEMORY = "memory"
STORES = {MEMORY: "", "sqlite": "", "redis_always": "always", "redis_everysec": "everysec"}
"""The stores by name; for those in Redis, when it has what it is given written to the disk."""
_START = 10.0


class Kept:
    """A MoltBot that runs with one store, and the load upon it."""

    def __init__(self, stack: contextlib.ExitStack, environ: dict[str, str]) -> None:
        """Start it with the tuning that a start would use here; it ends with `stack`."""
        self._stack = stack
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="moltbot-bench-"))
        workspace = Workspace(folder=Path(place))
        workspace.create()
        keep_tuning(workspace, ARTIFACT, ARTIFACT.name, tuning_for(find_workspace(os.environ), ARTIFACT))
        environ = {"MOLTBOT_ENGINE": "", "MOLTBOT_THREADS": "", **environ}
        installation = stack.enter_context(started(workspace=workspace, cpus=None, **environ))
        self._address, self._key = installation.grpc, workspace.read_key()
        self._processes = {name: psutil.Process(pid) for name, pid in installation.pids().items()}
        self._loads: dict[int, Child] = {}

    @classmethod
    def begin(cls, stack: contextlib.ExitStack, store: str, *, redis: str) -> Kept:
        """Start one with a store of `STORES`; `redis` is the path of redis-server."""
        if not (syncs := STORES[store]):
            return cls(stack, {"MOLTBOT_STORE_TYPE": store})
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moltbot-bench-redis-")))
        port, process = _redis(stack, redis, folder, syncs)
        kept = cls(
            stack, {"MOLTBOT_STORE_TYPE": "redis", "MOLTBOT_STORE_HOST": "127.0.0.1", "MOLTBOT_STORE_PORT": port}
        )
        kept._processes["redis"] = psutil.Process(process)
        return kept

    def stream(self, streams: int, seconds: float) -> Counted:
        """Count what is streamed to so many at a time, and the processors that each process keeps busy for it."""
        load = self._loads.get(streams) or self._load(streams)
        busy = Busy(self._processes | {"client": psutil.Process(load.pid)})
        load.tell(str(seconds))
        return load.read() | {"processors": busy.read()}

    def _load(self, streams: int) -> Child:
        load = self._loads[streams] = self._stack.enter_context(Child("moltbot_server.bench.local_load"))
        plan = local_load.Plan(address=self._address, key=self._key, workload=Workload(), streams=streams)
        load.tell(msgspec.json.encode(plan).decode())
        return load


def _redis(stack: contextlib.ExitStack, path: str, folder: Path, syncs: str) -> tuple[str, int]:
    """Run a Redis that writes down all that it is given, and return its port and its process.

    Raises:
        RuntimeError: it does not listen.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    keeping = ("--save", "", "--appendonly", "yes", "--appendfsync", syncs, "--maxmemory-policy", "noeviction")
    process = subprocess.Popen(
        [path, "--port", port, "--bind", "127.0.0.1", "--dir", str(folder), *keeping],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,
    )
    stack.callback(process.wait)
    stack.callback(process.kill)
    until = time.monotonic() + _START
    while time.monotonic() < until and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", int(port)), timeout=1.0).close()
        except OSError:
            time.sleep(0.02)  # it tells nobody when it listens
        else:
            return port, process.pid
    raise RuntimeError(f"{path} does not listen")
