"""Two cores on one Redis: what one leaves unfinished the other one carries on, and Redis itself may die."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import pytest
from moltbot import MoltBot
from moltbot_server.testing import free_port
from moltbot_server.workspace import Workspace
from redis_process import RedisProcess

TURNS = 12
SLOW = "#150 pace=0.05"


class Cores:
    """Cores of one workspace on one Redis."""

    def __init__(self, folder: Path, port: int) -> None:
        self.workspace = Workspace(folder=folder)
        self.workspace.create()
        self._port = port
        self.processes: list[Process] = []
        self._ports = [free_port(), free_port()]

    async def start(self) -> None:
        """Start the next one, and wait until it serves."""
        known = {name: value for name, value in os.environ.items() if not name.startswith("MOLTBOT_")}
        named = {
            "MOLTBOT_STORE_TYPE": "redis",
            "MOLTBOT_STORE_PORT": str(self._port),
            "MODEL_TYPE": "scripted",
            "MOLTBOT_DRAIN_GRACE": "1",
        }
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "moltbot_server", "--workspace", str(self.workspace.folder)),
            *("--grpc-port", str(self._ports[len(self.processes)]), "--metrics-port", "0"),
            env={**known, **named},
            stdout=PIPE,
        )
        self.processes.append(process)
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), 20)

    def client(self, *places: int) -> MoltBot:
        """Return a client that knows of some of them."""
        addresses = ",".join(f"127.0.0.1:{self._ports[place]}" for place in places)
        return MoltBot(addresses, self.workspace.read_key())

    async def end(self) -> None:
        """Kill those that still run."""
        for process in self.processes:
            if process.returncode is None:
                process.kill()
            await process.wait()


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[RedisProcess]:
    """A Redis that writes down all that it is given."""
    async with RedisProcess.keeping(tmp_path) as process:
        yield process


@pytest.fixture
async def cores(redis: RedisProcess, tmp_path: Path) -> AsyncIterator[Cores]:
    """Two cores, of which the first one serves."""
    cores = Cores(tmp_path / "home", redis.port)
    await cores.start()
    yield cores
    await cores.end()


class Readers:
    """People who each wait for a long answer."""

    def __init__(self, bot: MoltBot) -> None:
        self._seen: set[int] = set()
        self._tasks = [asyncio.create_task(self._read(bot, number)) for number in range(TURNS)]

    async def all_see(self) -> float:
        """Wait until each has seen more than before; return how long that took."""
        self._seen.clear()
        began = time.monotonic()
        async with asyncio.timeout(30):
            while len(self._seen) < TURNS:  # noqa: ASYNC110 - a reader may have ended with an error
                await asyncio.sleep(0.01)
        return time.monotonic() - began

    async def to_the_end(self) -> list[Read]:
        """Return what each has read."""
        return await asyncio.gather(*self._tasks)

    async def _read(self, bot: MoltBot, number: int) -> Read:
        shown, numbers, completed = "", list[int](), ""
        name = f"s{number}"
        async for event in bot.stream_turn(SLOW, session=f"sessions/{name}", request_id=name, within=60):
            numbers.append(event.sequence)
            match event.WhichOneof("kind"):
                case "text_delta":
                    shown += event.text_delta.text
                    self._seen.add(number)
                case "reset":
                    shown = event.reset.text
                case "completed":
                    completed = event.completed.text
                case "failed":
                    raise AssertionError(str(event.failed))
        return Read(shown, completed, numbers)


class Read(NamedTuple):
    """What was shown in the end, the answer, and the numbers of all events."""

    shown: str
    completed: str
    numbers: list[int]


async def whole(cores: Cores, outcomes: list[Read]) -> None:
    """Make sure that what was shown is the answer, whole, and the only one that is stored."""
    last = next(place for place in (1, 0) if cores.processes[place].returncode is None)
    async with cores.client(last) as bot:
        for number, read in enumerate(outcomes):
            assert read.shown == read.completed
            assert len(read.completed.split()) == 150
            assert read.numbers == sorted(set(read.numbers))
            said = [message async for message in bot.messages(f"sessions/s{number}")]
            assert len(said) == 2
            assert "".join(part.text for part in said[1].parts) == read.completed


async def test_a_killed_core_is_followed_by_the_other_one_within_six_seconds(cores: Cores) -> None:
    async with cores.client(0, 1) as bot:
        readers = Readers(bot)
        await readers.all_see()
        await cores.start()
        cores.processes[0].send_signal(signal.SIGKILL)
        await cores.processes[0].wait()
        assert await readers.all_see() < 7  # the way of the readers to the other one is a part of it
        outcomes = await readers.to_the_end()
    assert all(read.numbers[-1] > 1_000_000 for read in outcomes)
    await whole(cores, outcomes)


async def test_a_core_that_leaves_hands_its_turns_over_at_once(cores: Cores) -> None:
    async with cores.client(0, 1) as bot:
        readers = Readers(bot)
        await readers.all_see()
        await cores.start()
        cores.processes[0].send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(cores.processes[0].wait(), 15) == 0
        assert await readers.all_see() < 4
        outcomes = await readers.to_the_end()
    await whole(cores, outcomes)


async def test_a_core_that_was_stopped_and_comes_back_writes_into_no_turn_of_another(cores: Cores) -> None:
    async with cores.client(0, 1) as bot:
        readers = Readers(bot)
        await readers.all_see()
        await cores.start()
        cores.processes[0].send_signal(signal.SIGSTOP)
        await asyncio.sleep(8)
        cores.processes[0].send_signal(signal.SIGCONT)
        outcomes = await readers.to_the_end()
    assert all(read.numbers[-1] > 1_000_000 for read in outcomes)
    await whole(cores, outcomes)


async def test_turns_outlive_the_death_of_redis_and_nobody_takes_them_over(cores: Cores, redis: RedisProcess) -> None:
    async with cores.client(0, 1) as bot:
        readers = Readers(bot)
        await readers.all_see()
        await cores.start()
        await redis.kill()
        await asyncio.sleep(5.5)  # longer than a lease
        await redis.start()
        outcomes = await readers.to_the_end()
    assert all(read.numbers[-1] < 1_000_000 for read in outcomes)
    await whole(cores, outcomes)
