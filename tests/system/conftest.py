"""What tests of whole systems share: a home folder, a core in it, and, of other folders, a Redis and nodes to kill."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cli_process import Home
from moltbot_server.testing import RunningServer, running_server

sys.path += [str(Path(__file__).parents[1] / name) for name in ("core", "faults")]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A home folder in which the scripted model answers."""
    (tmp_path / "home").mkdir()
    return Home(tmp_path / "home")


@pytest.fixture
async def core(home: Home) -> AsyncIterator[RunningServer]:
    """A core in the workspace of the home folder, which the command is told of."""
    async with running_server(home.workspace) as server:
        home.variables["MOLTBOT_ADDRESS"] = server.address
        yield server
