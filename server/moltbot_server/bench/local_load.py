"""A process that streams turns from a core: so many at a time, each asked for when the one before it has ended.

Run as `python -m moltbot_server.bench.local_load`. The first input line is a plan of JSON (see `Plan`); each further
one is a number of seconds and is answered by a line of JSON: what was counted in so many seconds of steady load.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
import uuid
from typing import Any

import msgspec
import uvloop
from grpc import aio
from moltbot.v1 import chat_pb2, chat_pb2_grpc, message_pb2

from moltbot_server.bench.local_prompts import Workload
from moltbot_server.models.meter import Answer, Window
from moltbot_server.turns import Value

_CHANNELS = 4
_LONGEST = 300.0
"""Seconds after which a turn is taken for lost, and the benchmark ends instead of waiting for ever."""


class Plan(Value, frozen=True, kw_only=True):
    """Whom to ask, what, and how many at a time. The load runs for `warm` seconds before any of it counts."""

    address: str
    key: str
    workload: Workload
    streams: int
    warm: float = 1.0


class Streams:
    """Keeps turns under way. Each has a session of its own, so that its prompt is what was asked and nothing else."""

    def __init__(self, plan: Plan) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._plan = plan
        self._metadata = (("authorization", f"Bearer {plan.key}"),)
        self._channels = [aio.insecure_channel(plan.address, options=options) for _ in range(_CHANNELS)]
        self._stubs: list[Any] = [chat_pb2_grpc.ChatServiceStub(channel) for channel in self._channels]
        self._run = uuid.uuid4().hex[:8]
        self._numbers = itertools.count()
        self._stages = _Stages()
        self._asks = [plan.workload.asking(worker) for worker in range(plan.streams)]

    async def count(self, seconds: float) -> dict[str, Any]:
        """Make load and return what was counted in `seconds` of it.

        Raises:
            RuntimeError: a turn failed, or its prompt or its answer was not as long as planned.
        """
        over = asyncio.Event()
        self._stages = _Stages()
        window = Window(self._plan.streams, seconds=seconds, warm=self._plan.warm, over=over.set)

        async def work(worker: int) -> None:
            while True:
                window.ended(worker, await self._turn(worker))

        try:
            async with asyncio.TaskGroup() as group:
                workers = [group.create_task(work(worker)) for worker in range(self._plan.streams)]
                await over.wait()
                for task in workers:
                    task.cancel()
        except ExceptionGroup as failed:
            raise RuntimeError(f"a turn failed: {failed.exceptions[0]}") from failed
        return window.counted() | {"stages_ms": self._stages.means()}

    async def _turn(self, worker: int) -> Answer:
        number = next(self._numbers)
        text, limit = self._asks[worker]()
        turn = chat_pb2.TurnInput(
            session=f"sessions/bench-{self._run}-{number}",
            request_id=str(uuid.uuid4()),
            parts=[message_pb2.Part(text=text)],
            cancel_on_disconnect=True,
        )
        if limit:
            turn.options.max_output_tokens = limit
        stub = self._stubs[number % _CHANNELS]
        asked, first, event = time.perf_counter(), 0.0, chat_pb2.StreamTurnResponse().event
        call = stub.StreamTurn(chat_pb2.StreamTurnRequest(turn=turn), metadata=self._metadata, timeout=_LONGEST)
        async for response in call:
            event = response.event
            if not first and event.WhichOneof("kind") == "text_delta":
                first = time.perf_counter()
        ended = time.perf_counter()
        if event.WhichOneof("kind") != "completed":
            raise RuntimeError(f"a turn ended with {event}")
        self._check(event.completed.usage, limit)
        self._stages.take(event.completed.timings)
        return Answer(asked, first or ended, ended, event.completed.usage.output_tokens)

    def _check(self, usage: message_pb2.Usage, limit: int) -> None:
        """Refuse to measure something else than was planned."""
        load = self._plan.workload
        if limit and (usage.output_tokens != limit or not load.shortest <= usage.input_tokens <= load.longest):
            raise RuntimeError(f"a turn of {limit} new tokens after {load.shortest} to {load.longest} took {usage}")

    async def close(self) -> None:
        """Close the channels."""
        for channel in self._channels:
            await channel.close()


class _Stages:
    """Where the time of turns went, by what the core says of each."""

    def __init__(self) -> None:
        self._sums = dict.fromkeys(("accept", "queue", "first_token", "generation", "total"), 0.0)
        self._turns = 0

    def take(self, timings: chat_pb2.Timings) -> None:
        """Take in a turn's."""
        self._turns += 1
        for stage in self._sums:
            took = getattr(timings, stage)
            self._sums[stage] += took.seconds * 1e3 + took.nanos / 1e6

    def means(self) -> dict[str, float]:
        """Return the mean of each stage in milliseconds."""
        return {stage: round(taken / max(1, self._turns), 2) for stage, taken in self._sums.items()}


async def _main() -> None:
    loop = asyncio.get_running_loop()
    # Not an argument: those can be read by everybody on the machine, and the plan holds a key.
    plan = await loop.run_in_executor(None, sys.stdin.readline)
    streams = Streams(msgspec.json.decode(plan, type=Plan))
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(await streams.count(float(line))), flush=True)
    await streams.close()


if __name__ == "__main__":
    uvloop.run(_main())
