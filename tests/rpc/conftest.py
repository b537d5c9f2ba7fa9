"""A real core with the scripted engine, and all services of it."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from moltbot_server.testing import RunningServer, running_server
from rpc_calls import Api, WatchedEngine

sys.path.append(str(Path(__file__).parents[1] / "core"))  # a Redis of the tests' own


@pytest.fixture
def engine() -> WatchedEngine:
    """The engine of the core."""
    return WatchedEngine()


@pytest.fixture
async def core(tmp_path: Path, engine: WatchedEngine) -> AsyncIterator[RunningServer]:
    """A core that serves."""
    async with running_server(tmp_path / "workspace", engine=engine) as server:
        yield server


@pytest.fixture
async def api(core: RunningServer) -> AsyncIterator[Api]:
    """All services of the core."""
    api = Api.of(core)
    yield api
    await api.channel.close()
