"""A process that makes load for `moltbot bench serving`: turns of a core, or generations of an engine; all recorded.

Run as `python -m moltbot_server.bench.serving_load`. The first input line is a `Plan` of JSON and is answered when the
process is ready; each further one is a `Job` and is answered, when all of its calls have ended, by a `Haul`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import sys
import time
import uuid
from collections.abc import Iterator

import msgspec
import uvloop
from grpc import aio
from moltbot.v1 import chat_pb2, chat_pb2_grpc, inference_pb2, inference_pb2_grpc, message_pb2

from moltbot_server.bench.local_prompts import Ask, Workload
from moltbot_server.bench.serving_calls import Ended, Hearing, failed
from moltbot_server.turns import Value

_AGAIN = 0.05
_PATIENCE = 60.0
_FLUSH = 5_000_000  # nanoseconds: what a core asks of an engine


class Plan(Value, frozen=True, kw_only=True):
    """Whom to ask. `engine` means generations at the engine role, without it turns of a core."""

    address: str
    key: str
    engine: bool = False
    channels: int = 4
    seed: int = 0


class Job(Value, frozen=True, kw_only=True):
    """How much to ask and for how long; a job of no `seconds` lasts until the next line.

    With a `rate` calls are sent by chance, so many a second on average, whatever becomes of them (an open loop);
    without one each of `streams` asks again when it was answered. Times are in seconds; `begin` is `perf_counter`'s,
    0 for now. A session has `turns`, and `conversations` of them alternate under a rate. `deadline` 0 is a minute.
    `work` is what is asked. `askers` are those who ask an engine, each a workspace and a session; chance picks one for
    each call.
    """

    seconds: float = 0.0
    rate: float = 0.0
    streams: int = 0
    begin: float = 0.0
    deadline: float = 0.0
    turns: int = 5
    conversations: int = 1
    askers: tuple[tuple[str, str], ...] = (("", ""),)
    work: Workload = Workload()


class Haul(Value, frozen=True, kw_only=True):
    """What became of the calls of a job, and how many turns of each session were told as completed."""

    ended: list[Ended]
    sessions: dict[str, int]


class Conversation:
    """A session that is talked in: its name, how often it was asked in, and how many turns of it were completed."""

    __slots__ = ("asked", "completed", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.asked = self.completed = 0


class Load:
    """Makes the calls of one job after the other."""

    def __init__(self, plan: Plan) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._metadata = (("authorization", f"Bearer {plan.key}"),)
        self._channels = [aio.insecure_channel(plan.address, options=options) for _ in range(plan.channels)]
        self._chats = [chat_pb2_grpc.ChatServiceStub(channel) for channel in self._channels]
        self._engines = [inference_pb2_grpc.InferenceServiceStub(channel) for channel in self._channels]
        self._engine = plan.engine
        self._chance = random.Random(plan.seed)
        self._run = uuid.uuid4().hex[:8]
        self._names = itertools.count()
        self._turn = itertools.count()
        self._ended: list[Ended] = []
        self._sessions: list[Conversation] = []
        self._ask: Ask = Workload().asking(plan.seed)

    async def ready(self) -> None:
        """Wait until every channel is connected."""
        await asyncio.gather(*(channel.channel_ready() for channel in self._channels))

    async def run(self, job: Job, over: asyncio.Event) -> Haul:
        """Do a job until its time is up or `over` is set, and let every call end."""
        self._ended, self._sessions = [], []
        self._ask = job.work.asking(self._chance.randrange(1 << 30))
        begin = job.begin or time.perf_counter()
        end = begin + job.seconds if job.seconds else float("inf")
        await asyncio.sleep(begin - time.perf_counter())
        async with asyncio.TaskGroup() as group:
            if job.rate:
                await self._open(job, begin, end, over, group)
            else:
                for _ in range(job.streams):
                    group.create_task(self._closed(job, end, over))
        return Haul(ended=self._ended, sessions={talk.name: talk.completed for talk in self._sessions if talk.asked})

    async def _open(self, job: Job, due: float, end: float, over: asyncio.Event, group: asyncio.TaskGroup) -> None:
        slots = [self._talks(job) for _ in range(job.conversations)]
        for talks in itertools.cycle(slots):
            due += self._chance.expovariate(job.rate)
            if due >= end:
                return
            await asyncio.sleep(due - time.perf_counter())
            if over.is_set():
                return
            group.create_task(self._call(job, next(talks), due))

    async def _closed(self, job: Job, end: float, over: asyncio.Event) -> None:
        for talk in self._talks(job):
            if over.is_set() or time.perf_counter() >= end:
                return
            if not await self._call(job, talk, time.perf_counter()):
                await asyncio.sleep(_AGAIN)  # a client that was refused comes back a moment later

    def _talks(self, job: Job) -> Iterator[Conversation]:
        """Yield a conversation as often as it has turns, then the next one."""
        while True:
            talk = Conversation(f"sessions/bench-{self._run}-{next(self._names)}")
            self._sessions.append(talk)
            yield from itertools.repeat(talk, job.turns)

    async def _call(self, job: Job, talk: Conversation, due: float) -> bool:
        """Ask once and record what became of it; tell whether it was answered."""
        talk.asked += 1
        heard = Hearing(due=due, sent=time.perf_counter(), history=2 * talk.completed)
        within = job.deadline or _PATIENCE
        try:
            if self._engine:
                await self._generate(job, within, heard)
            else:
                await self._stream_turn(talk, within, heard)
            ended = heard.ended()
        except aio.AioRpcError as problem:
            ended = failed(heard, problem)
        talk.completed += ended.status == "OK"
        self._ended.append(ended)
        return ended.status == "OK"

    async def _stream_turn(self, talk: Conversation, within: float, heard: Hearing) -> None:
        text, most = self._ask()
        turn = chat_pb2.TurnInput(session=talk.name, request_id=str(uuid.uuid4()), parts=[message_pb2.Part(text=text)])
        if most:
            turn.options.max_output_tokens = most
        stub = self._chats[next(self._turn) % len(self._chats)]
        call = stub.StreamTurn(chat_pb2.StreamTurnRequest(turn=turn), metadata=self._metadata, timeout=within)
        async for response in call:
            heard.event(response.event)

    async def _generate(self, job: Job, within: float, heard: Hearing) -> None:
        text, most = self._ask()
        said = message_pb2.Message(role=message_pb2.ROLE_USER, parts=[message_pb2.Part(text=text)])
        workspace, session = self._chance.choice(job.askers)
        request = inference_pb2.GenerateRequest(
            prompt=inference_pb2.Prompt(messages=[said], trim=True),
            asker=inference_pb2.Asker(workspace=workspace, session=session),
        )
        if most:
            request.options.max_output_tokens = most
        request.flush_interval.FromNanoseconds(_FLUSH)
        stub = self._engines[next(self._turn) % len(self._engines)]
        async for response in stub.Generate(request, metadata=self._metadata, timeout=within):
            heard.response(response)

    async def close(self) -> None:
        """Close the channels."""
        for channel in self._channels:
            await channel.close()


async def _main() -> None:
    loop = asyncio.get_running_loop()

    async def line() -> str:
        return await loop.run_in_executor(None, sys.stdin.readline)

    # Not an argument: those can be read by everybody on the machine, and the plan holds a key.
    load = Load(msgspec.json.decode(await line(), type=Plan))
    await load.ready()
    print("{}", flush=True)
    while text := await line():
        job, over = msgspec.json.decode(text, type=Job), asyncio.Event()
        doing = asyncio.create_task(load.run(job, over))
        if not job.seconds:
            await line()
            over.set()
        print(msgspec.json.encode(await doing).decode(), flush=True)
    await load.close()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is for the benchmark, which ends us
        uvloop.run(_main())
