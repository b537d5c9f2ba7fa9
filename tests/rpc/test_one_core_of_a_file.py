"""One core by itself has a database, or several workers that know of each other have: nobody else gets at it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from core_process import CoreProcess, core_process
from moltbot_server.store.sqlite import SqliteStore
from rpc_calls import kinds, turn


async def refused(folder: Path, *flags: str) -> str:
    """Start a core that must not serve, and return what it says; its status tells that another start may do better."""
    async with core_process(folder, *flags) as core:
        assert await core.end(20) == 69
        return await core.whole_log()


async def command(folder: Path, *words: str) -> tuple[int, str]:
    """Run `moltbot` and return its status and what it says."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "moltbot_server.cli", *words, "--workspace", str(folder)),
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    return process.returncode or 0, said.decode()


async def test_a_second_core_on_a_database_is_refused_with_who_has_it_and_hurts_no_turn_of_the_first(
    tmp_path: Path,
) -> None:
    async with core_process(tmp_path) as core:
        api = (await core.serving()).api()
        call = api.stream(turn("#100 pace=0.05", session="sessions/s"))
        begun = [(await call.read()).event for _ in range(4)]
        said = await refused(tmp_path)
        assert f"moltbot.db is in use already, by process {core.process.pid}: stop that one first" in said
        assert "WORKERS" in said
        assert f"by process {core.process.pid}" in await refused(tmp_path, "--worker", "1", "--workers", "2")
        resumed = await api.resumed(begun[0].accepted.turn)
        assert (kinds(resumed)[-1], "reset" in kinds(resumed)) == ("completed", False)
        await api.channel.close()


async def test_a_core_that_was_killed_is_started_again_at_once(tmp_path: Path) -> None:
    for _ in range(3):
        core = await CoreProcess.start(tmp_path)
        await core.serving()
        core.signal(signal.SIGKILL)  # and nobody waits for its end
        async with core_process(tmp_path) as after:
            await after.serving()
        await core.end()
        await core.whole_log()


async def test_a_core_beside_workers_is_refused_and_workers_are_not(tmp_path: Path) -> None:
    async with (
        core_process(tmp_path, "--worker", "1", "--workers", "2") as one,
        core_process(tmp_path, "--worker", "2", "--workers", "2") as two,
    ):
        await one.serving()
        await two.serving()
        assert "moltbot.db is in use already, by several workers: stop that one first" in await refused(tmp_path)


async def test_nothing_is_imported_beside_a_core_and_all_is_exported(tmp_path: Path) -> None:
    async with core_process(tmp_path) as core:
        api = (await core.serving()).api()
        await api.run(turn("Hi", session="sessions/s"))
        await api.channel.close()
        assert (await command(tmp_path, "store", "export", "all.jsonl"))[0] == 0
        status, said = await command(tmp_path, "store", "import", "all.jsonl", "--merge")
        assert (status, f"in use already, by process {core.process.pid}" in said) == (69, True)
        core.signal(signal.SIGTERM)
        assert await core.end() == 0
    status, said = await command(tmp_path, "store", "import", "all.jsonl", "--merge")
    assert (status, "were there already" in said) == (0, True)


async def test_a_core_is_refused_while_a_command_has_the_database(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "moltbot.db")
    await store.open()
    assert f"by process {os.getpid()}" in await refused(tmp_path)
    await store.close()
    async with core_process(tmp_path) as core:
        await core.serving()
