"""The scenario of answers nobody waits for any more: how soon the engine is free, and what a thousand of them leave.

How soon is measured from outside, with one replica and a random model whose steps are much longer than the way of a
message: while an answer is written another one waits; the first is cancelled, and the second's first token tells when
the row was free. What that token takes on an idle engine is taken off, and the rest is counted in decode steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import statistics
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
from grpc import aio
from moltbot.v1 import chat_pb2, chat_pb2_grpc, inference_pb2, inference_pb2_grpc, message_pb2

from moltbot_server.bench.installation import Installation, spread, started, step_aside
from moltbot_server.bench.random_model import random_model, words
from moltbot_server.bench.serving_crowd import bar

_LONG, _SHORT = 160, 2
_CANCEL_AT = 3
_TOGETHER = 16
_WARM = 100
_PAIRS = 100
_WAYS = ("cancel_turn", "dropped_call")


def bench_cancel(
    *, cancels: int, cpus: set[int] | None, progress: Callable[[str], None], model: Path | None = None
) -> dict[str, Any]:
    """Return after how many decode steps a cancelled row is free, and what so many cancelled answers leave behind.

    `model` is the folder of one whose answers do not end by themselves.
    """
    model = model or random_model(progress=progress)
    with started(cpus=cpus, MODEL_PATH=str(model), MOLTBOT_THREADS="1") as installation:
        step_aside(cpus)
        freed = asyncio.run(_freed(installation, min(cancels, _PAIRS), progress))
        asyncio.run(_many(installation, min(cancels, _WARM)))
        memory = installation.memory()
        progress(f"{cancels} cancelled answers, {_TOGETHER} at a time")
        counted = asyncio.run(_many(installation, cancels))
        after = installation.memory()
        under_way = installation.counter("moltbot_turns_under_way")
        busy = _busy(installation)
    grown = round(after["all"] / memory["all"], 3)
    bars = {f"{way}_steps_p99": bar(freed[way]["steps"]["p99"], "<=", 2) for way in _WAYS}
    bars |= {
        "memory_growth": bar(grown, "<=", 1.05),
        "turns_under_way": bar(under_way, "<=", 0),
        "engine_busy_afterwards": bar(busy, "<=", 0.05),
        "not_cancelled": bar(counted["ended_before"] + counted["ended_otherwise"], "<=", 0),
    }
    return {
        "bars": bars,
        "model": model.name,
        **freed,
        "cancels": counted,
        "memory_mb": {"before": memory, "after": after},
    }


class Caller:
    """Begins answers and cancels them, at the core and at the engine."""

    def __init__(self, installation: Installation, core: aio.Channel, engine: aio.Channel) -> None:
        self._chat = chat_pb2_grpc.ChatServiceStub(core)
        self._engine = inference_pb2_grpc.InferenceServiceStub(engine)
        self._metadata = (("authorization", installation.bearer),)
        self._numbers = itertools.count()
        self._question = " ".join(words()[:12])

    def turn(self, tokens: int) -> Any:
        """Begin a turn in a session of its own."""
        turn = chat_pb2.TurnInput(
            session=f"sessions/cancel-{next(self._numbers)}", parts=[message_pb2.Part(text=self._question)]
        )
        turn.options.max_output_tokens = tokens
        turn.flush_interval.FromNanoseconds(0)
        return self._chat.StreamTurn(chat_pb2.StreamTurnRequest(turn=turn), metadata=self._metadata)

    def generation(self, tokens: int) -> Any:
        """Begin a generation, each token a message of its own."""
        said = message_pb2.Message(role=message_pb2.ROLE_USER, parts=[message_pb2.Part(text=self._question)])
        request = inference_pb2.GenerateRequest(prompt=inference_pb2.Prompt(messages=[said]))
        request.options.max_output_tokens = tokens
        request.flush_interval.FromNanoseconds(0)
        return self._engine.Generate(request, metadata=self._metadata)

    async def pieces(self, call: Any) -> AsyncGenerator[str, None]:
        """Yield the name of the turn, which a generation has none of, for each piece of text."""
        turn = ""
        async for response in call:
            if isinstance(response, inference_pb2.GenerateResponse):
                if response.text:
                    yield turn
            elif response.event.HasField("accepted"):
                turn = response.event.accepted.turn
            elif response.event.HasField("text_delta"):
                yield turn

    async def cancel(self, turn: str) -> bool:
        """Cancel a turn; tell whether this ended it."""
        answer = await self._chat.CancelTurn(chat_pb2.CancelTurnRequest(name=turn), metadata=self._metadata)
        return bool(answer.cancelled)

    async def first(self, call: Any) -> float:
        """Read an answer to its end; return when its first piece was there."""
        first = 0.0
        async for _ in self.pieces(call):
            first = first or time.perf_counter()
        return first


@contextlib.asynccontextmanager
async def _caller(installation: Installation) -> AsyncIterator[Caller]:
    async with aio.insecure_channel(installation.grpc) as core, aio.insecure_channel(installation.engine) as engine:
        await asyncio.gather(core.channel_ready(), engine.channel_ready())
        yield Caller(installation, core, engine)


async def _freed(installation: Installation, pairs: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """Return, for each way to cancel, after how many steps of the model the row of an answer was free."""
    waits: dict[str, list[float]] = {way: [] for way in _WAYS}
    steps: list[float] = []
    alones: list[float] = []
    async with _caller(installation) as caller:
        await caller.first(caller.generation(_LONG))
        for number in range(pairs):
            if number % 5 == 0:
                steps.append(await _step(caller))
            alones.append(await _alone(caller))
            for way in _WAYS:
                waits[way].append(await _next_after(caller, way))
        uncancelled = await _next_after(caller, "")
    step, alone = statistics.median(steps), statistics.median(alones)
    progress(f"a step takes {step * 1000:.1f} ms, a first token {alone * 1000:.1f} ms")
    found: dict[str, Any] = {"step_ms": round(step * 1000, 2), "first_token_alone_ms": spread(alones)}
    for way in _WAYS:
        taken = spread([max(0.0, wait - alone) / step / 1000 for wait in waits[way]])  # in steps, not in milliseconds
        found[way] = {"steps": taken, "next_first_token_ms": spread(waits[way])}
    return found | {"steps_without_a_cancel": round((uncancelled - alone) / step, 2)}


async def _step(caller: Caller) -> float:
    """Return how long a step takes while one answer is written."""
    at = [time.perf_counter() async for _ in caller.pieces(caller.generation(_LONG // 2))]
    return (at[-1] - at[0]) / (len(at) - 1)


async def _alone(caller: Caller) -> float:
    began = time.perf_counter()
    return await caller.first(caller.generation(_SHORT)) - began


async def _next_after(caller: Caller, way: str) -> float:
    """Return how long after a cancel an answer that waits has its first token; without a way nothing is cancelled."""
    call = caller.turn(_LONG) if way == "cancel_turn" else caller.generation(_LONG)
    waits: asyncio.Task[float] | None = None
    seen, since = 0, 0.0
    async with contextlib.aclosing(caller.pieces(call)) as pieces:
        async for turn in pieces:
            seen += 1
            if waits is None:
                waits = asyncio.create_task(caller.first(caller.generation(_SHORT)))
            if seen == _CANCEL_AT:
                since = time.perf_counter()
                if way == "dropped_call":
                    call.cancel()
                    break
                if way == "cancel_turn":
                    await caller.cancel(turn)
    if waits is None or not since:
        raise RuntimeError("an answer was over before it could be cancelled")
    return await waits - since


async def _many(installation: Installation, cancels: int) -> dict[str, int]:
    """Cancel so many answers, half of them in each way; count how that went."""
    counted = {"cancelled": 0, "dropped": 0, "ended_before": 0, "ended_otherwise": 0}
    numbers = iter(range(cancels))
    async with _caller(installation) as caller:

        async def work() -> None:
            for number in numbers:
                counted[await (_cancelled(caller) if number % 2 else _dropped(caller))] += 1

        async with asyncio.TaskGroup() as group:
            for _ in range(_TOGETHER):
                group.create_task(work())
    return counted


async def _cancelled(caller: Caller) -> str:
    seen, done, call = 0, False, caller.turn(_LONG)
    async for turn in caller.pieces(call):
        seen += 1
        if seen == _CANCEL_AT:
            done = await caller.cancel(turn)
    return "cancelled" if done else "ended_before" if seen >= _CANCEL_AT else "ended_otherwise"


async def _dropped(caller: Caller) -> str:
    seen, call = 0, caller.generation(_LONG)
    async with contextlib.aclosing(caller.pieces(call)) as pieces:
        async for _ in pieces:
            seen += 1
            if seen == _CANCEL_AT:
                return "dropped" if call.cancel() else "ended_before"
    return "ended_otherwise"


def _busy(installation: Installation) -> float:
    """Return how much of a processor the engine uses when nothing should be under way."""
    return psutil.Process(installation.pids()["engine"]).cpu_percent(interval=1.0) / 100
