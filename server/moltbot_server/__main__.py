"""The core or an engine as a process: `python -m moltbot_server [engine] --workspace DIR`."""

from __future__ import annotations

import argparse
import asyncio
import functools
import gc
import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import uvloop

from moltbot_server.config import ConfigError, Settings, load_settings
from moltbot_server.errors import AddressTaken, MoltBotError, StorageFull, StorageUnavailable
from moltbot_server.logs import configure_logging
from moltbot_server.models.cpus import too_many_threads
from moltbot_server.workspace import WorkspaceError, find_workspace

log = logging.getLogger("moltbot_server.core")

_UNAVAILABLE, _BAD_CONFIGURATION = 69, 78  # EX_UNAVAILABLE and EX_CONFIG of sysexits.h
_OWN = ("role", "workspace", "no_notices", "problems_as_json", "listen", "worker")

Leave = Callable[[], Awaitable[None]]
Start = Callable[[], Awaitable[tuple[Mapping[str, Any], Leave]]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the core or an engine until it is told to leave; return the process' exit code."""
    flags = _parser().parse_args(arguments)
    _leave_no_dump()
    workspace = find_workspace(os.environ, flags.workspace)
    try:
        key = workspace.read_key()
        overrides = {name: value for name, value in vars(flags).items() if name not in _OWN}
        reread = functools.partial(load_settings, workspace.folder, os.environ, overrides)
        settings = reread()
    except (ConfigError, WorkspaceError) as error:
        _tell(error, as_json=flags.problems_as_json)
        return _BAD_CONFIGURATION
    process = f"core-{flags.worker}" if flags.worker else flags.role
    configure_logging(settings.log_level, as_json=settings.log_json, process=process)
    for notice in () if flags.no_notices else settings.notices:
        log.warning("not used by this release", extra={"notice": notice})
    if flags.role == "engine" and not flags.no_notices and (odd := too_many_threads(settings.threads or 0)):
        log.warning("a setting does not suit this machine", extra={"notice": f"{settings.origin('threads')}: {odd}"})
    if flags.role == "engine":
        listen = flags.listen or f"unix:{workspace.engine_socket}"
        starting: Start = functools.partial(_start_engine, settings, key, listen, flags.metrics_port)
    else:
        starting = functools.partial(_start_core, settings, key, reread, flags.worker)
    return uvloop.run(_run(starting, problems_as_json=flags.problems_as_json))


def _leave_no_dump() -> None:
    """Keep what is in memory, as keys of providers and what people say, out of a file that a crash would leave."""
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, most))


async def _run(start: Start, *, problems_as_json: bool) -> int:
    """Start, tell what is ready, and stay until a signal says to leave."""
    leave = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _told_to_leave, leave)
    starting = asyncio.ensure_future(start())
    asked = asyncio.create_task(leave.wait())
    await asyncio.wait({starting, asked}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()  # whoever asked does not want to wait for a model, or for an engine that may never come
    try:
        ready, stop = await starting
    except asyncio.CancelledError:
        return 0
    except (MoltBotError, ConfigError, OSError) as error:
        _tell(error, as_json=problems_as_json)
        return _status_of(error)
    print(json.dumps(ready), flush=True)
    # What is alive now stays so: the collector need not look at it again, and a turn's values are no cycles.
    gc.collect()
    gc.freeze()
    # gRPC leaves a small cycle behind for each call. Those of calls that are under way while the collector looks wait
    # for its next wider look: at 50 they were megabytes after a million turns. With looks eight times as far apart,
    # eight times as much waits for them, and memory grows by that until the most was seen.
    gc.set_threshold(2_500, 20, 10)
    await asked
    await stop()
    return 0


def _tell(problem: Exception, *, as_json: bool) -> None:
    """Say why the process cannot start: to people, or to whoever started it and hears the same of several."""
    if as_json:
        print(json.dumps({"problem": str(problem)}), flush=True)
    else:
        print(f"moltbot: {problem}", file=sys.stderr)


def _status_of(error: Exception) -> int:
    """Return the exit status of a process that could not start: whether another start may do better."""
    if isinstance(error, OSError):
        return _UNAVAILABLE if isinstance(error, AddressTaken) else 1
    waiting_helps = isinstance(error, StorageUnavailable | StorageFull) and error.retry_after is not None
    return _UNAVAILABLE if waiting_helps else _BAD_CONFIGURATION


# Each role imports late what only it needs: the core none of the models' native code, the engine no store.


async def _start_core(
    settings: Settings, key: str, reread: Callable[[], Settings], worker: int
) -> tuple[Mapping[str, Any], Leave]:
    from moltbot_server.app import Core

    core = Core(settings, key=key, reread=reread, environ=os.environ, worker=worker)
    await core.start()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, core.reload_soon)
    ready = {
        "ready": True,
        "grpc": core.server.address,
        "metrics": core.ops.address if core.ops else "",
        "model": core.catalog.default,
        "route": core.route,
        "problem": core.catalog.entry("").message,
        "notices": core.reloading.notices,
    }
    return ready, lambda: core.stop(settings.drain_grace, lame_duck=settings.lame_duck_time)


async def _start_engine(
    settings: Settings, key: str, listen: str, metrics_port: int | None
) -> tuple[Mapping[str, Any], Leave]:
    from moltbot_server.models.replica.nursery import Nursery

    nursery = Nursery() if Nursery.possible() else None
    if nursery is not None:
        nursery.start()  # it gets ready while this process still imports

    from moltbot_server.engine_role import EngineRole

    engine = EngineRole(settings, key=key, listen=listen, metrics_port=metrics_port, nursery=nursery)
    await engine.start()
    ready = {
        "ready": True,
        "engine": engine.server.address,
        "metrics": engine.ops.address if engine.ops else "",
        "model": engine.catalog.default,
    }
    return ready, lambda: engine.stop(settings.drain_grace)


def _told_to_leave(leave: asyncio.Event) -> None:
    if leave.is_set():
        # The second signal: whoever sent it does not want to wait. The database recovers by itself.
        os._exit(1)
    leave.set()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moltbot_server", description="The MoltBot core, gRPC only; or, with `engine`, models for cores."
    )
    parser.add_argument("role", nargs="?", choices=("core", "engine"), default="core")
    parser.add_argument(
        "--workspace", type=Path, metavar="DIR", help="the workspace folder (default: MOLTBOT_WORKSPACE)"
    )
    parser.add_argument("--grpc-host", metavar="HOST")
    parser.add_argument("--grpc-port", type=int, metavar="PORT")
    parser.add_argument("--metrics-port", type=int, metavar="PORT")
    parser.add_argument(
        "--worker", type=int, default=0, metavar="N", help="be one of several cores, which count from 1"
    )
    parser.add_argument("--workers", type=int, metavar="COUNT", help="how many cores there are")
    parser.add_argument("--engine", metavar="ADDRESS", help="where the core finds its models (default: in itself)")
    parser.add_argument(
        "--listen", metavar="ADDRESS", help="where an engine listens (default: a socket of the workspace)"
    )
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"))
    parser.add_argument("--no-notices", action="store_true", help="whoever starts it has told what is not used")
    parser.add_argument(
        "--problems-as-json", action="store_true", help="say why it cannot start in a line of JSON on standard output"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
