"""The examples that are shipped with the Python client, run as they are against a real core."""

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from moltbot_server.testing import RunningServer, running_server

EXAMPLES = Path(__file__).parents[2] / "clients" / "python" / "examples"


@pytest.fixture
async def core(tmp_path: Path) -> AsyncIterator[RunningServer]:
    """A real core whose workspace is the one of a home folder."""
    async with running_server(tmp_path / ".moltbot") as server:
        yield server


async def run(core: RunningServer, home: Path, example: str, *words: str) -> str:
    """Run an example in a home folder and return what it prints."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, EXAMPLES / example, *words),
        cwd=home,
        env={"PATH": os.environ["PATH"], "HOME": str(home), "MOLTBOT_ADDRESS": core.address},
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(30):
        out, _ = await process.communicate()
    assert process.returncode == 0
    return out.decode()


@pytest.mark.parametrize("example", ["ask.py", "plain_stubs.py"])
async def test_an_example_prints_the_streamed_answer(core: RunningServer, tmp_path: Path, example: str) -> None:
    assert await run(core, tmp_path, example, "Hello", "you") == "You said: Hello you\n"


async def test_the_example_that_leaves_and_comes_back_reads_on_where_it_was_and_gets_the_whole_answer(
    core: RunningServer, tmp_path: Path
) -> None:
    said = await run(core, tmp_path, "go_on.py")
    first, gone, second, together, same = said.split("\n\n")

    seen, later = ([int(line.split()[0]) for line in part.splitlines()[1:]] for part in (first, second))
    assert [*seen, *later] == sorted({*seen, *later})
    assert later
    assert [line.split()[1] for line in first.splitlines()[1:]] == ["accepted", "routed", "text_delta"]
    assert second.splitlines()[-1].split()[1] == "completed"
    assert re.fullmatch(rf"Gone after event {seen[-1]}\. .*\nsessions/\w+/turns/1", gone)
    assert second.splitlines()[0] == f"Second connection, after event {seen[-1]}:"
    assert together == "The two together:\nYou said: What can you do?"
    assert same == "The same as what the core kept: yes\n"


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"ask.py", "plain_stubs.py", "go_on.py"}
