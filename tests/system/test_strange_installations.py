"""`moltbot start` beside installations with another key on the same Redis: it says so once, and ends."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
from cli_process import ANY_PORTS, Home
from redis_process import RedisProcess


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[RedisProcess]:
    """A Redis that writes down all that it is given."""
    async with RedisProcess.keeping(tmp_path) as process:
        yield process


def home(folder: Path, redis: RedisProcess, **more: str) -> Home:
    """Make a home folder whose workspace keeps its turns in Redis."""
    folder.mkdir()
    home = Home(folder)
    home.variables |= {"MOLTBOT_STORE_TYPE": "redis", "MOLTBOT_STORE_PORT": str(redis.port)}
    home.variables |= {"MOLTBOT_DRAIN_GRACE": "1", **more}
    return home


@pytest.mark.parametrize("workers", ["1", "3"])
async def test_a_start_beside_cores_with_another_key_says_once_what_to_do_and_ends(
    tmp_path: Path, redis: RedisProcess, workers: str
) -> None:
    mine, strange = home(tmp_path / "mine", redis), home(tmp_path / "strange", redis, WORKERS=workers)
    async with mine.started():
        ended = await strange.run("start", *ANY_PORTS)
        assert ended.status == 78
        assert ended.err.count("another key under the prefix moltbot") == 1
        assert ended.err.count("copy the file `key` of one workspace to the others, or give each") == 1
        assert ended.err.count("a process could not start, so everything stops") == 1
        assert "started again" not in ended.err
        checked = await mine.run("store", "check")
        assert (checked.status, "different keys" in checked.out) == (0, False)
        assert (await mine.run("status")).status == 0
    (strange.workspace / "key").write_text((mine.workspace / "key").read_text())
    async with mine.started(), strange.started():
        assert (await strange.run("chat", "Hi")).out == "You said: Hi\n"


async def test_a_core_that_finds_a_stranger_in_its_place_says_so_once_and_is_back_when_that_has_left(
    tmp_path: Path, redis: RedisProcess
) -> None:
    mine, strange = home(tmp_path / "mine", redis), home(tmp_path / "strange", redis)
    async with mine.started() as started:
        supervisor, core = (psutil.Process(pid) for pid in (started.process.pid, started.told()["processes"]["core"]))
        supervisor.suspend()  # or it would end a core that stands still, and start one in time
        core.suspend()
        async with strange.started():  # which waits for the lease of the other, and is the only one there
            core.kill()
            supervisor.resume()
            for _ in range(2):
                assert "child=core" in await started.line("a process cannot start as things are; it is tried again")
            assert started.said.count("another key under the prefix moltbot") == 1
            assert (await strange.run("chat", "Hi")).out == "You said: Hi\n"
        await started.line("the core serves")
        assert (await mine.run("chat", "Hi")).out == "You said: Hi\n"
