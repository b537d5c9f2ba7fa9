"""The core as a process: `python -m moltbot_server --workspace DIR`."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import os
import signal
import sys
from pathlib import Path

import uvloop

from moltbot_server.app import Core
from moltbot_server.config import ConfigError, Settings, load_settings, misspelled, overlooked
from moltbot_server.errors import MoltBotError
from moltbot_server.logs import configure_logging
from moltbot_server.workspace import Workspace, WorkspaceError, find_workspace

log = logging.getLogger("moltbot_server.core")

_BAD_CONFIGURATION = 78  # EX_CONFIG of sysexits.h


def main() -> int:
    """Run the core until it is told to leave; return the process' exit code."""
    flags = _parser().parse_args()
    workspace = find_workspace(os.environ, flags.workspace)
    try:
        key = workspace.read_key()
        overrides = {name: value for name, value in vars(flags).items() if name not in ("workspace", "no_notices")}
        settings = load_settings(workspace.folder, os.environ, overrides)
    except (ConfigError, WorkspaceError) as error:
        print(f"moltbot: {error}", file=sys.stderr)
        return _BAD_CONFIGURATION
    configure_logging(settings.log_level, as_json=settings.log_json)
    if not flags.no_notices:
        for notice in (*misspelled(os.environ), *overlooked(workspace.folder, os.environ)):
            log.warning("not used", extra={"notice": notice})
        for notice in settings.notices:
            log.warning("not used by this release", extra={"notice": notice})
    return uvloop.run(_serve(settings, key, workspace))


async def _serve(settings: Settings, key: str, workspace: Workspace) -> int:
    leave = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _told_to_leave, leave)
    try:
        core = Core(settings, key=key)
        await core.start()
    except (MoltBotError, OSError) as error:
        print(f"moltbot: {error}", file=sys.stderr)
        return _BAD_CONFIGURATION if isinstance(error, MoltBotError) else 1
    ready = {
        "ready": True,
        "grpc": core.server.address,
        "metrics": core.ops.address if core.ops else "",
        "model": core.catalog.default,
    }
    print(json.dumps(ready), flush=True)
    # What is alive now stays so: the collector need not look at it again, and a turn's values are no cycles.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    await leave.wait()
    await core.stop(settings.drain_grace)
    return 0


def _told_to_leave(leave: asyncio.Event) -> None:
    if leave.is_set():
        # The second signal: whoever sent it does not want to wait. The database recovers by itself.
        os._exit(1)
    leave.set()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m moltbot_server", description="The MoltBot core: gRPC only.")
    parser.add_argument(
        "--workspace", type=Path, metavar="DIR", help="the workspace folder (default: MOLTBOT_WORKSPACE)"
    )
    parser.add_argument("--grpc-host", metavar="HOST")
    parser.add_argument("--grpc-port", type=int, metavar="PORT")
    parser.add_argument("--metrics-port", type=int, metavar="PORT")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"))
    parser.add_argument("--no-notices", action="store_true", help="whoever starts it has told what is not used")
    return parser


if __name__ == "__main__":
    sys.exit(main())
