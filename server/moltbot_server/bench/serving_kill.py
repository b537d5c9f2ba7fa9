"""The scenario of an engine that dies: `kill -9` under load, and what the turns and the sessions feel of it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import grpc
from moltbot.v1 import chat_pb2, chat_pb2_grpc, message_pb2

from moltbot_server.bench.installation import Installation, started, step_aside
from moltbot_server.bench.serving_calls import Ended
from moltbot_server.bench.serving_crowd import Crowd, bar, failures, good, missing_messages, times
from moltbot_server.bench.serving_load import Job

_ON_ITS_WAY = 0.1
"""Seconds in which what the dead engine had written before may still arrive."""
_BACK_WITHIN = 60.0
_WARM = 2.0


def bench_kill(
    *, kills: int, every: float, streams: int, cpus: set[int] | None, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Return how soon turns are answered again after the engine was killed, `every` seconds, and what was lost."""
    with started(cpus=cpus) as installation, contextlib.ExitStack() as stack:
        step_aside(cpus)
        crowd = Crowd(stack, installation, processes=1)
        begin = crowd.begin(Job(streams=streams))
        time.sleep(max(0.0, begin + _WARM - time.perf_counter()))
        killed: list[float] = []
        engine = 0
        for number in range(kills):
            engine = _another(installation, engine)
            progress(f"kill {number + 1} of {kills}")
            killed.append(time.perf_counter())
            os.kill(engine, signal.SIGKILL)
            time.sleep(every)
        haul = crowd.end()
        missing = missing_messages(installation, haul.sessions, most=1000)
    return _report(haul.ended, killed, missing) | {"streams": streams, "every_s": every, "sessions": len(haul.sessions)}


def _report(calls: list[Ended], killed: list[float], missing: int) -> dict[str, Any]:
    lost = [call for call in calls if call.status != "OK"]
    unstarted = [call for call in lost if not call.first]
    back = [_back(calls, at) for at in killed]
    slowest = None if None in back else max(at for at in back if at is not None)
    forgotten = sum(call.forgotten > 0 for call in calls)
    return {
        "bars": {
            "slowest_next_answer_s": bar(slowest, "<=", 3),
            "failed_before_they_streamed": bar(len(unstarted), "<=", 0),
            "turns_that_miss_history": bar(forgotten, "<=", 0),
            "missing_messages": bar(missing, "<=", 0),
        },
        "kills": len(killed),
        "next_answer_s": back,
        "turns": len(calls),
        "answered": len(calls) - len(lost),
        "failed_before_they_streamed": failures(unstarted),
        "cut_while_they_streamed": failures(call for call in lost if call.first),
        "turns_that_miss_history": forgotten,
        "missing_messages": missing,
        **times(good(calls)),
    }


def _back(calls: list[Ended], killed: float) -> float | None:
    """Return how many seconds after a kill an answer began that was then completed, None for never."""
    begun = [call.first for call in good(calls) if call.first > killed + _ON_ITS_WAY]
    return round(min(begun) - killed, 3) if begun else None


def _another(installation: Installation, before: int) -> int:
    """Wait until an engine that is not the one before has answered; return its process id.

    Raises:
        RuntimeError: there is none within a minute.
    """
    until = time.perf_counter() + _BACK_WITHIN
    turn = chat_pb2.TurnInput(parts=[message_pb2.Part(text="hello")])
    with grpc.insecure_channel(installation.grpc) as channel:
        chat = chat_pb2_grpc.ChatServiceStub(channel)
        while time.perf_counter() < until:
            found = installation.pids().get("engine", 0)
            with contextlib.suppress(grpc.RpcError):  # it may have died again, or not be there yet
                if found and found != before:
                    metadata = (("authorization", installation.bearer),)
                    chat.RunTurn(chat_pb2.RunTurnRequest(turn=turn), metadata=metadata, timeout=_BACK_WITHIN)
                    return found
    raise RuntimeError(f"no engine answers {_BACK_WITHIN:g} s after it was killed")
