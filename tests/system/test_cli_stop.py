"""`moltbot start` that is asked to stop: it takes as long as the configuration says, whatever stands still."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from pathlib import Path
from urllib.request import Request, urlopen

import psutil
import pytest
from cli_process import Home
from cli_terminal import terminal
from moltbot import MoltBot, MoltBotClientError
from moltbot_server.workspace import Workspace


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """An empty home folder."""
    return Home(tmp_path)


@pytest.mark.parametrize("name", ["http", "core", "engine"])
async def test_a_stop_waits_for_what_stands_still_no_longer_than_for_answers(home: Home, name: str) -> None:
    home.variables["MOLTBOT_DRAIN_GRACE"] = "4"
    async with home.started() as started:
        psutil.Process(started.told()["processes"][name]).suspend()
        began = time.monotonic()
        started.process.send_signal(signal.SIGTERM)
        assert f"child={name}" in await started.line("did not leave in time and is killed")
        assert time.monotonic() - began < 4 + 4.5  # it was killed after the grace and five seconds
        assert await started.rest() == 0


async def test_streams_over_http_have_as_long_as_the_configuration_says_at_a_stop(home: Home) -> None:
    home.variables["MOLTBOT_DRAIN_GRACE"] = "1"
    async with home.started() as started:
        key = (home.workspace / "key").read_text().strip()
        said = {"model": "scripted", "stream": True, "messages": [{"role": "user", "content": "#1000 pace=0.1"}]}
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        request = Request(f"{started.told()['http']}/v1/chat/completions", json.dumps(said).encode(), headers)
        with await asyncio.to_thread(urlopen, request, timeout=20) as answer:
            assert await asyncio.to_thread(answer.readline)
            started.process.send_signal(signal.SIGTERM)
            assert await started.rest() == 0
    assert "grace_s=1.0" in started.said
    assert "did not leave in time" not in started.said


async def test_who_is_cut_off_is_told_where_the_answer_will_be(home: Home) -> None:
    home.variables["MOLTBOT_DRAIN_GRACE"] = "0"
    async with home.started() as started:
        chat = await home.spawn("chat", "--session", "once", "#1000 pace=0.1")
        assert chat.stdout is not None
        await chat.stdout.read(1)
        async with terminal(home, "--session", "talk") as screen:
            place = await screen.until("Ctrl-D leaves")
            screen.type("#1000 pace=0.1\r")
            place = await screen.until("one two", after=place)
            started.process.send_signal(signal.SIGTERM)
            assert await started.rest() == 0
            place = await screen.until("sessions/talk` has it once it is there", after=place)
        _, told = await chat.communicate()
        assert chat.returncode == 69
        assert "its answer is kept: `" in told.decode()
        assert "session show sessions/once` has it once it is there." in told.decode()


async def _asked_again_and_again(bot: MoltBot, *, until: float) -> None:
    while time.monotonic() < until:
        await bot.run_turn("Hello", within=0.5)


async def test_nothing_new_is_taken_and_what_is_under_way_has_its_time_once(home: Home) -> None:
    home.variables["MOLTBOT_DRAIN_GRACE"] = "4"
    async with home.started() as started:
        told = started.told()
        chats = [await home.spawn("chat", "--events", "#1000 pace=0.1") for _ in range(2)]
        for chat in chats:
            assert chat.stdout is not None
            await chat.stdout.readline()  # accepted: its turn is under way
        async with MoltBot(told["grpc"], Workspace(folder=home.workspace).read_key()) as bot:
            await bot.run_turn("Hello")
            began = time.monotonic()
            started.process.send_signal(signal.SIGTERM)
            await started.line("Stopping")
            with pytest.raises(MoltBotClientError, match="the core is leaving"):
                await _asked_again_and_again(bot, until=began + 2)
        assert await started.rest() == 0
        assert time.monotonic() - began < 4 + 4  # the grace, and what it takes to put all away
        for chat in chats:
            chat.kill()
            await chat.communicate()
