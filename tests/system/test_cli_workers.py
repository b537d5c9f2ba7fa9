"""Several workers under one supervisor: they share the port, stand in for each other, and are renewed one by one."""

from __future__ import annotations

import asyncio
import re
import signal
import urllib.request
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from cli_process import Home, Started
from moltbot import MoltBot

SLOW = "#60 pace=0.05"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """An empty home folder."""
    return Home(tmp_path)


@pytest.fixture
async def started(home: Home) -> AsyncIterator[Started]:
    """A MoltBot with two workers."""
    home.variables |= {"WORKERS": "2", "MOLTBOT_DRAIN_GRACE": "1"}
    async with home.started() as started:
        yield started


def client(started: Started) -> MoltBot:
    """Return a client with a connection of its own to the port that the workers share."""
    key = (started.home.workspace / "key").read_text().strip()
    return MoltBot(started.told()["grpc"], key)


def read(address: str) -> str:
    """Return a page."""
    with urllib.request.urlopen(address, timeout=10) as answer:
        return str(answer.read(), "utf-8")


def turns_of(metrics: str) -> float:
    """Return how many turns a core has ended."""
    found = re.findall(r"^moltbot_turns_total\{.*\} ([0-9.]+)$", read(f"{metrics}/metrics"), re.MULTILINE)
    return sum(map(float, found))


async def until_all_serve(home: Home) -> None:
    """Wait until `moltbot status` finds nothing wrong."""
    async with asyncio.timeout(60):
        while (await home.run("status", "--json")).status != 0:
            pass


async def test_one_worker_that_is_stopped_does_not_make_the_others_look_dead(started: Started) -> None:
    worker = psutil.Process(started.told()["processes"]["core-1"])
    worker.suspend()
    try:
        ended = await started.home.run("status", "--json")
        told = await started.home.run("status")
    finally:
        worker.resume()
    found = ended.json
    assert (ended.status, found["healthy"], found["model"]) == (1, False, "scripted")
    assert (found["core"]["healthy"], found["core"]["serving"], found["core"]["workers"]) == (True, 1, 2)
    assert found["engine"]["healthy"]
    assert {name: worker["healthy"] for name, worker in found["workers"].items()} == {"core-1": False, "core-2": True}
    assert "serving      1 of 2 workers" in told.out


async def test_workers_share_the_grpc_port_and_each_tells_how_it_does_at_a_port_of_its_own(started: Started) -> None:
    told = started.told()
    assert set(told["processes"]) == {"engine", "core-1", "core-2", "http-1", "http-2"}
    listening = {
        process.pid
        for process in started.processes()
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == urlsplit(f"//{told['grpc']}").port
    }
    assert listening == {told["processes"]["core-1"], told["processes"]["core-2"]}
    state = (await started.home.run("status", "--json")).json
    assert state["healthy"]
    assert set(state["workers"]) == {"core-1", "core-2"}
    addresses = [worker["metrics"] for worker in state["workers"].values()]
    assert len({state["engine"]["metrics"], *addresses}) == 3
    for address in addresses:
        assert "moltbot_turns_under_way" in await asyncio.to_thread(read, f"{address}/metrics")
    said = (await started.home.run("status")).out
    assert all(address in said for address in addresses)


async def test_http_adapters_spread_what_they_ask_over_all_workers(started: Started) -> None:
    told = started.told()
    key = (started.home.workspace / "key").read_text().strip()
    body = b'{"model": "default", "messages": [{"role": "user", "content": "Hi"}]}'

    def ask() -> int:
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{told['http']}/v1/chat/completions", body, headers)
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.status)

    assert {await asyncio.to_thread(ask) for _ in range(24)} == {200}
    shares = [turns_of(address) for address in told["cores"].values()]
    assert sum(shares) == 24
    assert min(shares) >= 6


@pytest.mark.parametrize("strike", [psutil.Process.kill, psutil.Process.suspend], ids=["killed", "stands still"])
async def test_a_worker_that_answers_no_more_is_started_again_and_its_turns_go_on(
    started: Started, strike: Callable[[psutil.Process], None]
) -> None:
    before = started.told()["processes"]
    clients = [client(started) for _ in range(8)]

    async def read_answer(number: int) -> str:
        text = ""
        async for event in clients[number].stream_turn(SLOW, session=f"sessions/s{number}", request_id=f"r{number}"):
            match event.WhichOneof("kind"):
                case "text_delta":
                    text += event.text_delta.text
                case "reset":
                    text = event.reset.text
                case "completed":
                    assert event.completed.text == text
                case "failed":
                    raise AssertionError(str(event.failed))
        return text

    readers = [asyncio.create_task(read_answer(number)) for number in range(8)]
    await asyncio.sleep(1.0)  # all of them read
    strike(psutil.Process(before["core-1"]))
    async with asyncio.timeout(60):
        answers = await asyncio.gather(*readers)
    assert [len(answer.split()) for answer in answers] == [60] * 8
    await until_all_serve(started.home)
    after = started.told()["processes"]
    assert after["core-1"] != before["core-1"]
    assert {**after, "core-1": 0} == {**before, "core-1": 0}
    for bot in clients:
        await bot.close()


async def test_an_adapter_that_stands_still_is_told_and_another_one_takes_its_place(started: Started) -> None:
    before = started.told()["processes"]
    psutil.Process(before["http-1"]).suspend()
    ended, told = await asyncio.gather(started.home.run("status", "--json"), started.home.run("status"))
    assert (ended.status, told.status) == (1, 1)
    assert ended.json["http"] == {**ended.json["http"], "healthy": False, "answering": 1, "processes": 2}
    assert ended.json["core"]["healthy"]
    assert re.search(r"HTTP +NOT SERVING +1 of 2 processes", told.out)
    assert "child=http-1" in await started.line("a process does not answer and is killed")
    assert "child=http-1" in await started.line("a process was started again")
    await until_all_serve(started.home)
    after = started.told()["processes"]
    assert after["http-1"] != before["http-1"]
    assert {**after, "http-1": 0} == {**before, "http-1": 0}
    assert (await started.home.run("status", "--json")).json["http"]["answering"] == 2


async def test_workers_are_started_again_one_after_the_other_while_turns_go_on(started: Started) -> None:
    before = started.told()["processes"]
    clients = [client(started) for _ in range(4)]
    over = asyncio.Event()

    async def talk(number: int) -> int:
        asked = 0
        while not over.is_set():
            asked += 1
            answer = await clients[number].run_turn("Hi", session=f"sessions/s{number}")
            assert answer.text
        return asked

    talking = [asyncio.create_task(talk(number)) for number in range(4)]
    started.process.send_signal(signal.SIGUSR1)
    async with asyncio.timeout(60):
        while any(started.told()["processes"][name] == before[name] for name in before if name != "engine"):
            assert not any(task.done() for task in talking), "somebody heard of it"
            await asyncio.sleep(0.1)
    await started.line("cores and adapters have been started again")
    renewed = started.said.partition("are started again, one after the other")[2]
    told = re.findall(r"info (\S+)/\w+: (?:the core )?(has left|serves|leaving|listening)", renewed)
    gone, back = {"has left", "leaving"}, {"serves", "listening"}
    assert all(what in (gone, back)[place % 2] for place, (_, what) in enumerate(told)), renewed
    assert [name for name, _ in told[::2]] == [name for name, _ in told[1::2]]
    assert len(told) == 2 * len([name for name in before if name != "engine"])
    await until_all_serve(started.home)
    over.set()
    assert min(await asyncio.gather(*talking)) > 0
    assert started.told()["processes"]["engine"] == before["engine"]
    for bot in clients:
        await bot.close()


async def test_another_program_on_the_shared_port_is_told_as_ever(home: Home, started: Started) -> None:
    port = started.told()["grpc"].rpartition(":")[2]
    other = Home(folder=home.folder / "other", variables=home.variables)
    other.folder.mkdir()
    ended = await other.run("start", "--port", "0", "--grpc-port", port, "--metrics-port", "0")
    assert ended.status == 69
    assert f"port {port} (gRPC) is in use" in ended.err


async def test_a_worker_that_is_killed_while_it_starts_is_started_again(home: Home) -> None:
    home.variables["MOLTBOT_DRAIN_GRACE"] = "1"

    async def kill_the_second() -> None:
        while True:
            for process in psutil.process_iter(["cmdline"]):
                words = process.info["cmdline"] or []
                if str(home.workspace) in words and "--worker 2" in " ".join(words):
                    process.kill()
                    return
            await asyncio.sleep(0.01)

    killing = asyncio.create_task(kill_the_second())
    try:
        async with home.started("--workers", "2") as started:
            assert killing.done()
            assert "a process ended and is started again" in started.said
            assert len(started.told()["cores"]) == 2
            await until_all_serve(home)
    finally:
        killing.cancel()


async def test_what_runs_goes_on_when_it_cannot_be_written_down(started: Started, home: Home) -> None:
    adapter = next(pid for name, pid in started.told()["processes"].items() if name.startswith("http"))
    (home.workspace / "run" / ".start.json").mkdir()  # as on a full disk, nothing can be written there
    psutil.Process(adapter).kill()
    told = await started.line("cannot write ")
    assert "MoltBot goes on" in told
    started.process.send_signal(signal.SIGUSR1)
    await started.line("cannot write ")
    async with client(started) as bot:
        assert (await bot.run_turn("Hello")).text == "You said: Hello"
    started.process.send_signal(signal.SIGTERM)
    await started.rest()
    assert started.process.returncode == 0
