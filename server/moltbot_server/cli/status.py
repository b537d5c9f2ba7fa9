"""`moltbot status`: what runs, how it does and what memory it takes; asked of the processes themselves."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from http.client import HTTPConnection, HTTPException
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import psutil

from moltbot_server.cli.running import Running, is_held
from moltbot_server.cli.terminal import Exit, answering, as_typed, command, lasting, shown
from moltbot_server.workspace import Workspace


def status(workspace: Workspace, *, as_json: bool) -> int:
    """Print the state of a workspace's MoltBot. Return 0 when all of it serves, 69 when it does not run, else 1."""
    running = Running.read(workspace)
    if running is None:
        starting = is_held(workspace)
        if as_json:
            print(json.dumps({"running": False, "starting": starting, "workspace": str(workspace.folder)}))
        elif starting:
            print(
                f"MoltBot in {shown(workspace.folder)} is being started and does not serve yet: "
                "the output of `moltbot start` says what it waits for."
            )
        else:
            print(
                f"MoltBot is not running in {shown(workspace.folder)}: start it with `{command('start', workspace)}`."
            )
        return int(Exit.UNAVAILABLE)
    found = state(workspace, running)
    print(json.dumps(found, ensure_ascii=False) if as_json else as_typed(_in_words(found), workspace))
    return int(Exit.OK if found["healthy"] else Exit.FAILED)


def state(workspace: Workspace, running: Running) -> dict[str, Any]:
    """Return the state as the JSON object of `moltbot status --json`. Memory is proportional set size, in bytes."""
    adapter, cores = _health(running.http), ask_cores(running)
    adapters = [_health(place) for place in running.adapters.values()]
    http = adapter.healthy and all(each.healthy for each in adapters)
    core = _speaker(cores.values())
    serving = sum(each.serves for each in cores.values())
    pids = {"supervisor": running.pid, **running.processes}
    processes = {name: {"pid": pid, "memory": _memory(pid, set(pids.values()))} for name, pid in pids.items() if pid}
    return {
        "running": True,
        "healthy": http
        and all(each.healthy for each in cores.values())
        and core.said.get("engine") != "away"
        and all(item["memory"] is not None for item in processes.values())
        and not running.stopping,
        "stopping": running.stopping,
        "notices": list(running.notices),
        "workspace": str(workspace.folder),
        "version": running.version,
        "model": core.said.get("model") or running.model,
        "route": list(core.said.get("route", running.route)),
        "model_problem": core.said.get("model_problem", ""),
        "model_reason": core.said.get("model_reason", ""),
        "uptime_s": round(time.time() - running.started, 1),
        "core": {
            "healthy": serving > 0,
            "serving": serving,
            "workers": len(cores),
            "grpc": running.grpc,
            "metrics": running.metrics,
        },
        "workers": {
            name: {"healthy": cores[name].serves, "leaving": cores[name].leaves, "metrics": where}
            for name, where in running.cores.items()
        },
        "store": _store(_troubled(cores.values())),
        "engine": {
            "healthy": _engine_serves(core, running),
            "where": core.said.get("engine_address", ""),
            "metrics": running.engine_metrics,
        },
        "http": {
            "healthy": http,
            "address": running.http,
            "answering": sum(each.healthy for each in adapters),
            "processes": len(adapters),
        },
        "processes": processes,
        "memory": sum(item["memory"] or 0 for item in processes.values()),
    }


def _engine_serves(core: _Health, running: Running) -> bool:
    """Tell whether the engine serves: as a core sees it, or as it says itself while no core says anything."""
    if core.said or not running.engine_metrics:
        return core.said.get("engine") == "serving"
    return _health(running.engine_metrics).healthy


class _Health(NamedTuple):
    """What a process says of itself."""

    healthy: bool
    said: Mapping[str, Any]

    @property
    def serves(self) -> bool:
        """Whether it does its own part, although its store may be away, or the model that answers by default."""
        return self.healthy or self.said.get("status") in ("store away", "model failed")

    @property
    def leaves(self) -> bool:
        """Whether it ends what it has and takes nothing new, as one that is renewed."""
        return self.said.get("status") == "leaving"


def ask_cores(running: Running, timeout: float = 2.0) -> Mapping[str, _Health]:
    """Return what each core says of itself; one that says nothing within so many seconds is not healthy."""
    return {name: _health(place, timeout) for name, place in (running.cores or {"core": running.metrics}).items()}


def store_away(cores: Mapping[str, _Health]) -> str:
    """Return what cores cannot do, such as `reach its store (Redis at 127.0.0.1:6379)`; empty when they can use it."""
    store = _store(_troubled(cores.values()))
    if store["healthy"] is not False:
        return ""
    return f"{'write to' if _is_read_only(store) else 'reach'} its store ({store['where']})"


def _speaker(cores: Iterable[_Health]) -> _Health:
    """Return the core that speaks for all: one that is well, else one that says anything."""
    return max(cores, key=lambda core: (core.healthy, core.serves, bool(core.said)))


def _troubled(cores: Collection[_Health]) -> _Health:
    """Return a core that is without its store, else the one that speaks for all.

    Of several that share a database, only those that have tried to write know of a full disk.
    """
    without = (core for core in cores if str(core.said.get("store", "")).startswith("away"))
    return next(without, None) or _speaker(cores)


def _store(core: _Health) -> dict[str, Any]:
    """Return how the store is as a core sees it; `healthy` is None when no core tells."""
    told = str(core.said.get("store", ""))
    return {
        "healthy": told == "ok" if told else None,
        "where": core.said.get("store_address", ""),
        "problem": told.removeprefix("away: ") if told != "ok" else "",
        "away_s": core.said.get("store_away_s"),
        "warnings": list(core.said.get("store_warnings", ())),
    }


def adapter_listens(address: str) -> bool:
    """Return whether an HTTP adapter of ours listens at `HOST:PORT`: another program may do so."""
    return _health(f"http://{address}").said.get("status") in ("ok", "store away", "unavailable")


def _health(address: str, timeout: float = 2.0) -> _Health:
    connection: HTTPConnection
    if address.startswith("unix:"):
        connection = _UnixConnection(address.removeprefix("unix:"), timeout)
    else:
        parts = urlsplit(address)
        connection = HTTPConnection(parts.hostname or "", parts.port, timeout=timeout)
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        said = json.loads(answer.read())
    except (OSError, HTTPException, ValueError):
        return _Health(False, {})
    finally:
        connection.close()
    return _Health(answer.status == 200, said if isinstance(said, dict) else {})


class _UnixConnection(HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket instead of a port."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _memory(pid: int, named: Collection[int]) -> int | None:
    """Return a process's proportional set size, or what comes nearest on a system that does not count it.

    Its children count with it, such as those that write for an engine, unless they are `named` themselves.
    """
    try:
        process = psutil.Process(pid)
        memory, children = process.memory_full_info(), process.children()
    except psutil.Error:
        return None
    below = [_memory(child.pid, named) or 0 for child in children if child.pid not in named]
    return int(memory.pss if sys.platform.startswith("linux") else memory.uss) + sum(below)


def _in_words(found: Mapping[str, Any]) -> str:
    def word(healthy: bool) -> str:
        return "serving" if healthy else "NOT SERVING"

    memory, core, engine = found["memory"] / 1e6, found["core"], found["engine"]
    told = f"   {engine['metrics']}/metrics" if engine["metrics"] else ""
    problem = f"   {found['model_problem']}" if found["model_problem"] else ""
    what, name = answering(found["model"], found["route"])
    share = f"{core['serving']} of {core['workers']} workers   " if core["workers"] > 1 else ""
    http = found["http"]
    several = f"{http['answering']} of {http['processes']} processes   " if http["processes"] > 1 else ""
    lines = [
        f"MoltBot {found['version']} runs in {found['workspace']} for {lasting(found['uptime_s'])}.",
        f"  Core    {word(core['healthy']):12} {share}gRPC {core['grpc']}   {core['metrics']}/metrics",
        *(
            f"    {name:8}{'leaving' if each['leaving'] else word(each['healthy']):12} {each['metrics']}/metrics"
            for name, each in found["workers"].items()
        ),
        f"  Engine  {word(engine['healthy']):12} {engine['where']}{told}",
        *_store_in_words(found["store"]),
        f"  HTTP    {word(http['healthy']):12} {several}{http['address']}",
        f"  {what}   {name}{problem}",
        f"  Memory  {memory:.0f} MB (proportional set size)",
    ]
    for name, process in found["processes"].items():
        size = f"{process['memory'] / 1e6:.0f} MB" if process["memory"] is not None else "gone"
        lines.append(f"    {name:12} pid {process['pid']:<8} {size}")
    lines += found["notices"]
    if found["stopping"]:
        lines.append("It is stopping: answers under way may end first, and nothing new is taken.")
    elif found["store"]["healthy"] is False:
        lines.append(_until_there(found["store"]))
    elif engine["where"] and not engine["healthy"] and "engine" not in found["processes"]:
        lines.append("The engine runs elsewhere and cannot be reached: start it there, or correct `engine` here.")
    elif found["model_problem"] and _all_serve(found):
        keyless = found["model_reason"] == "MODEL_CREDENTIAL"
        told = (
            "lacks a key that works: its line says how to add one." if keyless else "cannot answer: its line says why."
        )
        lines.append(f"All of it serves, but the default {what.lower()} {told}")
    elif found["processes"]["supervisor"]["memory"] is None:  # and somebody else holds the workspace
        lines.append(
            "The `moltbot start` that ran here was killed; another one waits until what it had begun has ended."
        )
    elif not found["healthy"]:
        lines.append("Not everything serves: the output of `moltbot start` says why; what crashed is started again.")
    return "\n".join(lines)


def _all_serve(found: Mapping[str, Any]) -> bool:
    """Tell whether each process is there and does its part."""
    return (
        found["http"]["healthy"]
        and found["core"]["serving"] == found["core"]["workers"]
        and found["engine"]["healthy"]
        and all(process["memory"] is not None for process in found["processes"].values())
    )


def _until_there(store: Mapping[str, Any]) -> str:
    """Return what to do about a store that is away."""
    where = store["where"]
    if not where.startswith("Redis"):
        return (
            "Nothing new is taken before the database takes writes: make room on its disk, or let MoltBot write there."
        )
    if _is_read_only(store):
        return "Nothing new is taken before Redis takes writes: the line of the store says what it needs."
    advice = f"start {where}, or correct store.host, store.port and store.tls."
    return f"Nothing new is taken before the store is there: {advice}"


def _is_read_only(store: Mapping[str, Any]) -> bool:
    """Tell whether a store that is away can be reached, and takes no writes."""
    return not store["where"].startswith("Redis") or "takes no writes" in store["problem"]


def _store_in_words(store: Mapping[str, Any]) -> Iterator[str]:
    if store["healthy"]:
        yield f"  Store   {'there':12} {store['where']}"
    elif store["healthy"] is False:
        yield f"  Store   {'AWAY':12} {store['where']} for {lasting(store['away_s'] or 0.0)}: {store['problem']}"
    yield from (f"    ! {warning}" for warning in store["warnings"])
