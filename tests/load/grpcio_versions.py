"""Compares grpcio releases by what a call and a streamed message cost a grpc.aio server in CPU time.

Every trial is a fresh server on uvloop, pinned to one core, and a fresh client on another; the client is the same release for
every server. A round measures each arm once, and rounds run forwards and backwards in turn (A B C, C B A), so that drift falls on all
arms alike. The first arm is the baseline; naming it twice shows how far two runs of one release differ.

    python tests/load/grpcio_versions.py run --arm 1.82.3=old/bin/python --arm 1.85.1=new/bin/python \
        --arm 1.85.1-generic=new/bin/python:generic --arm 1.82.3-again=old/bin/python --out result.json

`:generic` keeps the methods out of the server's table of registered methods and leaves only the generic handler.
Each interpreter needs grpcio, protobuf and uvloop; nothing else is imported, so that any environment can be measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

KINDS = ("unary", "stream")
MESSAGES = 32
"""Messages that one server stream carries."""
METHODS_PER_SERVICE = 10
WORD = "a small message of a chat"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One release to measure: its name, its interpreter and whether only a generic handler is registered."""

    name: str
    python: str
    generic: bool

    @classmethod
    def parse(cls, text: str) -> Arm:
        """Reads `NAME=PYTHON` or `NAME=PYTHON:generic`."""
        name, _, python = text.partition("=")
        return cls(name=name, python=python.removesuffix(":generic"), generic=python.endswith(":generic"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One measured server: microseconds of CPU per call (unary) or per message (stream), and what ran beside it."""

    arm: str
    kind: str
    methods: int
    round: int
    cpu_us: float
    per_second: float
    server_busy: float
    """Share of the wall time that the server spent on the CPU."""
    preempted: int
    """How often another process took the server's core."""
    rss_mib: float
    load_average: float


def called_method(methods: int) -> str:
    """Names the method that the client calls: the one in the middle of the server's table."""
    index = methods // 2
    return f"/load.v1.Service{index // METHODS_PER_SERVICE}/Method{index}"


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
        codecs = {"request_deserializer": StringValue.FromString, "response_serializer": StringValue.SerializeToString}
        if kind == "stream" and path == called_method(methods):
            return grpc.unary_stream_rpc_method_handler(repeat, **codecs)
        return grpc.unary_unary_rpc_method_handler(echo, **codecs)

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
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        report = {"cpu": used.ru_utime + used.ru_stime, "preempted": used.ru_nivcsw, "rss": resident}
        print(json.dumps(report), flush=True)
    await server.stop(None)


async def load(kind: str, methods: int, port: int, channels: int, in_flight: int) -> None:
    """Makes as many calls as each line of stdin says, `in_flight` at a time, and answers with the seconds they took."""
    import grpc
    from google.protobuf.wrappers_pb2 import StringValue

    body = StringValue(value=WORD).SerializeToString()
    async with contextlib.AsyncExitStack() as stack:
        stubs: list[Any] = []
        for number in range(channels):
            # Without an option that differs, channels to one address share one connection.
            options = [("load.channel", number)]
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options))
            await channel.channel_ready()
            # Raw bytes: the client's core should not be the narrow one.
            stub: Any = channel.unary_unary if kind == "unary" else channel.unary_stream
            stubs.append(stub(called_method(methods)))

        async def caller(stub: Any, turns: Iterator[int]) -> None:
            for _ in turns:
                if kind == "unary":
                    answers = [await stub(body)]
                else:
                    answers = [message async for message in stub(body)]
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

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.communicate(timeout=30)

    def read(self) -> dict[str, Any]:
        """Waits for the child's next answer; an answer that never comes ends the run."""
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise SystemExit(f"a measured process ended early: {self._child.args!r}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, line: object) -> dict[str, Any]:
        """Sends one line and waits for the answer."""
        assert self._child.stdin is not None
        print(line, file=self._child.stdin, flush=True)
        return self.read()


def measure(arm: Arm, kind: str, methods: int, number: int, options: argparse.Namespace) -> Trial:
    """Measures one arm once: fresh processes, a warm-up, then a fixed amount of work between two readings of the CPU clock."""
    calls = options.calls if kind == "unary" else options.streams
    units = calls if kind == "unary" else calls * MESSAGES
    server_arguments = ["serve", kind, str(methods), *(["--generic"] if arm.generic else [])]
    with Process(arm.python, options.server_core, server_arguments) as server:
        ready = server.read()
        if not arm.name.startswith(ready["grpcio"]):
            raise SystemExit(f"arm {arm.name} runs grpcio {ready['grpcio']}")
        client_arguments = ["load", kind, str(methods), str(ready["port"]), str(options.channels), str(options.in_flight)]
        with Process(options.client, options.client_core, client_arguments) as client:
            client.ask(calls // 4)
            before = server.ask("usage")
            seconds = float(client.ask(calls)["seconds"])
            after = server.ask("usage")
    cpu = float(after["cpu"] - before["cpu"])
    return Trial(
        arm=arm.name,
        kind=kind,
        methods=methods,
        round=number,
        cpu_us=round(cpu / units * 1e6, 2),
        per_second=round(units / seconds, 1),
        server_busy=round(cpu / seconds, 3),
        preempted=after["preempted"] - before["preempted"],
        rss_mib=round(after["rss"] / 2**20, 1),
        load_average=round(os.getloadavg()[0], 2),
    )


def spread(values: Sequence[float], digits: int) -> dict[str, float]:
    """Gives median, lowest and highest of a series."""
    named = {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
    return {name: round(value, digits) for name, value in named.items()}


def summarise(trials: Sequence[Trial], arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Gives one row per kind, number of methods and arm, with the ratio to the baseline of the same round."""
    rows = []
    for kind, methods in sorted({(trial.kind, trial.methods) for trial in trials}, key=lambda key: (key[0] != "unary", key[1])):
        cell = [trial for trial in trials if (trial.kind, trial.methods) == (kind, methods)]
        baseline = {trial.round: trial for trial in cell if trial.arm == arms[0].name}
        for arm in arms:
            mine = sorted((trial for trial in cell if trial.arm == arm.name), key=lambda trial: trial.round)
            ratios = [round(trial.cpu_us / baseline[trial.round].cpu_us, 3) for trial in mine]
            rates = [trial.per_second / baseline[trial.round].per_second for trial in mine]
            row = {"kind": kind, "methods": methods, "arm": arm.name, "cpu_us": spread([t.cpu_us for t in mine], 1)}
            row |= {"cpu_ratio": spread(ratios, 3), "cpu_ratio_by_round": ratios}
            row |= {"per_second": spread([t.per_second for t in mine], 0), "per_second_ratio": spread(rates, 3)}
            row |= {"server_busy": spread([t.server_busy for t in mine], 2), "rss_mib": spread([t.rss_mib for t in mine], 1)}
            rows.append(row)
    return rows


def run(options: argparse.Namespace) -> None:
    """Runs every round of every cell and writes trials and summary as JSON."""
    arms = [Arm.parse(text) for text in options.arm]
    options.client = options.client or arms[0].python
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    trials: list[Trial] = []
    for number in range(options.rounds):
        for kind in KINDS:
            for methods in options.methods:
                for arm in arms if number % 2 == 0 else reversed(arms):
                    trials.append(measure(arm, kind, methods, number, options))
        print(f"round {number + 1} of {options.rounds}, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    settings = {name: value for name, value in vars(options).items() if name not in ("arm", "client", "out", "command")}
    model = next((row.split(":")[1].strip() for row in Path("/proc/cpuinfo").open() if row.startswith("model name")), "?")
    machine = {"cpu": model, "cores": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()}
    summary = summarise(trials, arms)
    result = {"started": started, "machine": machine, "settings": settings | {"messages": MESSAGES}, "summary": summary}
    result["trials"] = [asdict(trial) for trial in trials]
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for row in summary:
        cpu, ratio, rate = row["cpu_us"], row["cpu_ratio"], row["per_second"]
        print(
            f"{row['kind']:6} {row['methods']:3} {row['arm']:16} {cpu['median']:7.1f} us ({cpu['lowest']}-{cpu['highest']})"
            f"  ratio {ratio['median']:.3f} ({ratio['lowest']}-{ratio['highest']})  {rate['median']:8.0f}/s"
            f"  busy {row['server_busy']['median']}"
        )


def parser() -> argparse.ArgumentParser:
    """Describes the three roles of this script; `serve` and `load` are started by `run`."""
    top = argparse.ArgumentParser(description="Compares grpcio releases by server CPU time.")
    roles = top.add_subparsers(dest="command", required=True)
    for role in ("serve", "load"):
        child = roles.add_parser(role)
        child.add_argument("kind", choices=KINDS)
        child.add_argument("methods", type=int)
        if role == "serve":
            child.add_argument("--generic", action="store_true")
        else:
            for name in ("port", "channels", "in_flight"):
                child.add_argument(name, type=int)
    main = roles.add_parser("run")
    main.add_argument("--arm", action="append", required=True, help="NAME=PYTHON[:generic]; NAME starts with the version")
    main.add_argument("--client", help="interpreter of the client; the first arm's by default")
    main.add_argument("--methods", type=int, nargs="+", default=[1, 30, 60])
    main.add_argument("--out", type=Path, required=True)
    for name, value in (("rounds", 6), ("calls", 8000), ("streams", 800), ("channels", 8), ("in-flight", 96)):
        main.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("server-core", 2), ("client-core", 3)):
        main.add_argument(f"--{name}", type=int, default=value)
    return top


if __name__ == "__main__":
    chosen = parser().parse_args()
    arguments = {name: value for name, value in vars(chosen).items() if name != "command"}
    if chosen.command == "run":
        run(chosen)
    else:
        import uvloop

        uvloop.run((serve if chosen.command == "serve" else load)(**arguments))
