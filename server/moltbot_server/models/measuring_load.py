"""The load of a measurement: streams of questions to the local engine, with the work of a server beside it.

A core that serves takes processor time for every answer and every piece of one: it authenticates, stores, encodes and
writes. How a model may use the machine depends on it, so a process beside does nothing but take that time. An answer
counts as whole when that process has had its share, as a client would have it then.
"""

from __future__ import annotations

import asyncio
import random
import socket
import sys
import time
from collections import deque
from typing import Any

from moltbot_server.models.engine import Engine, Finished
from moltbot_server.models.meter import Answer, Window
from moltbot_server.turns import GenerationOptions, Message, Notice, Reset, Role, Routed, TextPart, Value

PIECE, ANSWER = 20e-6, 500e-6
"""Processor time, in seconds, that a core takes for a piece of an answer and for the rest of a turn.

Measured with the built-in model: 30 µs of the core's loop for each token, at 36 tokens a turn.
"""

_OWN_PIECE, _OWN_ANSWER = 10e-6, 300e-6
"""What the process of the engine takes beside the engine itself, on the same event loop; 28 µs a token with it."""

_TEXT = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend"
)
_WORDS = _TEXT.split()


class Questions(Value, frozen=True, kw_only=True):
    """What is asked: prompts of about `prompt` tokens, which are `words` words, answered with `new` at most."""

    prompt: int
    words: int
    new: int

    @staticmethod
    def of(engine: Engine, prompt: int, new: int) -> Questions:
        """Return questions of about so many tokens for a model that is loaded."""
        each = max(0.25, engine.count(_said(_TEXT)) / len(_WORDS))
        return Questions(prompt=prompt, words=max(1, int(prompt / each)), new=new)

    def ask(self, chance: random.Random) -> tuple[Message, ...]:
        """Return another question."""
        return (_said(" ".join(chance.choices(_WORDS, k=self.words))),)


def _said(text: str) -> Message:
    return Message(role=Role.USER, parts=(TextPart(text=text),))


async def run_streams(
    engine: Engine, questions: Questions, beside: Beside, streams: int, seconds: float
) -> dict[str, Any]:
    """Have so many streams ask for `seconds`, once all of them are under way, and return what was counted.

    Raises:
        MoltBotError: an answer broke.
    """
    over = asyncio.Event()
    window = Window(streams, seconds=seconds, over=over.set)

    async def ask(worker: int) -> None:
        chance = random.Random(worker)
        while True:
            window.ended(worker, await _Turn(beside).run(engine, questions, chance))

    async with asyncio.TaskGroup() as group:
        workers = [group.create_task(ask(worker)) for worker in range(streams)]
        ended = group.create_task(over.wait())
        await ended
        for worker in workers:
            worker.cancel()
    return window.counted()


class Beside:
    """The process beside: it hears of pieces and answers, one byte each, and takes the time that they would cost."""

    async def __aenter__(self) -> Beside:
        ours, theirs = socket.socketpair()
        with theirs:
            command = ("-S", "-c", _TAKE_TIME, str(theirs.fileno()), str(PIECE), str(ANSWER))
            self._process = await asyncio.create_subprocess_exec(sys.executable, *command, pass_fds=[theirs.fileno()])
        self._whole: deque[asyncio.Future[None]] = deque()
        self._reader, self._writer = await asyncio.open_connection(sock=ours)
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *failed: object) -> None:
        self._reading.cancel()
        await asyncio.wait({self._reading})
        self._writer.close()
        await self._writer.wait_closed()
        await self._process.wait()

    def piece(self) -> None:
        """Tell of a piece of an answer."""
        self._writer.write(b"p")

    def whole(self) -> asyncio.Future[None]:
        """Tell of the end of an answer; the future is done when a client would know of it."""
        self._writer.write(b"a")
        whole = asyncio.get_running_loop().create_future()
        self._whole.append(whole)
        return whole

    async def _read(self) -> None:
        while heard := await self._reader.read(4096):
            for _ in heard:
                whole = self._whole.popleft()
                if not whole.done():
                    whole.set_result(None)


_TAKE_TIME = """
import os, sys, time
place, piece, answer = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
while heard := os.read(place, 4096):
    for one in heard:
        end = time.perf_counter() + (piece if one == 112 else answer)
        while time.perf_counter() < end:
            pass
        if one == 97:
            os.write(place, b"a")
"""


class _Turn:
    """One answer: listens to it, and passes on what a server would have to do."""

    def __init__(self, beside: Beside) -> None:
        self._beside = beside
        self._first = 0.0
        self._ended: asyncio.Future[Finished] = asyncio.get_running_loop().create_future()

    async def run(self, engine: Engine, questions: Questions, chance: random.Random) -> Answer:
        """Ask and wait for the whole answer."""
        asked = time.perf_counter()
        options = GenerationOptions(max_output_tokens=questions.new)
        generation = engine.begin(questions.ask(chance), options, self)
        try:
            finished = await self._ended
            _take(_OWN_ANSWER)
            await self._beside.whole()
        finally:
            generation.stop()
        ended = time.perf_counter()
        return Answer(asked, self._first or ended, ended, finished.usage.output_tokens)

    def queued(self, position: int) -> None:
        """Hear of the place in the queue."""

    def thought(self, text: str) -> None:
        """Do nothing: local models do not think apart."""

    def noted(self, what: Routed | Notice | Reset) -> None:
        """Do nothing: one model is measured."""

    def wrote(self, text: str, tokens: int) -> None:
        """Hear of a piece."""
        self._first = self._first or time.perf_counter()
        _take(_OWN_PIECE)
        self._beside.piece()

    def ended(self, end: Finished | Exception) -> None:
        """Hear of the end."""
        if self._ended.done():
            return
        if isinstance(end, Exception):
            self._ended.set_exception(end)
        else:
            self._ended.set_result(end)


def _take(seconds: float) -> None:
    """Take time of the event loop, as the code of a server does."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
