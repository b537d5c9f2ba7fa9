"""A take-over whose answer is lost: Redis has made the turns this core's, and the core does not know of them yet."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from moltbot import MoltBot
from moltbot_server.config import Storage
from moltbot_server.errors import MoltBotError
from moltbot_server.store.protocol import NewTurn, Orphan
from moltbot_server.store.redis import RedisStore
from moltbot_server.store.redis_scripts import scripts
from moltbot_server.testing import Rule, RunningServer, Script, running_server
from moltbot_server.turn_checks import digest_of
from moltbot_server.turns import SessionKey, TextPart, TurnInput, TurnKey
from redis_process import RedisProcess
from rpc_calls import WatchedEngine

SESSION = "sessions/s"
MARK = scripts()["take_over"].digest.encode()


class LossyLine:
    """Carries connections to Redis. While it `loses`, one that asked for a take-over is cut when Redis has answered."""

    def __init__(self, port: int) -> None:
        self.port = 0
        self.loses = False
        self.lost = asyncio.Event()
        self._target = port
        self._tasks: set[asyncio.Task[None]] = set()

    def taken(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one connection."""
        task = asyncio.create_task(self._carry(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        away, back = await asyncio.open_connection("127.0.0.1", self._target)
        asked = False

        async def there() -> None:
            nonlocal asked
            while data := await reader.read(65536):
                asked = asked or (self.loses and b"EVALSHA" in data and MARK in data)
                back.write(data)
            back.close()

        async def here() -> None:
            while data := await away.read(65536):
                if asked:
                    self.lost.set()
                    writer.transport.abort()
                    back.transport.abort()
                    return
                writer.write(data)
            writer.close()

        try:
            await asyncio.gather(there(), here(), return_exceptions=True)
        finally:
            writer.close()
            back.close()

    async def end(self) -> None:
        """Cut what is left."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def lossy_line(port: int) -> AsyncGenerator[LossyLine, None]:
    """Lay a line to a Redis."""
    line = LossyLine(port)
    server = await asyncio.start_server(line.taken, "127.0.0.1", 0)
    line.port = server.sockets[0].getsockname()[1]
    try:
        yield line
    finally:
        server.close()
        await line.end()


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[RedisProcess]:
    """A Redis of the test's own, that writes down all that it is given."""
    async with RedisProcess.keeping(tmp_path) as process:
        yield process


async def leave_running(store: RedisStore, text: str, *, request: str) -> None:
    """Have a turn in the session `s` that a node accepted which is gone then."""
    key = SessionKey(workspace="default", session="s")
    asked = TurnInput(parts=(TextPart(text=text),), session="s", request_id=request)
    accepted = await store.accept(
        NewTurn(
            key=TurnKey(session=key, ordinal=1),
            request_id=request,
            digest=digest_of(asked),
            create_time=time.time(),
            question=asked.parts,
            rest=asked,
            opens_session=True,
        )
    )
    assert accepted is None
    await store.close()


def count_failures(core: RunningServer, monkeypatch: pytest.MonkeyPatch) -> asyncio.Semaphore:
    """Return what is released by each take-over that fails."""
    ask, failures = core.core.store.take_over, asyncio.Semaphore(0)

    async def take_over() -> Sequence[Orphan]:
        try:
            return await ask()
        except MoltBotError:
            failures.release()
            raise

    monkeypatch.setattr(core.core.store, "take_over", take_over)
    return failures


async def answer(bot: MoltBot, text: str, request: str) -> str:
    """Return what is answered to a question, however often it has to be asked."""
    shown = ""
    async for event in bot.stream_turn(text, session=SESSION, request_id=request, within=60):
        if event.HasField("completed"):
            shown = event.completed.text
    return shown


@pytest.mark.parametrize("asks", ["another", "the same"])
async def test_turns_come_behind_those_whose_takeover_was_not_heard_of(
    tmp_path: Path, redis: RedisProcess, monkeypatch: pytest.MonkeyPatch, asks: str
) -> None:
    prefix = f"test-{secrets.token_hex(4)}"
    engine = WatchedEngine(Script(rules=(Rule(template="{messages} with {text}"),)))
    async with lossy_line(redis.port) as line:
        here = Storage(type="redis", host="127.0.0.1", port=line.port, prefix=prefix)
        async with running_server(tmp_path / "home", engine=engine, store=here, grace=0.5) as server:
            failures = count_failures(server, monkeypatch)
            gone = RedisStore(host="127.0.0.1", port=redis.port, prefix=prefix)
            await gone.open()
            line.loses = True
            await leave_running(gone, "first", request="first")
            async with asyncio.timeout(40):
                await line.lost.wait()
                await failures.acquire()
                async with MoltBot(server.address, server.key) as bot:
                    name = "second" if asks == "another" else "first"
                    asked = asyncio.create_task(answer(bot, name, name))
                    await failures.acquire()
                    assert not asked.done()
                    assert engine.read == []
                    line.loses = False
                    await asked
                    await answer(bot, "third", "third")
                    said = ["".join(part.text for part in message.parts) async for message in bot.messages(SESSION)]
            wanted = ["first", "second", "third"] if asks == "another" else ["first", "third"]
            assert said[::2] == wanted
            assert said[1::2] == [f"{1 + 2 * place} with {text}" for place, text in enumerate(wanted)]
