"""The scenario of models switched under load: load beside, switch, unload the old one, over and over; some broken."""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from moltbot.v1 import model_pb2, model_pb2_grpc

from moltbot_server.bench.installation import Installation, spread, started, step_aside
from moltbot_server.bench.serving_calls import Ended
from moltbot_server.bench.serving_crowd import Crowd, bar, failures, good, missing_messages, times
from moltbot_server.bench.serving_load import Job
from moltbot_server.demo_model import ARTIFACT

_BROKEN_EVERY = 10
_WARM, _WARM_UP = 20, 60.0
_PAUSE = 5.0


def bench_switch(
    *, switches: int, rate: float, cpus: set[int] | None, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Return what the turns of an open loop felt of so many switches, every tenth to a model that cannot be loaded."""
    with started(cpus=cpus) as installation, contextlib.ExitStack() as stack:
        step_aside(cpus)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moltbot-bench-")))
        changes = Changes(stack, installation, _damaged(folder))
        crowd = Crowd(stack, installation, processes=1)
        # The core keeps what was talked of lately: that grows with the turns, whoever answers them, up to its bounds.
        warm = Job(rate=rate, seconds=min(_WARM_UP, switches / 10), conversations=math.ceil(rate * _PAUSE))
        crowd.run(warm)
        memory = {"before": installation.memory()}
        crowd.begin(Job(rate=rate, conversations=warm.conversations))
        for number in range(switches):
            changes.change(number)
            if number + 1 == min(_WARM, max(1, switches // 2)):
                memory[f"after_{number + 1}"] = warmed = installation.memory()
            if (number + 1) % 100 == 0:
                progress(f"{number + 1} switches")
        memory["after_all"] = last = installation.memory()
        haul = crowd.end()
        memory["at_rest"] = installation.memory()
        missing = missing_messages(installation, haul.sessions)
    grown = round(last["all"] / warmed["all"], 3)
    return _report(haul.ended, changes, grown, switches) | {
        "rate": rate,
        "memory_mb": memory,
        "memory_growth": grown,
        "missing_messages": missing,
    }


def _report(calls: list[Ended], changes: Changes, grown: float, switches: int) -> dict[str, Any]:
    answered = good(calls)
    failed, mixed = len(calls) - len(answered), sum(call.mixed for call in calls)
    return {
        "bars": {
            "failed": bar(failed, "<=", 0),
            "mixed": bar(mixed, "<=", 0),
            "memory_growth": bar(grown, "<=", 1.05),
            "broken_refused": bar(changes.refused, ">=", switches // _BROKEN_EVERY),
            "broken_loaded": bar(changes.broken_loaded, "<=", 0),
            "refused_although_whole": bar(len(changes.problems), "<=", 0),
        },
        "turns": len(calls),
        "failed": failed,
        "failures": failures(calls),
        "mixed": mixed,
        "models_that_answered": len({call.model for call in answered}),
        "switched": changes.switched,
        "refused": changes.refused,
        "problems": changes.problems[:3],
        "switch_ms": spread(changes.seconds),
        **times(answered, since_due=True),
    }


class Changes:
    """Changes the model of an installation, and counts how that goes."""

    def __init__(self, stack: contextlib.ExitStack, installation: Installation, broken: Path) -> None:
        """`broken` is the folder of a model that cannot be loaded."""
        channel = stack.enter_context(grpc.insecure_channel(installation.grpc))
        self._models = model_pb2_grpc.ModelServiceStub(channel)
        self._metadata = (("authorization", installation.bearer),)
        self._broken = broken
        self._current = installation.status()["model"]
        self.switched = self.refused = self.broken_loaded = 0
        self.seconds: list[float] = []
        self.problems: list[str] = []

    def change(self, number: int) -> None:
        """Load a model, switch to it and unload the one before; every tenth is broken, and to be refused."""
        broken = number % _BROKEN_EVERY == _BROKEN_EVERY - 1
        name = f"models/bench-{number}"
        began = time.perf_counter()
        try:
            self._load(name, self._broken if broken else ARTIFACT)
        except grpc.RpcError as problem:
            self.refused += broken
            if not broken:
                self.problems.append(f"{name}: {problem}")
            return
        self.broken_loaded += broken
        try:
            self._models.SwitchModel(model_pb2.SwitchModelRequest(name=name), metadata=self._metadata)
            previous, self._current = f"models/{self._current}", name.removeprefix("models/")
            self._models.UnloadModel(model_pb2.UnloadModelRequest(name=previous), metadata=self._metadata)
        except grpc.RpcError as problem:
            self.problems.append(f"{name}: {problem}")
            return
        self.switched += 1
        self.seconds.append(time.perf_counter() - began)

    def _load(self, name: str, path: Path) -> None:
        for _ in self._models.LoadModel(model_pb2.LoadModelRequest(name=name, path=str(path)), metadata=self._metadata):
            pass


def _damaged(folder: Path) -> Path:
    """Return a copy of the built-in model that lacks the second half of its weights."""
    broken = folder / "broken"
    shutil.copytree(ARTIFACT, broken)
    weights = broken / "model.bin"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    return broken
