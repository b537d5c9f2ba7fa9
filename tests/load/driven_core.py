"""A core to drive: one that runs already, or one of our own in a fresh workspace."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from moltbot_server.workspace import find_workspace

MODEL_TYPES = {"built-in": "", "scripted": "scripted"}
READY_WITHIN = 30
"""Seconds that a core may take until it serves."""
DRAINED_WITHIN = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Core:
    """Where a core listens and the key that it lets in."""

    address: str
    key: str = field(repr=False)


@contextmanager
def running_core(engine: str, address: str | None = None) -> Iterator[Core]:
    """Answers a core that serves: the one at `address`, or one of our own with that engine, ended with the block."""
    if address is not None:
        workspace = find_workspace(os.environ)
        yield ready(Core(address=address, key=os.environ.get("MOLTBOT_KEY") or workspace.read_key()))
        return
    with tempfile.TemporaryDirectory(prefix="moltbot-load-") as folder:
        grpc_port, http_port, metrics_port = free_ports(3)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MOLTBOT_")}
        environment["MOLTBOT_METRICS_PORT"] = str(metrics_port)
        environment["MOLTBOT_FIRST_TUNING"] = "off"
        environment["MOLTBOT_CACHE_ANSWERS"] = "off"  # the same questions again and again: the engine is measured
        if model_type := MODEL_TYPES[engine]:
            environment["MODEL_TYPE"] = model_type
        moltbot = [str(Path(sys.executable).parent / "moltbot")]
        place = ["--workspace", folder]
        subprocess.run([*moltbot, "init", *place], check=True, env=environment, stdout=subprocess.DEVNULL, timeout=60)
        ports = ["--grpc-port", str(grpc_port), "--port", str(http_port)]
        with open(Path(folder) / "start.log", "w+", encoding="utf-8") as log:
            core = subprocess.Popen(
                [*moltbot, "start", *place, *ports, "--log-level", "warning"],
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            share_cores(core.pid)
            try:
                key = find_workspace({}, Path(folder)).read_key()
                yield ready(Core(address=f"127.0.0.1:{grpc_port}", key=key))
            except BaseException:
                log.seek(0)
                print(log.read(), file=sys.stderr)
                raise
            finally:
                core.send_signal(signal.SIGINT)
                core.wait(DRAINED_WITHIN)


def ready(core: Core) -> Core:
    """Answers the core once it says that it serves.

    Raises:
        SystemExit: it does not within `READY_WITHIN` seconds.
    """
    with grpc.insecure_channel(core.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch
        try:
            for answer in watch(health_pb2.HealthCheckRequest(), timeout=READY_WITHIN, wait_for_ready=True):
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    break
        except grpc.RpcError as error:
            raise SystemExit(f"the core at {core.address} does not serve: {error}") from None
    return core


def free_ports(count: int) -> list[int]:
    """Answers ports of the loopback that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


def share_cores(core: int) -> None:
    """Gives the core one half of the processor and this program, with the ghz that it starts, the other.

    Load and server on the same processors measure each other. Below four of them, and where the system cannot pin,
    they share what there is.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    processors = list(range(os.cpu_count() or 1))
    half = len(processors) // 2
    if half >= 2:
        os.sched_setaffinity(core, processors[:half])
        os.sched_setaffinity(0, processors[half:])
