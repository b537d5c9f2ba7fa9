"""Several cores of one workspace, as workers of one machine: one port, a socket each, one database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from grpc import aio
from moltbot_server.app import Core
from moltbot_server.config import Settings
from moltbot_server.models.catalog import Catalog
from moltbot_server.models.engine import Engine
from moltbot_server.testing import ScriptedEngine, free_port
from moltbot_server.workspace import Workspace
from rpc_calls import Api


class Workers:
    """Workers by number, and ways to talk to each of them."""

    def __init__(self, folder: Path, count: int, settings: dict[str, Any]) -> None:
        self.workspace = Workspace(folder=folder)
        self.workspace.create()
        self.key = self.workspace.read_key()
        values = {"grpc_port": free_port(), "metrics_port": 0, "port": 0, "workers": count, **settings}
        self.settings = Settings(workspace=folder, **values)
        self.cores: dict[int, Core] = {}
        self._channels: list[aio.Channel] = []

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata that a call needs."""
        return (("authorization", f"Bearer {self.key}"),)

    async def start(self, number: int, engine: Engine | None = None, environ: dict[str, str] | None = None) -> Core:
        """Start a worker."""
        core = self.cores[number] = Core(
            self.settings,
            key=self.key,
            catalog=Catalog([engine or ScriptedEngine()]),
            reread=lambda: self.settings,
            environ=environ or {},
            worker=number,
        )
        await core.start()
        return core

    async def stop(self, number: int, grace: float = 5.0) -> None:
        """Let a worker leave."""
        await self.cores.pop(number).stop(grace)

    def configure(self, **changed: Any) -> None:
        """Change what the next reload reads."""
        self.settings = replace(self.settings, **changed)

    def at(self, number: int) -> Api:
        """Return the services of one worker, at its own socket."""
        return self._api(f"unix:{self.workspace.core_socket(number)}")

    def anywhere(self) -> Api:
        """Return the services of some worker, at the port that all have."""
        return self._api(f"127.0.0.1:{self.settings.grpc_port}")

    def _api(self, address: str) -> Api:
        channel = aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self._channels.append(channel)
        return Api(channel, self.metadata)

    async def end(self) -> None:
        """Hang up, and let all of them leave."""
        for channel in self._channels:
            await channel.close()
        await asyncio.gather(*(core.stop(1.0) for core in self.cores.values()))


@asynccontextmanager
async def workers(folder: Path, count: int, **settings: Any) -> AsyncIterator[Workers]:
    """Run workers, which leave at the end."""
    made = Workers(folder, count, settings)
    try:
        for number in range(1, count + 1):
            await made.start(number)
        yield made
    finally:
        await made.end()
