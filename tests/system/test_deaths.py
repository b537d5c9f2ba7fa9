"""A real `moltbot start` whose core or adapter is killed while all kinds of clients talk: each shows what is kept."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import openai
import psutil
import pytest
from cli_process import Home, Started
from cli_terminal import terminal
from moltbot import Answer, MoltBot
from web.browser import answered, ask, chromium, find_chromium, visiting

KILLS = int(os.environ.get("KILLS", "5"))
WORDS = [f"word{number}" for number in range(50)]
TEXT = " ".join(WORDS)
SCRIPT = f"rules: [{{match: '^Tell', template: '{TEXT}', pace: 0.02}}]\n"


@dataclass(slots=True)
class Running:
    """A MoltBot, the ways to it, and how often something of it was killed."""

    started: Started
    key: str
    over: asyncio.Event = field(default_factory=asyncio.Event)
    turns: dict[str, int] = field(default_factory=dict)

    @property
    def http(self) -> str:
        """The address of the HTTP adapter."""
        return str(self.started.told()["http"])

    def kill(self, name: str) -> None:
        """Kill a process with signal 9."""
        psutil.Process(self.started.told()["processes"][name]).kill()

    async def back(self, name: str, pid: int) -> None:
        """Wait until a process that was killed runs again under another id, and answers."""
        async with asyncio.timeout(30):
            # Another process's doing, of which nothing tells us.
            while self.started.told()["processes"].get(name) in (pid, 0, None):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            address = self.started.told()["grpc"] if name == "core" else self.http.removeprefix("http://")
            while not _connects(address):  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    async def repeat(self, name: str, talk: Callable[[str], Awaitable[None]]) -> None:
        """Have turns one after the other, each in a session of its own, until it is over."""
        while not self.over.is_set():
            number = self.turns.get(name, 0)
            await talk(f"{name}-{number}")
            self.turns[name] = number + 1


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    """A MoltBot that is ready, with a scripted model."""
    script = tmp_path / "script.yaml"
    script.write_text(SCRIPT, encoding="utf-8")
    home = Home(tmp_path, {"MODEL_TYPE": "scripted", "MODEL_PATH": str(script)})
    async with home.started() as started:
        key = home.workspace.joinpath("key").read_text().strip()
        reading = asyncio.create_task(read_on(started))
        yield Running(started, key)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


def _connects(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        return False
    return True


async def read_on(started: Started) -> None:
    """Take what MoltBot says, so that it never waits for a reader."""
    assert started.process.stdout is not None
    while line := await started.process.stdout.readline():
        started.seen.append(line.decode())


@asynccontextmanager
async def page_session(running: Running) -> AsyncIterator[aiohttp.ClientSession]:
    """A signed-in HTTP client that sends what a page sends."""
    headers = {"X-MoltBot": "1", "Origin": running.http}
    jar = aiohttp.CookieJar(unsafe=True)
    async with aiohttp.ClientSession(running.http, headers=headers, cookie_jar=jar) as session:
        async with session.post("/api/login", json={"key": running.key}) as answer:
            assert answer.status == 204
        yield session


async def events(session: aiohttp.ClientSession, request: dict[str, Any]) -> AsyncIterator[tuple[int, str, str]]:
    """Yield number, kind and text of a turn's events as clients of Server-Sent Events do: with `Last-Event-ID`."""
    last = 0
    while True:
        try:
            headers = {"Last-Event-ID": str(last)} if last else {}
            async with session.post("/api/turns", json=request, headers=headers) as answer:
                if answer.status >= 500:
                    raise aiohttp.ClientError(f"status {answer.status}")
                assert answer.status == 200, await answer.text()
                frame: dict[str, str] = {}
                async for raw in answer.content:
                    name, _, value = raw.decode().rstrip("\n").partition(": ")
                    if name:
                        frame[name] = value
                    elif "data" in frame:  # a frame counts when it is whole
                        if frame["event"] == "refused":  # why the stream ends; the turn goes on
                            raise aiohttp.ClientError(frame["data"])
                        last = int(frame["id"])
                        yield last, frame["event"], frame["data"]
                        if frame["event"] in ("completed", "failed"):
                            return
                        frame = {}
        except (aiohttp.ClientError, ConnectionError):
            await asyncio.sleep(random.uniform(0.1, 0.4))  # as an EventSource does


# --- the clients ---------------------------------------------------------------------------------------------------


def python_client(running: Running, bot: MoltBot) -> Callable[[str], Awaitable[None]]:
    """The Python client: no event twice, and what it shows is what is kept."""

    async def talk(session: str) -> None:
        answer, numbers = Answer(), []
        async for event in bot.stream_turn("Tell me", session=session):
            numbers.append(event.sequence)
            if event.HasField("completed"):
                assert answer.text == event.completed.text == TEXT
            assert not event.HasField("failed"), event
            answer.add(event)
        assert numbers == sorted(set(numbers))
        kept = ["".join(part.text for part in said.parts) async for said in bot.messages(session)]
        assert kept == ["Tell me", TEXT]

    return talk


def command(running: Running) -> Callable[[str], Awaitable[None]]:
    """`moltbot chat` in a pipe. The scripted model says the same once more, so nothing is printed twice."""

    async def talk(session: str) -> None:
        ended = await running.started.home.run("chat", "--session", session, "Tell me")
        assert (ended.status, ended.out) == (0, TEXT + "\n"), ended

    return talk


def sse(running: Running, session: aiohttp.ClientSession) -> Callable[[str], Awaitable[None]]:
    """A client of Server-Sent Events."""

    async def talk(name: str) -> None:
        request = {"session": name, "text": "Tell me", "request_id": name, "model": ""}
        shown, numbers = "", []
        async for number, kind, data in events(session, request):
            numbers.append(number)
            told = json.loads(data)
            if kind == "text_delta":
                shown += told["text"]
            elif kind == "reset":
                shown = told["text"]
            elif kind == "completed":
                assert shown == told["text"] == TEXT
            assert kind != "failed", told
        assert numbers == sorted(set(numbers))

    return talk


def openai_client(running: Running, client: openai.AsyncOpenAI) -> Callable[[str], Awaitable[None]]:
    """The official client, streamed and whole in turn."""

    async def talk(name: str) -> None:
        asked: Any = {"model": "moltbot", "messages": [{"role": "user", "content": "Tell me"}]}
        if int(name[-1]) % 2 == 0:
            stream = await client.chat.completions.create(**asked, stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        else:
            text = (await client.chat.completions.create(**asked)).choices[0].message.content
        assert text == TEXT

    return talk


async def murder(running: Running, name: str, talks: list[asyncio.Task[None]]) -> None:
    """Kill a process again and again at random moments, then let the clients end their turns.

    Most turns end between two deaths: one that five cores did not survive is given up, as it should be.
    """
    for _ in range(KILLS):
        await asyncio.wait(talks, timeout=random.uniform(0.8, 3.0), return_when=asyncio.FIRST_EXCEPTION)
        pid = running.started.told()["processes"][name]
        running.kill(name)
        await running.back(name, pid)
    running.over.set()
    async with asyncio.timeout(90):
        await asyncio.gather(*talks)


# --- what is shown -------------------------------------------------------------------------------------------------


async def test_every_kind_of_client_shows_what_is_kept_though_the_core_is_killed_again_and_again(
    running: Running,
) -> None:
    async with AsyncExitStack() as stack:
        bot = await stack.enter_async_context(MoltBot(running.started.told()["grpc"], running.key))
        session = await stack.enter_async_context(page_session(running))
        client = openai.AsyncOpenAI(base_url=f"{running.http}/v1", api_key=running.key, max_retries=0)
        await stack.enter_async_context(client)
        talks = {
            "client": python_client(running, bot),
            "command": command(running),
            "sse": sse(running, session),
            "openai": openai_client(running, client),
        }
        tasks = [asyncio.create_task(running.repeat(name, talk)) for name, talk in talks.items()]
        await murder(running, "core", tasks)
        kept = [item async for item in bot.sessions(channel="web")]
        assert len(kept) == running.turns["sse"]
        for number in range(running.turns["sse"]):
            said = ["".join(part.text for part in item.parts) async for item in bot.messages(f"sse-{number}")]
            assert said == ["Tell me", TEXT]
    assert min(running.turns.values()) >= 2, running.turns


async def test_who_reads_events_over_http_goes_on_though_the_adapter_is_killed_again_and_again(
    running: Running,
) -> None:
    async with page_session(running) as session:
        tasks = [asyncio.create_task(running.repeat(f"sse{n}", sse(running, session))) for n in range(3)]
        await murder(running, "http", tasks)
    assert min(running.turns.values()) >= 2, running.turns


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium on this machine: apt-get install chromium")
@pytest.mark.parametrize("name", ["core", "http"])
async def test_an_open_page_goes_on_by_itself_through_every_death(running: Running, name: str) -> None:
    link = urlsplit(next(link for link in re.findall(r"http://\S+", running.started.said) if "/login?code=" in link))
    async with (
        chromium() as browser,
        visiting(browser, f"{link.scheme}://{link.netloc}", f"{link.path}?{link.query}") as visit,
    ):
        visit.page.set_default_timeout(60_000)
        await visit.page.wait_for_selector("#message")

        async def talk(_session: str) -> None:
            count = await visit.page.locator(".answer").count()
            await ask(visit, "Tell me")
            await visit.page.locator(".answer").nth(count).wait_for()
            assert await answered(visit) == TEXT
            assert await visit.page.locator(".problem").count() == 0

        await murder(running, name, [asyncio.create_task(running.repeat("page", talk))])
        turns = running.turns["page"]
        await visit.page.reload()
        await visit.page.locator(".answer").nth(turns - 1).wait_for()
        assert await visit.page.locator(".question").count() == turns
        assert set(await visit.page.locator(".answer .prose").all_inner_texts()) == {TEXT}
        assert visit.problems == []


async def test_a_conversation_at_a_terminal_goes_on_though_the_core_is_killed(running: Running) -> None:
    async with terminal(running.started.home, "--session", "talk") as screen:
        place = await screen.until("Ctrl-D leaves")
        for number in range(3):
            screen.type(f"Tell me {number}\r")
            place = await screen.until("word20", after=place)
            running.kill("core")
            place = await screen.until("word49\r\n", after=place)
        screen.type("/quit\r")
        async with asyncio.timeout(10):
            assert await screen.process.wait() == 0
    assert screen.shown.count("word40") == 3  # the same words once more are not shown twice
    async with MoltBot(running.started.told()["grpc"], running.key) as bot:
        kept = ["".join(part.text for part in said.parts) async for said in bot.messages("talk")]
    assert kept == ["Tell me 0", TEXT, "Tell me 1", TEXT, "Tell me 2", TEXT]
