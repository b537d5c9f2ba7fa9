"""What `moltbot bench router` measures with: mock providers, a MoltBot between them, load processes, LiteLLM beside."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import msgspec
import psutil
from moltbot.v1 import route_pb2, route_pb2_grpc

from moltbot_server.auth.vault import Vault
from moltbot_server.bench.installation import Installation, started
from moltbot_server.bench.processes import Child
from moltbot_server.bench.router_load import Asked, Job
from moltbot_server.workspace import Workspace

CHUNKS = 32
FLAT_OUT = "0.001ms"
"""The pace of a mock that waits for nothing and yet writes each chunk by itself, as a provider does."""

KEYS = tuple(f"bench-key-{number:03d}-0123456789" for number in range(128))
"""Keys that open the mocks; the first two are in the vault at the beginning."""

_HEAD_START = 0.2
_PATIENCE = 60.0
LATENCY = 0.3
"""The threshold of the routes, in seconds."""

_LENIENT = {
    "threshold": {"latency": f"{LATENCY:g}s", "error_rate": "100%"},
    "retry_budget": "100%",
    "cooldown": "50ms",
}
"""Routes that put nobody to rest but for five faults in a row, and then for a moment: so that many turns meet one."""


class Mock:
    """A mock provider in a process of its own. `text` is what it answers."""

    def __init__(self, stack: contextlib.ExitStack, text: str) -> None:
        options = {"port": 0, "host": "127.0.0.1", "json": True, "script": {}}
        self._child = stack.enter_context(Child("moltbot_server.testing_provider", json.dumps(options)))
        self.address: str = self._child.read()["address"]
        self.text = text
        self.follow()

    @property
    def host(self) -> str:
        """HOST:PORT."""
        return self.address.removeprefix("http://")

    def follow(self, **script: Any) -> None:
        """Answer by a script from now on; by default well and at once."""
        whole = {"text": self.text, "chunks": CHUNKS, "pace": FLAT_OUT, "keys": [*KEYS], **script}
        _call(f"{self.address}/control/script", "PUT", json.dumps(whole).encode())

    def forget(self) -> None:
        """Forget the calls so far."""
        _call(f"{self.address}/control/calls", "DELETE")

    def calls(self) -> int:
        """Return how many calls came since it forgot them."""
        return int(json.loads(_call(f"{self.address}/control/calls"))["total"])

    def cpu_seconds(self) -> float:
        """Return the processor time that it has used."""
        return self._child.cpu_seconds()


def words(name: str) -> str:
    """Return an answer of 32 pieces that tells who gave it."""
    return "".join(f"{name} {number:02d} " for number in range(CHUNKS))


class Loads:
    """Load processes that act as one."""

    def __init__(self, stack: contextlib.ExitStack, processes: int) -> None:
        self._children = [stack.enter_context(Child("moltbot_server.bench.router_load")) for _ in range(processes)]
        self._endless = False

    def begin(self, job: Job) -> float:
        """Let a job begin, its streams and turns shared out; return when it does, on `perf_counter`."""
        count = len(self._children)
        begin = job.begin or time.perf_counter() + _HEAD_START
        self._endless = not (job.turns or job.seconds)
        for number, child in enumerate(self._children):
            share = msgspec.structs.replace(
                job,
                begin=begin,
                streams=job.streams // count + (number < job.streams % count),
                turns=job.turns // count + (number < job.turns % count),
                delays=job.delays[number::count],
            )
            child.tell(msgspec.json.encode(share).decode())
        return begin

    def end(self) -> list[Asked]:
        """Wait for the end of the job, or tell it to end if it has none of its own; return all that was asked."""
        if self._endless:
            for child in self._children:
                child.tell("")
        return [asked for child in self._children for asked in msgspec.convert(child.read()["asked"], list[Asked])]

    def run(self, job: Job) -> list[Asked]:
        """Do a job that has an end."""
        self.begin(job)
        return self.end()

    def cpu_seconds(self) -> float:
        """Return the processor time that the processes have used."""
        return sum(child.cpu_seconds() for child in self._children)


class Rig:
    """Two providers that answer, one that is dead, and a MoltBot with routes over them."""

    def __init__(self, stack: contextlib.ExitStack, *, answers: str = "off", loaders: int = 2) -> None:
        """`answers` is `cache.answers`."""
        self.first, self.second = Mock(stack, words("first")), Mock(stack, words("second"))
        self.dead = Mock(stack, words("dead"))
        self.dead.follow(faults=["error status=500"])
        self.workspace = Workspace(
            folder=Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moltbot-bench-")))
        )
        self.workspace.create()
        self.vault = Vault(self.workspace, {})
        self._keys = itertools.cycle(KEYS)
        for _ in range(2):
            self.vault.add("first", next(self._keys))
        self.configure()
        # The key of the other providers comes from the environment, as many people have it.
        self.installation: Installation = stack.enter_context(
            started(
                workspace=self.workspace,
                MODEL_TYPE="scripted",
                MOLTBOT_CACHE_ANSWERS=answers,
                SECOND_API_KEY=KEYS[0],
                DEAD_API_KEY=KEYS[0],
            )
        )
        self.loads = Loads(stack, loaders)

    @property
    def texts(self) -> tuple[str, ...]:
        """What may be answered."""
        return self.first.text, self.second.text

    def job(self, kind: str, **fields: Any) -> Job:
        """Return a job for this MoltBot: `http` through its OpenAI-compatible API, `grpc` at its core."""
        address = self.installation.grpc if kind == "grpc" else self.installation.http.removeprefix("http://")
        values = {"texts": self.texts, "key": self.workspace.read_key(), **fields}
        return Job(kind=kind, address=address, **values)

    def direct(self, **fields: Any) -> Job:
        """Return a job for the first mock by itself."""
        return Job(kind="http", address=self.first.host, key=KEYS[0], models=("first-model",), sessions=False, **fields)

    def configure(self, *, swapped: bool = False) -> None:
        """Write the configuration; `swapped` turns the two models of the default route about."""
        order = ["first-model", "second-model"]
        primary, fallback = reversed(order) if swapped else order
        threshold = {"latency": f"{LATENCY:g}s", "error_rate": "5%"}
        usual = {"primary": "first-model", "fallback": ["second-model"], "threshold": threshold}
        names = ("mixed", "always-fails", "healing", "cold")
        routes: dict[str, Any] = dict.fromkeys(names, usual)
        routes |= {name: {**usual, **_LENIENT} for name in ("errs", "hangs", "kept-on")}
        routes["patient"] = {**usual, "threshold": {"latency": "5s"}}
        routes["dead-first"] = {**usual, "primary": "dead-model"}
        mocks = {"first": self.first, "second": self.second, "dead": self.dead}
        written = {
            "providers": {
                name: {"base_url": f"{mock.address}/v1", "models": [f"{name}-model"]} for name, mock in mocks.items()
            },
            "models": {**usual, "primary": primary, "fallback": [fallback]},
            "routes": routes,
        }
        draft = self.workspace.config_file.with_suffix(".draft")
        draft.write_text(json.dumps(written, indent=2), "utf-8")  # which is YAML as well
        draft.replace(self.workspace.config_file)

    def change_key(self) -> None:
        """Take the older key of the first provider out of the vault and put a new one in that opens it as well."""
        oldest = self.vault.keys[0]
        self.vault.add("first", next(self._keys))
        self.vault.remove(oldest.id)

    def reload(self) -> None:
        """Let the core read its configuration and its keys again."""
        with grpc.insecure_channel(self.installation.grpc) as channel:
            stub: Any = route_pb2_grpc.RouteServiceStub(channel)
            metadata = (("authorization", self.installation.bearer),)
            stub.ReloadRoutes(route_pb2.ReloadRoutesRequest(), metadata=metadata, timeout=_PATIENCE)

    def processors(self, *others: tuple[str, int]) -> Processors:
        """Return a meter of what uses the processors from now on; `others` are more processes by name."""
        pids = {name: pid for name, pid in self.installation.pids().items() if name in ("core", "http")}
        return Processors({**pids, **dict(others)}, self.loads, [self.first, self.second, self.dead])


class Processors:
    """How busy everything is: in processors, 1.0 for one that does nothing else."""

    def __init__(self, pids: Mapping[str, int], loads: Loads, mocks: Sequence[Mock]) -> None:
        self._trees = {name: [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
                       for name, pid in pids.items()}  # fmt: skip
        self._loads, self._mocks = loads, mocks
        self._began, self._before = time.perf_counter(), self._used()

    def read(self) -> dict[str, float]:
        """Return what each used since, and `machine` for all there is on it, ours or not."""
        seconds = time.perf_counter() - self._began
        return {name: round((used - self._before[name]) / seconds, 2) for name, used in self._used().items()}

    def _used(self) -> dict[str, float]:
        own = {name: sum(_seconds(each) for each in tree) for name, tree in self._trees.items()}
        times = psutil.cpu_times()
        busy = sum(times) - times.idle - times.iowait - getattr(times, "guest", 0) - getattr(times, "guest_nice", 0)
        mocks = sum(mock.cpu_seconds() for mock in self._mocks)
        return {**own, "mocks": mocks, "load": self._loads.cpu_seconds(), "machine": busy}


def _seconds(process: psutil.Process) -> float:
    try:
        used = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(used.user + used.system)


class LiteLlm:
    """LiteLLM's proxy with the same mocks behind it and one worker, as its own documents start it."""

    key = "sk-bench-0123456789"

    def __init__(self, stack: contextlib.ExitStack, program: Path, rig: Rig) -> None:
        """Start it and wait until it answers.

        Raises:
            RuntimeError: it does not start.
        """
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moltbot-bench-")))
        port = _free_port()
        self.address = f"127.0.0.1:{port}"
        config = folder / "litellm.yaml"
        config.write_text(json.dumps(self._config(rig)), "utf-8")
        environ = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MODE": "PRODUCTION"}
        environ["PATH"] = f"{program.parent}:{environ['PATH']}"
        words = [str(program), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
        log = stack.enter_context((folder / "log").open("w"))
        try:
            self._process = subprocess.Popen(
                [*words, "--num_workers", "1", "--telemetry", "False"],
                stdout=log, stderr=subprocess.STDOUT, env=environ, cwd=folder,
            )  # fmt: skip
        except OSError as error:
            raise RuntimeError(f"{program} cannot be started: {error.strerror}") from None
        stack.callback(self._end)
        self._await(folder / "log")

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def job(self, model: str, **fields: Any) -> Job:
        """Return a job for it."""
        return Job(kind="http", address=self.address, key=self.key, models=(model,), sessions=False, **fields)

    def _config(self, rig: Rig) -> dict[str, Any]:
        def entry(name: str, mock: Mock) -> dict[str, Any]:
            params = {"model": f"openai/{name}-model", "api_base": f"{mock.address}/v1", "api_key": KEYS[0]}
            return {"model_name": name, "litellm_params": params}

        return {
            "model_list": [entry("first", rig.first), entry("second", rig.second), entry("dead", rig.dead)],
            "litellm_settings": {"fallbacks": [{"first": ["second"]}, {"dead": ["second"]}]},
            "general_settings": {"master_key": self.key},
        }

    def _await(self, log: Path) -> None:
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                _call(f"http://{self.address}/health/liveliness")
                return
            except OSError:
                time.sleep(0.2)  # another program's doing, of which nothing tells us
        raise RuntimeError(f"LiteLLM did not start: {log.read_text()[-500:]}")

    def _end(self) -> None:
        tree = psutil.Process(self._process.pid).children(recursive=True) if self._process.poll() is None else []
        self._process.terminate()
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def _call(url: str, method: str = "GET", body: bytes | None = None) -> bytes:
    request = urllib.request.Request(url, data=body, method=method, headers={"Content-Type": "application/json"})
    # Whatever proxy the environment names: all of this is on this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=_PATIENCE) as response:
        found: bytes = response.read()
        return found


def good(asked: Sequence[Asked]) -> list[Asked]:
    """Return the turns that were answered well."""
    return [each for each in asked if not each.problem]


def problems(asked: Sequence[Asked]) -> dict[str, int]:
    """Count what users saw go wrong, by what was said."""
    found: dict[str, int] = {}
    for each in asked:
        if each.problem:
            found[each.problem] = found.get(each.problem, 0) + 1
    return dict(sorted(found.items(), key=lambda item: -item[1])[:10])


def firsts(asked: Sequence[Asked]) -> list[float]:
    """Return the times to the first word of answered turns, in seconds."""
    return [each.first - each.sent for each in asked if each.first]


def middle(values: Iterator[float] | Sequence[float]) -> float:
    """Return the median, rounded; 0 of nothing."""
    found = list(values)
    return round(statistics.median(found), 3) if found else 0.0
