"""Replicas in processes: what becomes of answers when one dies, and that none is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import psutil
import pytest
from moltbot_server.errors import ModelUnavailable
from moltbot_server.models.engine import Chunk, Finished, stream
from moltbot_server.models.engines.local import LocalEngine, engine, processes, replicas
from moltbot_server.models.engines.local.rows import Row
from moltbot_server.models.folder import read_folder
from moltbot_server.models.replica import nursery as nurseries
from moltbot_server.models.replica.nursery import Nursery
from moltbot_server.models.tuning import Tuning
from moltbot_server.turns import GenerationOptions, Message, Role, TextPart
from tiny_model import make_tiny_model

pytestmark = pytest.mark.skipif(not Nursery.possible(), reason="replicas are threads here")

LONG = GenerationOptions(max_output_tokens=600)
TEXTS = ["aaa", "bbb", "ccc", "ddd", "eee", "fff", "ggg", "hhh"]


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "endless", context_length=8192, endless=True)


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


@asynccontextmanager
async def running(folder: Path, nursery: Nursery | None, count: int) -> AsyncIterator[LocalEngine]:
    tuning = Tuning(replicas=count, compute_type="float32")  # no rounding that depends on a row's mates
    local = LocalEngine(read_folder(folder), tuning=tuning, nursery=nursery)
    await local.start()
    try:
        yield local
    finally:
        await local.close()


async def ask(local: LocalEngine, text: str, options: GenerationOptions = LONG) -> tuple[str, Finished]:
    asked = [Message(role=Role.USER, parts=(TextPart(text=text),))]
    async with aclosing(stream(local, asked, options)) as items:
        heard = [item async for item in items]
    finished = heard.pop()
    assert isinstance(finished, Finished)
    return "".join(item.text for item in heard if isinstance(item, Chunk)), finished


def pids(nursery: Nursery) -> list[int]:
    """Return the processes that were forked, the zombies too."""
    return [] if nursery.pid is None else sorted(child.pid for child in psutil.Process(nursery.pid).children())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  (other processes set no event)
            await asyncio.sleep(0.001)


async def in_threads(folder: Path, texts: Sequence[str]) -> list[str]:
    async with running(folder, None, 1) as local:
        return [(await ask(local, text))[0] for text in texts]


async def test_answers_of_a_process_that_is_killed_go_on_in_others_and_say_the_same(
    endless: Path, nursery: Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(endless, nursery, 2) as local:
        before = pids(nursery)
        tasks = [asyncio.create_task(ask(local, text)) for text in TEXTS]
        await until(lambda: sum(row.first > 0 for row in local._rows) == len(TEXTS))
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        answers = await asyncio.gather(*tasks)
        assert local.healthy
        assert (len(set(before) | set(pids(nursery))), nursery.born) == (4, 2)
        assert local.numbers["revivals"] == 2
    assert [text for text, _ in answers] == await in_threads(endless, TEXTS)
    assert {finished.usage.output_tokens for _, finished in answers} == {600}
    told = [record for record in caplog.records if "has died" in record.message]
    assert [record.__dict__["how"] for record in told] == ["was ended by SIGKILL"] * 2
    assert sum(record.__dict__["again"] for record in told) == len(TEXTS)


async def test_a_process_that_is_killed_while_nobody_asks_is_not_missed(endless: Path, nursery: Nursery) -> None:
    async with running(endless, nursery, 1) as local:
        expected = await ask(local, "hello")
        (pid,) = pids(nursery)
        os.kill(pid, signal.SIGKILL)
        assert (await ask(local, "hello"))[0] == expected[0]
        assert pid not in pids(nursery)


async def test_a_process_that_stands_still_is_ended_and_its_answers_go_on_in_another_one(
    endless: Path, nursery: Nursery, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(processes, "LOOK", 0.05)
    async with running(endless, nursery, 1) as local:
        expected = [(await ask(local, text))[0] for text in TEXTS[:2]]
        (pid,) = pids(nursery)
        tasks = [asyncio.create_task(ask(local, text)) for text in TEXTS[:2]]
        await until(lambda: any(row.first > 0 for row in local._rows))
        os.kill(pid, signal.SIGSTOP)
        async with asyncio.timeout(20):
            assert [(await task)[0] for task in tasks] == expected
            os.kill(pids(nursery)[0], signal.SIGSTOP)  # while nobody asks
            assert (await ask(local, TEXTS[0]))[0] == expected[0]
        assert pid not in pids(nursery)
        assert local.numbers["revivals"] == 2
    assert [record.__dict__["how"] for record in caplog.records if "has died" in record.message] == ["stood still"] * 2


async def test_one_that_forks_and_stands_still_is_ended_with_those_whom_it_forked(
    endless: Path, nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "LOOK", 0.02)
    monkeypatch.setattr(nurseries, "_ANSWERS", 0.2)
    monkeypatch.setattr(nurseries, "_LEAVES", 0.2)
    async with running(endless, nursery, 1) as local:
        expected = (await ask(local, "hello"))[0]
        stopped = [nursery.pid or 0, *pids(nursery)]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        async with asyncio.timeout(20):
            assert (await ask(local, "hello"))[0] == expected
            await until(lambda: not any(psutil.pid_exists(pid) for pid in stopped))


async def test_a_process_that_computes_in_silence_is_waited_for(
    endless: Path, nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "LOOK", 0.002)
    async with running(endless, nursery, 1) as local:
        pid = pids(nursery)
        await ask(local, "hello")
        assert pids(nursery) == pid


async def test_many_that_were_killed_while_nobody_asked_cost_no_answer(endless: Path, nursery: Nursery) -> None:
    async with running(endless, nursery, 5) as local:
        expected = [await ask(local, text) for text in TEXTS]
        for pid in pids(nursery):
            os.kill(pid, signal.SIGKILL)
        assert [(await ask(local, text))[0] for text in TEXTS] == [text for text, _ in expected]
        assert local.healthy


async def test_an_answer_that_kills_each_process_fails_and_its_mates_do_not(
    endless: Path, nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(endless, nursery, 1) as local:
        note = local.note

        def killing(row: Row, token: int) -> None:
            note(row, token)
            if "ccc" in "".join(row.prompt[: row.asked]) and token >= 0:
                for pid in pids(nursery):
                    os.kill(pid, signal.SIGKILL)

        monkeypatch.setattr(local, "note", killing)
        tasks = {text: asyncio.create_task(ask(local, text)) for text in TEXTS}
        answers = dict(zip(tasks, await asyncio.gather(*tasks.values(), return_exceptions=True), strict=True))
        assert isinstance(answers.pop("ccc"), ModelUnavailable)
        assert local.healthy
    expected = await in_threads(endless, list(answers))
    assert [answer[0] if isinstance(answer, tuple) else answer for answer in answers.values()] == expected


async def test_those_who_fork_may_be_killed_too(endless: Path, nursery: Nursery) -> None:
    async with running(endless, nursery, 1) as local:
        first, replica = nursery.pid, pids(nursery)
        assert first is not None
        os.kill(first, signal.SIGKILL)
        expected, _ = await ask(local, "hello")
        assert nursery.pid == first, "nobody needed another one"
        os.kill(replica[0], signal.SIGKILL)
        assert (await ask(local, "hello"))[0] == expected
        assert (nursery.pid != first, nursery.born) == (True, 1)


async def test_a_model_whose_processes_cannot_be_started_again_says_so(
    endless: Path, nursery: Nursery, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(link: socket.socket, memory: int) -> int:
        raise OSError(11, "no room for another process")

    monkeypatch.setattr(replicas, "PAUSES", (0.0, 0.001))
    async with running(endless, nursery, 1) as local:
        monkeypatch.setattr(nursery, "fork", full)
        for pid in pids(nursery):
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(ModelUnavailable):
            async with asyncio.timeout(10):
                await ask(local, "hello")
        assert not local.healthy
        assert "a process of the model cannot be started" in caplog.text


async def test_models_that_come_and_go_leave_no_process_and_no_descriptor(endless: Path, nursery: Nursery) -> None:
    async def one() -> None:
        async with running(endless, nursery, 2) as local:
            assert len(pids(nursery)) == 2
            task = asyncio.create_task(ask(local, "hello", GenerationOptions()))
            await until(lambda: any(row.first for row in local._rows))
        with pytest.raises(ModelUnavailable):
            await task

    def descriptors() -> tuple[int, ...]:
        assert nursery.pid is not None
        gc.collect()
        return tuple(psutil.Process(pid).num_fds() for pid in (os.getpid(), nursery.pid))

    await one()
    before = descriptors()
    for _ in range(10):
        await one()
    assert pids(nursery) == []
    assert descriptors() <= before


@pytest.mark.parametrize("born", [0, 1, 2, 3])
async def test_a_load_that_is_given_up_leaves_no_process(endless: Path, nursery: Nursery, born: int) -> None:
    nursery.start()
    local = LocalEngine(read_folder(endless), tuning=Tuning(replicas=3), nursery=nursery)
    loading = asyncio.create_task(local.start())
    await until(lambda: nursery.born >= born or loading.done())
    loading.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await loading
        await local.close()
    await until(lambda: not pids(nursery))
    assert nursery.born == 0


async def test_a_model_that_is_not_small_has_no_processes(
    endless: Path, nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "SMALL", 1000)
    async with running(endless, nursery, 2) as local:
        await ask(local, "hello")
        assert (nursery.pid, nursery.born) == (None, 0)


async def test_signals_to_a_group_leave_those_who_write_to_their_engine(endless: Path, nursery: Nursery) -> None:
    async with running(endless, nursery, 1) as local:
        before = pids(nursery)
        for pid in [*before, nursery.pid or 0]:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.kill(pid, number)
        await ask(local, "hello")
        assert pids(nursery) == before


_ENGINE = """
    import asyncio, sys
    from pathlib import Path
    from moltbot_server.models.engine import stream
    from moltbot_server.models.engines.local import LocalEngine
    from moltbot_server.models.folder import read_folder
    from moltbot_server.models.replica.nursery import Nursery
    from moltbot_server.models.tuning import Tuning
    from moltbot_server.turns import GenerationOptions, Message, Role, TextPart

    async def main():
        nursery = Nursery()
        local = LocalEngine(read_folder(Path(sys.argv[1])), tuning=Tuning(replicas=2), nursery=nursery)
        await local.start()
        said = [Message(role=Role.USER, parts=(TextPart(text="go on"),))]
        async for _ in stream(local, said, GenerationOptions()):
            print(nursery.pid, flush=True)

    asyncio.run(main())
"""


def test_an_engine_that_is_killed_leaves_no_orphans(endless: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(_ENGINE), str(endless)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        nursery = psutil.Process(int(process.stdout.readline()))
        left = [nursery, *nursery.children()]
        assert [each.name() for each in left] == ["moltbot-nursery", "moltbot-replica", "moltbot-replica"]
        process.kill()
    _, alive = psutil.wait_procs(left, timeout=10)
    assert alive == []
