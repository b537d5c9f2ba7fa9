"""A MoltBot that is started where one was killed that had answers under way."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from cli_process import Home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """An empty home folder."""
    return Home(tmp_path)


async def _told(home: Home) -> None:
    """Wait until the status says why nothing serves."""
    while "was killed; another one waits until what it had begun has ended.\n" not in (await home.run("status")).out:
        continue


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_start_waits_for_what_a_killed_one_has_under_way(home: Home, workers: str) -> None:
    home.variables |= {"WORKERS": workers, "MOLTBOT_DRAIN_GRACE": "20s"}
    async with home.started() as killed:
        chat = await home.spawn("chat", "#120 pace=0.05")
        assert chat.stdout is not None
        said = await chat.stdout.read(1)
        processes = killed.processes()
        killed.process.kill()
        telling = asyncio.create_task(_told(home))
        async with home.started() as started:
            assert telling.done()
            assert "The MoltBot that ran here was killed. Waiting for its processes" in started.said
            assert not any(process.is_running() for process in processes)
            rest, _ = await chat.communicate()
            assert len((said + rest).split()) == 120
            assert (await home.run("chat", "Hello")).out == "You said: Hello\n"
