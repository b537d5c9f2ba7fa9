"""For tests of anybody's making: a real core on a free port, in this process, with a scripted or a real model."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from grpc import aio

from moltbot_server.app import Core
from moltbot_server.config import Settings
from moltbot_server.models.catalog import Catalog
from moltbot_server.models.engine import Engine
from moltbot_server.models.engines.scripted import Rule, Script, ScriptedEngine
from moltbot_server.workspace import Workspace

__all__ = ["Rule", "RunningServer", "Script", "ScriptedEngine", "free_port", "running_server"]


class RunningServer:
    """A core that serves: its address, its key, and itself for a look inside."""

    def __init__(self, core: Core, key: str) -> None:
        self.core = core
        self.key = key

    @property
    def address(self) -> str:
        """The gRPC address, such as `127.0.0.1:34567`."""
        return self.core.server.address

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata that a call needs."""
        return (("authorization", f"Bearer {self.key}"),)

    def channel(self) -> aio.Channel:
        """Return a new channel to the core; the caller closes it."""
        return aio.insecure_channel(self.address, options=[("grpc.use_local_subchannel_pool", 1)])


def free_port() -> int:
    """Return a port on which nobody listens, of those that the system gives to nobody: it is wanted again later."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@asynccontextmanager
async def running_server(
    folder: Path, *, engine: Engine | None = None, script: Script | None = None, grace: float = 5.0, **settings: Any
) -> AsyncGenerator[RunningServer, None]:
    """Run a core in a workspace folder, which is made if it is missing; it leaves well at the end.

    Without `engine` the scripted engine answers, by `script` if that is given. `settings` are those of `Settings`.
    """
    workspace = Workspace(folder=folder)
    workspace.create()
    values: dict[str, Any] = {"grpc_port": 0, "metrics_port": 0, "port": 0, **settings}
    core = Core(
        Settings(workspace=folder, **values),
        key=workspace.read_key(),
        catalog=Catalog([engine or ScriptedEngine(script)]),
    )
    await core.start()
    try:
        yield RunningServer(core, workspace.read_key())
    finally:
        await core.stop(grace)
