"""A process that makes load: a fixed number of calls in flight, for as long as each command on standard input says.

Run as `python -m moltbot_server.bench.load`. The first input line is a plan: `{"address": …, "kind": …, "key": …,
"in_flight": 64, "channels": 4}`. Each further one is a number of seconds and is answered by a line of JSON: calls,
messages, errors, seconds and latencies.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import uvloop
from google.protobuf.duration_pb2 import Duration
from google.protobuf.wrappers_pb2 import StringValue
from grpc import aio
from moltbot.v1 import chat_pb2, chat_pb2_grpc, message_pb2

from moltbot_server.bench.echo import MESSAGES, SERVICE

_TURNS = itertools.count()
_TURNS_IN_A_SESSION = 10
_QUESTION = "hello"
_MANY = f"#{MESSAGES}"  # the scripted engine's word for so many deltas

OneCall = Callable[[int], Awaitable[int]]


def _turn(worker: int, run: str, text: str, **fields: Any) -> chat_pb2.TurnInput:
    return chat_pb2.TurnInput(
        session=f"sessions/bench-{run}-{worker}-{next(_TURNS) // (_TURNS_IN_A_SESSION * 64)}",
        request_id=str(uuid.uuid4()),
        parts=[message_pb2.Part(text=text)],
        **fields,
    )


def _echo_unary(channel: aio.Channel, metadata: Any, run: str) -> OneCall:
    method = channel.unary_unary(
        f"/{SERVICE}/Unary",
        request_serializer=StringValue.SerializeToString,
        response_deserializer=StringValue.FromString,
    )

    async def call(worker: int) -> int:
        await method(StringValue(value="hello"))
        return 1

    return call


def _echo_stream(channel: aio.Channel, metadata: Any, run: str) -> OneCall:
    method = channel.unary_stream(
        f"/{SERVICE}/Stream",
        request_serializer=StringValue.SerializeToString,
        response_deserializer=StringValue.FromString,
    )

    async def call(worker: int) -> int:
        messages = 0
        async for _ in method(StringValue(value="hello")):
            messages += 1
        return messages

    return call


def _run_turn(channel: aio.Channel, metadata: Any, run: str) -> OneCall:
    stub: Any = chat_pb2_grpc.ChatServiceStub(channel)

    async def call(worker: int) -> int:
        await stub.RunTurn(chat_pb2.RunTurnRequest(turn=_turn(worker, run, _QUESTION)), metadata=metadata)
        return 1

    return call


def _stream_turn(flush: Duration | None) -> Callable[[aio.Channel, Any, str], OneCall]:
    def make(channel: aio.Channel, metadata: Any, run: str) -> OneCall:
        stub: Any = chat_pb2_grpc.ChatServiceStub(channel)

        async def call(worker: int) -> int:
            messages = 0
            request = chat_pb2.StreamTurnRequest(turn=_turn(worker, run, _MANY, flush_interval=flush))
            async for response in stub.StreamTurn(request, metadata=metadata):
                messages += 1
                last = response.event
            if last.WhichOneof("kind") != "completed":
                raise RuntimeError(f"a turn ended with {last}")
            return messages

        return call

    return make


KINDS: dict[str, Callable[[aio.Channel, Any, str], OneCall]] = {
    "echo_unary": _echo_unary,
    "echo_stream": _echo_stream,
    "run_turn": _run_turn,
    "stream_turn": _stream_turn(Duration()),
    "stream_turn_coalesced": _stream_turn(None),
}


class Load:
    """Keeps calls in flight and counts those that end within a slice."""

    def __init__(self, address: str, kind: str, key: str, in_flight: int, channels: int) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        metadata = (("authorization", f"Bearer {key}"),) if key else None
        run = uuid.uuid4().hex[:8]
        self._channels = [aio.insecure_channel(address, options=options) for _ in range(channels)]
        self._calls = [KINDS[kind](channel, metadata, run) for channel in self._channels]
        self._in_flight = in_flight
        self._numbers = itertools.count()

    async def run(self, seconds: float) -> dict[str, Any]:
        """Make load for a while and return what was counted."""
        latencies: list[float] = []
        messages = errors = 0
        first_error = ""
        started = time.perf_counter()
        end = started + seconds

        async def work(worker: int) -> None:
            nonlocal messages, errors, first_error
            call = self._calls[worker % len(self._calls)]
            while (begun := time.perf_counter()) < end:
                try:
                    got = await call(worker)
                except (grpc.RpcError, RuntimeError) as error:
                    errors += 1
                    first_error = first_error or str(error)[:300]
                    continue
                now = time.perf_counter()
                if now <= end:
                    latencies.append(now - begun)
                    messages += got

        await asyncio.gather(*(work(worker) for worker in range(self._in_flight)))
        latencies.sort()
        return {
            "calls": len(latencies),
            "messages": messages,
            "errors": errors,
            "first_error": first_error,
            "seconds": seconds,
            "p50_ms": _percentile(latencies, 0.50),
            "p99_ms": _percentile(latencies, 0.99),
        }

    async def close(self) -> None:
        """Close the channels."""
        for channel in self._channels:
            await channel.close()


def _percentile(latencies: list[float], share: float) -> float:
    if not latencies:
        return 0.0
    return round(latencies[min(len(latencies) - 1, int(len(latencies) * share))] * 1000, 3)


async def _main() -> None:
    loop = asyncio.get_running_loop()
    # Not an argument: those can be read by everybody on the machine, and the plan holds a key.
    load = Load(**json.loads(await loop.run_in_executor(None, sys.stdin.readline)))
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(await load.run(float(line))), flush=True)
    await load.close()


if __name__ == "__main__":
    uvloop.run(_main())
