"""Compares grpcio releases by what a call and a streamed message cost a grpc.aio server in CPU time.

A round starts one fresh server on uvloop for each arm, all pinned to one core, and one client for each on another core;
the client is the same release for all. Only one arm is loaded at a time, in short slices that run forwards and back
in turn (A B C, C B A), so that the drift of a shared machine falls on all arms alike, and ratios within a round can be
trusted where absolute figures cannot. The first arm is the baseline; a second arm of its release shows the noise.

    python tests/load/grpcio_versions.py run --arm 1.82.3=old/bin/python --arm 1.85.1=new/bin/python \
        --arm 1.85.1-generic=new/bin/python:generic --arm 1.82.3-again=old/bin/python --out result.json

`:generic` keeps the methods out of the server's table of registered methods and leaves only the generic handler.
Each interpreter needs grpcio, protobuf and uvloop; nothing else is imported, so that any environment can be measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

KINDS = ("unary", "stream")
MESSAGES = 32  # of one server stream
METHODS_PER_SERVICE = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One release to measure: its name, its interpreter and whether only a generic handler is registered."""

    name: str
    python: str
    generic: bool

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads `NAME=PYTHON` or `NAME=PYTHON:generic`."""
        name, _, python = text.partition("=")
        return cls(name=name, python=python.removesuffix(":generic"), generic=python.endswith(":generic"))


@dataclass(slots=True, kw_only=True)
class Trial:
    """What one server cost in one round; units are calls (unary) or messages (stream), times are seconds."""

    arm: str
    kind: str
    methods: int
    round: int
    load_average: float
    units: int = 0
    cpu: float = 0.0
    wall: float = 0.0
    preempted: int = 0  # how often another process took the server's core
    peak_mib: float = 0.0


def called_method(methods: int) -> str:
    """Names the method that the client calls: the one in the middle of the server's table."""
    return f"/load.v1.Service{methods // 2 // METHODS_PER_SERVICE}/Method{methods // 2}"


async def serve(kind: str, methods: int, generic: bool) -> None:
    """Serves `methods` methods on a free loopback port and answers each line of stdin with the CPU time used so far."""
    import grpc
    from google.protobuf.wrappers_pb2 import StringValue

    async def echo(request: StringValue, context: Any) -> StringValue:
        return StringValue(value=request.value)

    async def repeat(request: StringValue, context: Any) -> None:
        for _ in range(MESSAGES):
            await context.write(StringValue(value=request.value))

    def handler(path: str) -> Any:
        codecs = (StringValue.FromString, StringValue.SerializeToString)
        if kind == "stream" and path == called_method(methods):
            return grpc.unary_stream_rpc_method_handler(repeat, *codecs)
        return grpc.unary_unary_rpc_method_handler(echo, *codecs)

    server: Any = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    for first in range(0, methods, METHODS_PER_SERVICE):
        service = f"load.v1.Service{first // METHODS_PER_SERVICE}"
        indices = range(first, min(first + METHODS_PER_SERVICE, methods))
        handlers = {f"Method{i}": handler(f"/{service}/Method{i}") for i in indices}
        # The same two calls, in the same order, as generated code makes.
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        if not generic:
            server.add_registered_method_handlers(service, handlers)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(json.dumps({"port": port, "grpcio": grpc.__version__}), flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        used = resource.getrusage(resource.RUSAGE_SELF)
        report = {"cpu": used.ru_utime + used.ru_stime, "preempted": used.ru_nivcsw, "peak": used.ru_maxrss}
        print(json.dumps(report), flush=True)
    await server.stop(None)


async def load(kind: str, methods: int, port: int, channels: int, in_flight: int) -> None:
    """Makes as many calls as each line of stdin says, `in_flight` at a time, and answers with the seconds they took."""
    import grpc
    from google.protobuf.wrappers_pb2 import StringValue

    body = StringValue(value="a small message of a chat").SerializeToString()
    async with contextlib.AsyncExitStack() as stack:
        stubs: list[Any] = []
        # Without this option, channels to one address share one connection.
        options = [("grpc.use_local_subchannel_pool", 1)]
        for _ in range(channels):
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options))
            await channel.channel_ready()
            # Raw bytes: the client's core should not be the narrow one.
            stub: Any = channel.unary_unary if kind == "unary" else channel.unary_stream
            stubs.append(stub(called_method(methods)))

        async def caller(stub: Any, turns: Iterator[int]) -> None:
            for _ in turns:
                answers = [await stub(body)] if kind == "unary" else [message async for message in stub(body)]
                if answers != [body] * (1 if kind == "unary" else MESSAGES):
                    raise SystemExit(f"wrong answer: {answers!r}")

        while line := await asyncio.to_thread(sys.stdin.readline):
            turns = iter(range(int(line)))
            start = time.perf_counter()
            async with asyncio.TaskGroup() as group:
                for index in range(in_flight):
                    group.create_task(caller(stubs[index % channels], turns))
            print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


class Process:
    """A pinned child of this script that answers lines with JSON objects; it ends when its stdin closes."""

    def __init__(self, python: str, core: int, arguments: Sequence[str]) -> None:
        command = ["taskset", "-c", str(core), python, __file__, *arguments]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._child.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            self._child.kill()
            raise

    def read(self) -> dict[str, Any]:
        """Waits for the child's next answer; an answer that never comes ends the run."""
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise SystemExit(f"a measured process ended early: {self._child.args!r}")
        return dict(json.loads(line))

    def ask(self, line: object) -> dict[str, Any]:
        """Sends one line and waits for the answer."""
        assert self._child.stdin is not None
        print(line, file=self._child.stdin, flush=True)
        return self.read()


class Bench:
    """One arm's server and client, ready to be loaded slice by slice; `trial` sums what the slices cost."""

    def __init__(self, stack: contextlib.ExitStack, arm: Arm, trial: Trial, options: argparse.Namespace) -> None:
        self.trial = trial
        place = [trial.kind, str(trial.methods)]
        generic = ["--generic"] if arm.generic else []
        self._server = stack.enter_context(Process(arm.python, options.server_core, ["serve", *place, *generic]))
        ready = self._server.read()
        if not arm.name.startswith(ready["grpcio"]):
            raise SystemExit(f"arm {arm.name} runs grpcio {ready['grpcio']}")
        arguments = ["load", *place, *map(str, (ready["port"], options.channels, options.in_flight))]
        self._client = stack.enter_context(Process(options.client, options.client_core, arguments))

    def load(self, calls: int, *, counted: bool) -> None:
        """Makes the calls between two readings of the server's CPU clock; a warm-up is not counted."""
        before = self._server.ask("usage")
        seconds = float(self._client.ask(calls)["seconds"])
        after = self._server.ask("usage")
        if counted:
            self.trial.units += calls * (1 if self.trial.kind == "unary" else MESSAGES)
            self.trial.cpu += after["cpu"] - before["cpu"]
            self.trial.wall += seconds
            self.trial.preempted += after["preempted"] - before["preempted"]
            self.trial.peak_mib = after["peak"] / 1024


def measure(arms: Sequence[Arm], kind: str, methods: int, number: int, options: argparse.Namespace) -> list[Trial]:
    """Measures every arm in one round: fresh processes, a warm-up, then interleaved slices."""
    calls = options.calls if kind == "unary" else options.streams
    place: dict[str, Any] = {"kind": kind, "methods": methods, "round": number, "load_average": os.getloadavg()[0]}
    with contextlib.ExitStack() as stack:
        benches = [Bench(stack, arm, Trial(arm=arm.name, **place), options) for arm in arms]
        for bench in benches:
            bench.load(calls, counted=False)
        for part in range(options.slices):
            # Odd rounds start backwards, so that no arm is always first.
            for bench in benches if (part + number) % 2 == 0 else reversed(benches):
                bench.load(calls, counted=True)
    return [bench.trial for bench in benches]


def spread(values: Iterable[float], digits: int) -> list[float]:
    """Gives median, lowest and highest of a series, in this order."""
    series = sorted(values)
    return [round(value, digits) for value in (statistics.median(series), series[0], series[-1])]


def summarise(trials: Sequence[Trial], arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Gives one row per kind, number of methods and arm, with the ratio to the baseline of the same round."""
    rows = []
    for kind, methods, arm in dict.fromkeys((trial.kind, trial.methods, trial.arm) for trial in trials):
        cell = [trial for trial in trials if (trial.kind, trial.methods) == (kind, methods)]
        pairs = list(zip(*([t for t in cell if t.arm == name] for name in (arms[0].name, arm)), strict=True))
        ratios = [(mine.cpu / mine.units) / (base.cpu / base.units) for base, mine in pairs]
        row: dict[str, Any] = {"kind": kind, "methods": methods, "arm": arm}
        row["cpu_us"] = spread((mine.cpu / mine.units * 1e6 for _, mine in pairs), 1)
        row["cpu_ratio"] = spread(ratios, 3)
        row["cpu_ratio_by_round"] = [round(ratio, 3) for ratio in ratios]
        row["per_second"] = spread((mine.units / mine.wall for _, mine in pairs), 0)
        row["server_busy"] = spread((mine.cpu / mine.wall for _, mine in pairs), 2)
        row["peak_mib"] = spread((mine.peak_mib for _, mine in pairs), 1)
        rows.append(row)
    return rows


def record(result: dict[str, Any]) -> str:
    """Formats the result as JSON with one row of a table to a line."""
    rows = {key: ",\n".join(map(json.dumps, value)) for key, value in result.items() if isinstance(value, list)}
    parts = (f'"{key}": ' + (f"[\n{rows[key]}\n]" if key in rows else json.dumps(result[key])) for key in result)
    return "{\n" + ",\n".join(parts) + "\n}\n"


def run(options: argparse.Namespace) -> None:
    """Runs every round of every cell and writes trials and summary as JSON."""
    arms = [Arm.parse(text) for text in options.arm]
    options.client = options.client or arms[0].python
    machine = {"cores": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()}
    result: dict[str, Any] = {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "machine": machine}
    trials: list[Trial] = []
    for number in range(options.rounds):
        for kind, methods in itertools.product(KINDS, options.methods):
            trials += measure(arms, kind, methods, number, options)
        print(f"round {number + 1} of {options.rounds}, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    # Interpreters are paths of one machine: they stay out of the record.
    public = vars(options).keys() - {"arm", "client", "out"}
    result["settings"] = {name: getattr(options, name) for name in sorted(public)}
    result["summary"] = summarise(trials, arms)
    result["trials"] = [asdict(trial) for trial in trials]
    options.out.write_text(record(result))
    for row in result["summary"]:
        print(*(row[key] for key in ("kind", "methods", "arm", "cpu_us", "cpu_ratio", "per_second", "server_busy")))


def parser() -> argparse.ArgumentParser:
    """Describes the three roles of this script; `serve` and `load` are started by `run`."""
    top = argparse.ArgumentParser(description="Compares grpcio releases by server CPU time.")
    roles = top.add_subparsers(dest="command", required=True)
    serving, loading, running = (roles.add_parser(role) for role in ("serve", "load", "run"))
    for role in (serving, loading):
        role.add_argument("kind", choices=KINDS)
        role.add_argument("methods", type=int)
    serving.add_argument("--generic", action="store_true")
    for name in ("port", "channels", "in_flight"):
        loading.add_argument(name, type=int)
    running.add_argument("--arm", action="append", required=True, help="NAME=PYTHON[:generic], NAME a version")
    running.add_argument("--client", help="interpreter of the client; the first arm's by default")
    running.add_argument("--methods", type=int, nargs="+", default=[1, 30, 60])
    running.add_argument("--out", type=Path, required=True)
    numbers = {"rounds": 6, "slices": 8, "calls": 1200, "streams": 200, "channels": 8, "in-flight": 96}
    for name, value in (numbers | {"server-core": 2, "client-core": 3}).items():
        running.add_argument(f"--{name}", type=int, default=value)
    return top


if __name__ == "__main__":
    chosen = parser().parse_args()
    role = chosen.__dict__.pop("command")
    if role == "run":
        run(chosen)
    else:
        import uvloop

        uvloop.run((serve if role == "serve" else load)(**vars(chosen)))
