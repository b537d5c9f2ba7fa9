"""Cores on one Redis that die or stand still while others forward calls to them."""

from __future__ import annotations

import asyncio
import secrets
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from core_process import CoreProcess, core_process
from moltbot import MoltBot
from moltbot.v1 import chat_pb2
from redis_process import KeepingRedis

SESSION = "sessions/s"
SLOW = "#100 pace=0.05"


@pytest.fixture
async def cores(tmp_path: Path) -> AsyncIterator[list[CoreProcess]]:
    """Three cores, each a process of its own."""
    script = tmp_path / "script.yaml"
    script.write_text("rules:\n- template: '{messages} with {text}'\n")
    async with AsyncExitStack() as running:
        redis = running.enter_context(KeepingRedis(tmp_path))
        environ = {
            "MOLTBOT_STORE_TYPE": "redis",
            "MOLTBOT_STORE_PORT": str(redis.port),
            "MOLTBOT_STORE_PREFIX": f"test-{secrets.token_hex(4)}",
            "MODEL_PATH": str(script),
        }
        begun = [await running.enter_async_context(core_process(tmp_path / "home", **environ)) for _ in range(3)]
        yield [await core.serving() for core in begun]


def bot_of(core: CoreProcess) -> MoltBot:
    """Return a client that knows of one core."""
    return MoltBot(core.address, core.metadata[0][1].removeprefix("Bearer "))


class Listener:
    """Somebody who asks something through one core, and hears the answer to its end."""

    def __init__(self, bot: MoltBot, text: str) -> None:
        self.heard = asyncio.Event()
        self.shown, self.numbers = "", list[int]()
        self.last = chat_pb2.Event()
        self.task = asyncio.create_task(self._listen(bot, text))

    async def _listen(self, bot: MoltBot, text: str) -> None:
        async for event in bot.stream_turn(text, session=SESSION, within=60):
            self.numbers.append(event.sequence)
            if event.HasField("text_delta"):
                self.shown += event.text_delta.text
            elif event.HasField("reset"):
                self.shown = event.reset.text
            if event.HasField("text_delta") or event.HasField("queued"):
                self.heard.set()
            self.last = event

    async def to_the_end(self) -> str:
        """Return the answer, which is what was shown."""
        await self.task
        assert self.numbers == sorted(set(self.numbers))
        assert self.shown == self.last.completed.text
        return self.shown


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM], ids=lambda how: how.name)
async def test_turns_that_wait_at_a_node_that_is_gone_go_on_at_another_in_their_order(
    cores: list[CoreProcess], how: signal.Signals
) -> None:
    first, second, third = cores
    async with bot_of(second) as two, bot_of(third) as three:
        async with bot_of(first) as one:
            began = Listener(one, "#3 pace=0.3")  # so that the session is at the first one
            await asyncio.wait_for(began.heard.wait(), 20)
            slow = Listener(two, SLOW)
            await asyncio.wait_for(slow.heard.wait(), 20)
            waiting = []
            for number, bot in enumerate((three, two, three)):
                waiting.append(Listener(bot, f"question {number}"))
                await asyncio.wait_for(waiting[-1].heard.wait(), 20)
            await began.to_the_end()
        await asyncio.sleep(0.5)  # the slow one has begun
        first.signal(how)
        struck = time.monotonic()
        answers = [await slow.to_the_end(), *[await listener.to_the_end() for listener in waiting]]
        assert time.monotonic() - struck < 40

        assert len(answers[0].split()) == 100
        assert answers[1:] == [f"{5 + 2 * number} with question {number}" for number in range(3)]
        said = ["".join(part.text for part in message.parts) async for message in three.messages(SESSION)]
        assert said[2::2] == [SLOW, "question 0", "question 1", "question 2"]
        assert said[3::2] == answers
    if how is signal.SIGSTOP:
        first.signal(signal.SIGCONT)
