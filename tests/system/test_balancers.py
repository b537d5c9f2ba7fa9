"""Several cores behind a real nginx and a real Envoy: chat, long silence, dead cores, rolling restarts."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import openai
import pytest
from balancers import ROOT, SILENCE, TEMPORARY, TEXT, Place, balanced, certify, program
from moltbot import Answer, MoltBot
from moltbot.v1 import chat_pb2, chat_pb2_grpc, message_pb2, session_pb2, session_pb2_grpc

KILLS = int(os.environ.get("KILLS", "4"))
TALKERS = 8
IN_A_SESSION = 3


@pytest.fixture(params=["nginx", "envoy"])
async def place(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Place]:
    """Everything, with one of the balancers in front."""
    async with balanced(request.param, tmp_path) as place:
        yield place


@pytest.mark.parametrize("name", ["nginx", "envoy"])
async def test_a_copy_with_names_of_ones_own_is_checked_as_the_readme_says(name: str, tmp_path: Path) -> None:
    path = program(name)
    certify(tmp_path / "tls")
    typed = (ROOT / "docker" / "README.md").read_text()
    (block,) = (block for block in re.findall(r"```sh\n(.*?)```", typed, re.DOTALL) if f"my-{name}" in block)
    block = block.replace("/etc/ssl/moltbot", str(tmp_path / "tls")).replace("docker/", f"{ROOT}/docker/")
    if name == "nginx":  # the one of the tests lacks the folders of an installed one
        kinds = "".join(f" {kind}_temp_path {tmp_path}/{kind};" for kind in TEMPORARY)
        block = block.replace(f"' {ROOT}", f"' -e 's#/var/log/nginx#{tmp_path}#; s#^http {{#&{kinds}#' {ROOT}")
        block = block.replace("nginx -t", f"nginx -e stderr -g 'pid {tmp_path}/nginx.pid;' -t")
    environ = {**os.environ, "PATH": f"{Path(path).parent}{os.pathsep}{os.environ['PATH']}"}
    shell = await asyncio.create_subprocess_exec(
        *("sh", "-e", "-c", block), cwd=tmp_path, env=environ, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT
    )
    said, _ = await asyncio.wait_for(shell.communicate(), 30)
    assert shell.returncode == 0, said.decode()


def secure(place: Place) -> MoltBot:
    """Return a client that speaks TLS to the balancer."""
    root = place.balancer.certificate.read_bytes()
    return MoltBot(place.balancer.secure, place.key, credentials=grpc.ssl_channel_credentials(root))


async def stream(bot: MoltBot, question: str, session: str, expected: str, *, number: int = 1) -> None:
    """Ask for a turn and make sure that what was shown is the answer, whole, and that no event came twice."""
    answer, numbers, completed = Answer(), list[int](), ""
    async for event in bot.stream_turn(question, session=session, request_id=f"{session}-{number}", within=120):
        numbers.append(event.sequence)
        assert not event.HasField("failed"), event
        completed = event.completed.text or completed
        answer.add(event)
    assert (answer.text, completed) == (expected, expected)
    assert numbers == sorted(set(numbers))


async def events(place: Place, http: aiohttp.ClientSession, question: str, session: str, *, number: int = 1) -> str:
    """Ask as a page does, come back after each break as an EventSource does, and return what was shown in the end."""
    headers = {"X-MoltBot": "1", "Origin": place.balancer.web}
    request = {"session": session, "text": question, "request_id": f"{session}-{number}"}
    shown, last = "", 0
    while True:
        again = {"Last-Event-ID": str(last)} if last else {}
        try:
            async with http.post("/api/turns", json=request, headers=headers | again) as answer:
                if answer.status >= 500:
                    raise aiohttp.ClientError(str(answer.status))
                assert answer.status == 200, await answer.text()
                frame: dict[str, str] = {}
                async for line in answer.content:
                    name, _, value = line.decode().rstrip("\n").partition(": ")
                    if name:
                        frame[name] = value
                    elif "data" in frame:
                        last, told = int(frame.get("id", last)), json.loads(frame["data"])
                        if frame["event"] in ("text_delta", "reset"):
                            shown = told["text"] if frame["event"] == "reset" else shown + told["text"]
                        elif frame["event"] == "completed":
                            assert shown == told["text"]
                            return shown
                        assert frame["event"] != "failed", told
                        frame = {}
        except (aiohttp.ClientError, ConnectionError):
            await asyncio.sleep(random.uniform(0.1, 0.4))


async def signed_in(place: Place) -> aiohttp.ClientSession:
    """Return an HTTP client with the cookie of somebody who signed in through the balancer."""
    jar = aiohttp.CookieJar(unsafe=True)
    connector = aiohttp.TCPConnector(ssl=place.balancer.context)
    http = aiohttp.ClientSession(place.balancer.web, cookie_jar=jar, connector=connector)
    headers = {"X-MoltBot": "1", "Origin": place.balancer.web}
    async with http.post("/api/login", json={"key": place.key}, headers=headers) as answer:
        assert answer.status == 204, await answer.text()
    return http


def openai_client(place: Place) -> openai.AsyncOpenAI:
    """Return the official client, which trusts the balancer's certificate."""
    own = openai.DefaultAsyncHttpxClient(verify=place.balancer.context)
    return openai.AsyncOpenAI(base_url=f"{place.balancer.web}/v1", api_key=place.key, max_retries=0, http_client=own)


async def openai_chat(client: openai.AsyncOpenAI, question: str) -> str:
    """Ask by the OpenAI API and return the text of the stream."""
    asked: Any = {"model": "moltbot", "messages": [{"role": "user", "content": question}], "stream": True}
    chunks = await client.chat.completions.create(**asked)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])


async def test_people_chat_by_grpc_and_http_with_and_without_tls(place: Place) -> None:
    async with MoltBot(place.balancer.plain, place.key) as plain, secure(place) as encrypted:
        for name, bot in (("plain", plain), ("tls", encrypted)):
            await stream(bot, "Tell me", f"s-{name}", TEXT)
            assert (await bot.run_turn("Hi", session=f"s-{name}-once")).completed.text == "hello"
            said = ["".join(part.text for part in each.parts) async for each in bot.messages(f"s-{name}")]
            assert said == ["Tell me", TEXT]
    async with openai_client(place) as client:
        assert await openai_chat(client, "Tell me") == TEXT
    async with await signed_in(place) as http:
        assert await events(place, http, "Tell me", "s-web") == TEXT
        async with http.get("/metrics") as answer:
            assert answer.status == 404


async def test_a_model_may_be_silent_for_longer_than_thirty_seconds(place: Place) -> None:
    async with MoltBot(place.balancer.plain, place.key, resume=False) as bot, await signed_in(place) as http:
        async with asyncio.timeout(SILENCE * 2), asyncio.TaskGroup() as group:
            group.create_task(stream(bot, "Wait", "s-grpc", "at last"))
            reply = group.create_task(bot.run_turn("Wait", session="s-unary"))
            shown = group.create_task(events(place, http, "Wait", "s-web"))
        assert (reply.result().completed.text, shown.result()) == ("at last", "at last")


class Crowd:
    """People who have one turn after the other, some in each session, by all ways through the balancer."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.turns: dict[str, int] = {}
        self._over = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Crowd:
        self._bots = [MoltBot(self.place.balancer.plain, self.place.key), secure(self.place)]
        self._http = await signed_in(self.place)
        for number in range(TALKERS):
            self._tasks.append(asyncio.create_task(self._talk(f"grpc{number}")))
        for number in range(2):
            self._tasks.append(asyncio.create_task(self._talk(f"web{number}")))
        return self

    async def _talk(self, name: str) -> None:
        while not self._over.is_set():
            number = self.turns.setdefault(name, 0)
            session = f"{name}-{number // IN_A_SESSION}"
            if name.startswith("web"):
                assert await events(self.place, self._http, "Tell me", session, number=number) == TEXT
            else:
                await stream(self._bots[int(name[4:]) % 2], "Tell me", session, TEXT, number=number)
            self.turns[name] += 1

    async def go_on(self, seconds: float) -> None:
        """Let them talk; somebody who was told something wrong ends the test at once."""
        done, _ = await asyncio.wait(self._tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    async def __aexit__(self, *failed: object) -> None:
        self._over.set()
        try:
            async with asyncio.timeout(90):
                await asyncio.gather(*self._tasks)
            if not any(failed):
                await self._check()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(self._http.close(), *(bot.close() for bot in self._bots))

    async def _check(self) -> None:
        """Make sure that each session has all of its turns, one after the other, whichever core answered them."""
        for name, turns in self.turns.items():
            for first in range(0, turns, IN_A_SESSION):
                found = self._bots[0].messages(f"{name}-{first // IN_A_SESSION}")
                said = ["".join(part.text for part in each.parts) async for each in found]
                assert said == ["Tell me", TEXT] * min(IN_A_SESSION, turns - first)


async def test_people_go_on_though_cores_and_adapters_are_killed_behind_the_balancer(place: Place) -> None:
    async with Crowd(place) as crowd:
        for number in range(KILLS):
            await crowd.go_on(random.uniform(1.0, 3.0))
            killed = (place.nodes if number % 2 == 0 else place.adapters)[number // 2 % 2]
            await killed.kill()
            await crowd.go_on(random.uniform(0.0, 1.0))
            await killed.start()
            await killed.ready()
    assert min(crowd.turns.values()) >= 2, crowd.turns


def chatting(place: Place, text: str) -> Awaitable[Process]:
    """Start `moltbot chat` at the address of the balancer."""
    where = ("--workspace", str(place.setup.folder), "--address", place.balancer.plain)
    return asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "moltbot_server.cli", "chat", *where, text), stdin=DEVNULL, stdout=PIPE, stderr=PIPE
    )


async def test_a_balancer_that_reaches_no_core_says_unavailable_as_grpc_does(place: Place) -> None:
    await asyncio.gather(*(node.kill() for node in place.nodes))
    metadata = (("authorization", f"Bearer {place.key}"),)
    turn = chat_pb2.TurnInput(parts=[message_pb2.Part(text="Hi")])
    async with grpc.aio.insecure_channel(place.balancer.plain) as channel:
        chat = chat_pb2_grpc.ChatServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as unary:
            await chat.RunTurn(chat_pb2.RunTurnRequest(turn=turn), metadata=metadata, timeout=20)
        with pytest.raises(grpc.aio.AioRpcError) as streamed:
            await chat.StreamTurn(chat_pb2.StreamTurnRequest(turn=turn), metadata=metadata, timeout=20).read()
        sessions = session_pb2_grpc.SessionServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as read:
            await sessions.ListSessions(session_pb2.ListSessionsRequest(), metadata=metadata, timeout=20)
    codes = [error.value.code() for error in (unary, streamed, read)]
    assert codes == [grpc.StatusCode.UNAVAILABLE] * 3, [error.value.details() for error in (unary, streamed, read)]
    asked = await chatting(place, "Hi")
    _, why = await asyncio.wait_for(asked.communicate(), 60)
    assert (asked.returncode, b"UNAVAILABLE" in why) == (69, True), why


async def test_clients_wait_for_the_cores_when_the_balancer_reaches_none(place: Place) -> None:
    async with MoltBot(place.balancer.plain, place.key) as bot, secure(place) as encrypted:
        known = await asyncio.gather(*(each.run_turn("Hi", session="s-known") for each in (bot, encrypted)))
        assert [each.completed.text for each in known] == ["hello"] * 2
        streams = [asyncio.create_task(stream(bot, "Tell me", f"s-under-way{number}", TEXT)) for number in range(4)]
        chat = await chatting(place, "Tell me")
        assert chat.stdout is not None
        said = await asyncio.wait_for(chat.stdout.read(1), 30)  # it is in the middle of its answer, as the streams are
        await asyncio.gather(*(node.kill() for node in place.nodes))
        streams += [asyncio.create_task(stream(encrypted, "Tell me", f"s-new{number}", TEXT)) for number in range(4)]
        for node in place.nodes:
            await node.start()
        out, err = await asyncio.wait_for(chat.communicate(), 60)
        assert (chat.returncode, (said + out).decode()) == (0, f"{TEXT}\n"), err
        await asyncio.gather(*streams)


async def test_nobody_notices_that_all_cores_are_started_again_one_by_one(place: Place) -> None:
    async with Crowd(place) as crowd:
        for node in place.nodes:
            await crowd.go_on(2.0)
            assert await node.restart(place.setup.grace) == 0
        for adapter in place.adapters:
            await crowd.go_on(1.0)
            adapter.send(signal.SIGTERM, "leave")
            assert await adapter.end() == 0
            await adapter.start()
            await adapter.ready()
        await crowd.go_on(2.0)
    assert min(crowd.turns.values()) >= 2, crowd.turns
    answered = [await _turns(node) for node in place.nodes]
    assert min(answered) > 0, answered  # each has its share


async def _turns(node: Any) -> int:
    async with aiohttp.ClientSession() as http, http.get(f"http://{node.told['metrics']}/metrics") as page:
        lines = (line.split() for line in (await page.text()).splitlines())
        return sum(int(float(line[1])) for line in lines if line and line[0].startswith("moltbot_turns_total"))
