"""A process that makes load for `moltbot bench router`: streams of an OpenAI-compatible API, or turns through gRPC.

Run as `python -m moltbot_server.bench.router_load`. Each input line is a `Job` of JSON and is answered, when all of its
calls have ended, by a list of `Asked`. A job of no `turns` and no `seconds` lasts until the next line.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Collection
from typing import Any

import msgspec
import uvloop
from grpc import aio
from moltbot.v1 import chat_pb2, chat_pb2_grpc, message_pb2

from moltbot_server.bench.router_lines import Line
from moltbot_server.turns import Value

_PATIENCE = 60.0
_AGAIN = 0.02
_TURNS_OF_A_SESSION = 5
_QUESTION = "Hello, tell me something short."


class Job(Value, frozen=True, kw_only=True):
    """Whom to ask and how often. `kind` is `http` or `grpc`, `address` HOST:PORT; `models` are asked in turns.

    Each of `streams` asks again when it was answered: until `turns` were asked together, for `seconds` after `begin`
    (`perf_counter`'s, 0 for now), or until the next line. `texts` are what may be answered, empty for anything.
    `sessions`: each question belongs to a session, of five turns. `same`: all ask the same and leave nothing to chance.
    `delays`: for each stream, how many seconds after `begin` it asks first; all at once where there are none.
    """

    kind: str
    address: str
    key: str
    models: tuple[str, ...] = ("",)
    streams: int = 16
    turns: int = 0
    seconds: float = 0.0
    begin: float = 0.0
    texts: tuple[str, ...] = ()
    sessions: bool = True
    same: bool = False
    delays: tuple[float, ...] = ()


class Asked(Value, frozen=True, kw_only=True, array_like=True):
    """What became of a turn. Times are `perf_counter`'s; `first` 0 for no word. `problem` is empty for a good one.

    Through gRPC `attempts` counts the models that were asked, and `resets` how often shown text was taken back.
    """

    sent: float
    first: float
    ended: float
    problem: str = ""
    model: str = ""
    attempts: int = 0
    resets: int = 0
    cached: bool = False


Ask = Callable[[int], Awaitable[Asked]]


class Load:
    """Makes the calls of one job after the other."""

    def __init__(self) -> None:
        self._channels: dict[str, list[aio.Channel]] = {}
        self._run = uuid.uuid4().hex[:8]
        self._numbers = itertools.count()

    async def run(self, job: Job, over: asyncio.Event) -> list[Asked]:
        """Do a job."""
        asked: list[Asked] = []
        begin = job.begin or time.perf_counter()
        end = begin + job.seconds if job.seconds else float("inf")
        left = itertools.count(1)
        await asyncio.sleep(begin - time.perf_counter())

        async def work(stream: int) -> None:
            ask, close = self._asking(job, stream)
            await asyncio.sleep(job.delays[stream] if job.delays else 0)
            try:
                while not over.is_set() and time.perf_counter() < end and (not job.turns or next(left) <= job.turns):
                    asked.append(found := await ask(stream))
                    if found.problem:
                        await asyncio.sleep(_AGAIN)  # as a person who has to ask again
            finally:
                close()

        async with asyncio.TaskGroup() as group:
            for stream in range(job.streams):
                group.create_task(work(stream))
        return asked

    async def close(self) -> None:
        """Close the connections."""
        for channel in itertools.chain(*self._channels.values()):
            await channel.close()

    def _asking(self, job: Job, stream: int) -> tuple[Ask, Callable[[], None]]:
        if job.kind == "http":
            lines = _Lines(job, self._talk)
            return lines.ask, lines.close
        channels = self._channels.get(job.address)
        if channels is None:
            options = [("grpc.use_local_subchannel_pool", 1)]
            channels = [aio.insecure_channel(job.address, options=options) for _ in range(4)]
            self._channels[job.address] = channels
        stub = chat_pb2_grpc.ChatServiceStub(channels[stream % len(channels)])
        return _Turns(job, stub, self._talk).ask, lambda: None

    def _talk(self, stream: int, number: int) -> str:
        """Return the session of a turn of a stream."""
        return f"bench-{self._run}-{stream}-{number // _TURNS_OF_A_SESSION}"


class _Lines:
    """One stream through an OpenAI-compatible API."""

    def __init__(self, job: Job, talk: Callable[[int, int], str]) -> None:
        self._job, self._talk = job, talk
        self._line: Line | None = None
        self._number = 0

    async def ask(self, stream: int) -> Asked:
        sent = time.perf_counter()
        try:
            if self._line is None or self._line.closed:
                host, _, port = self._job.address.rpartition(":")
                self._line = await Line.to(host, int(port))
            async with asyncio.timeout(_PATIENCE):
                answer = await self._line.ask(self._request(stream))
        except (OSError, TimeoutError) as error:
            self.close()
            return Asked(sent=sent, first=0.0, ended=time.perf_counter(), problem=repr(error)[:160])
        problem = answer.problem or _unexpected(answer.text, self._job.texts)
        return Asked(sent=sent, first=answer.first, ended=time.perf_counter(), problem=problem, model=answer.model)

    def close(self) -> None:
        if self._line is not None:
            self._line.close()
        self._line = None

    def _request(self, stream: int) -> bytes:
        job, number = self._job, self._number
        self._number += 1
        body = json.dumps(
            {
                "model": job.models[number % len(job.models)],
                "stream": True,
                "messages": [{"role": "user", "content": f"{_QUESTION} {number}"}],
            }
        ).encode()
        session = f"X-Session-Id: {self._talk(stream, number)}\r\n" if job.sessions else ""
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {job.address}\r\nAuthorization: Bearer {job.key}\r\n"
            f"Content-Type: application/json\r\n{session}Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


class _Turns:
    """One stream of turns through gRPC."""

    def __init__(self, job: Job, stub: Any, talk: Callable[[int, int], str]) -> None:
        self._job, self._stub, self._talk = job, stub, talk
        self._metadata = (("authorization", f"Bearer {job.key}"),)
        self._number = 0

    async def ask(self, stream: int) -> Asked:
        request = chat_pb2.StreamTurnRequest(turn=self._turn(stream))
        sent, first, resets, text = time.perf_counter(), 0.0, 0, ""
        last = chat_pb2.Event()
        try:
            async for response in self._stub.StreamTurn(request, metadata=self._metadata, timeout=_PATIENCE):
                last = response.event
                kind = last.WhichOneof("kind")
                if kind == "text_delta":
                    first = first or time.perf_counter()
                    text += last.text_delta.text
                elif kind == "reset":
                    resets += 1
                    text = last.reset.text
        except aio.AioRpcError as error:
            said = f"{error.code().name} {error.details()}"[:160]
            return Asked(sent=sent, first=first, ended=time.perf_counter(), problem=said)
        return self._ended(last, text, Asked(sent=sent, first=first, ended=time.perf_counter(), resets=resets))

    def _ended(self, last: chat_pb2.Event, text: str, asked: Asked) -> Asked:
        done = last.completed
        problem = ""
        if last.WhichOneof("kind") == "failed":
            problem = f"{last.failed.reason} {last.failed.message}"[:160]
        elif last.WhichOneof("kind") != "completed" or done.finish_reason != message_pb2.FINISH_REASON_STOP:
            problem = "the turn did not end well"
        elif text != done.text:
            problem = "what was shown is not what is kept"
        return msgspec.structs.replace(
            asked,
            problem=problem or _unexpected(text, self._job.texts),
            model=done.model.removeprefix("models/"),
            attempts=done.timings.attempts,
            cached=done.cached,
        )

    def _turn(self, stream: int) -> chat_pb2.TurnInput:
        job, number = self._job, self._number
        self._number += 1
        text = _QUESTION if job.same else f"{_QUESTION} {number}"
        model = job.models[number % len(job.models)]
        turn = chat_pb2.TurnInput(
            request_id=uuid.uuid4().hex,
            parts=[message_pb2.Part(text=text)],
            model=f"models/{model}" if model else "",
        )
        if job.sessions:
            turn.session = f"sessions/{self._talk(stream, number)}"
        if job.same:
            turn.options.temperature = 0.0
        return turn


def _unexpected(text: str, expected: Collection[str]) -> str:
    return "" if not expected or text in expected else f"an unexpected answer: {text[:100]!r}"


async def _main() -> None:
    loop = asyncio.get_running_loop()

    async def line() -> str:
        return await loop.run_in_executor(None, sys.stdin.readline)

    load = Load()
    while text := await line():
        job, over = msgspec.json.decode(text, type=Job), asyncio.Event()
        doing = asyncio.create_task(load.run(job, over))
        if not job.seconds and not job.turns:
            await line()
            over.set()
        print(msgspec.json.encode({"asked": await doing}).decode(), flush=True)
    await load.close()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is for the benchmark, which ends us
        uvloop.run(_main())
