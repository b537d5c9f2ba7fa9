"""`moltbot bench local`: how much of CTranslate2's own speed reaches the clients of a MoltBot, and how soon.

A MoltBot runs as `moltbot start` runs it; a process of its own streams turns from it through gRPC. Beside it
CTranslate2 runs alone in a process of its own, with the same replicas and threads: batch after batch of prompts that
are all known beforehand (the ceiling), or one `generate_tokens` for each request (what a server without batches does).
Slices of them alternate, so that a machine's mood falls on all of them; each round gives a ratio. Reported is the
median, with the lowest and the highest.
"""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec

from moltbot_server.bench.core import machine
from moltbot_server.bench.local_llama import Llama, LlamaServer
from moltbot_server.bench.local_prompts import Workload
from moltbot_server.bench.local_rig import Counted, Rig, undisturbed
from moltbot_server.bench.random_model import random_model
from moltbot_server.demo_model import ARTIFACT
from moltbot_server.models.tuning import Tuning, tuning_for
from moltbot_server.turns import Value
from moltbot_server.workspace import find_workspace

STREAMS, MANY = 16, 64
WORDS = Workload(shortest=128, longest=128, new=64)
RAGGED = Workload(shortest=16, longest=512, new=64)
EQUAL = Workload(shortest=264, longest=264, new=64)
QUESTIONS = Workload()
_ROWS = (4, 6, 8, 12, 16, 32)
"""Sizes of batches among which the best is looked for; beyond them throughput falls."""
_SEARCH = 0.15  # the share of a scene's time that the search takes

Progress = Callable[[float, str], None]
"""Hears which share of the benchmark is done, and what is measured now."""
Slice = Callable[[float], Counted]


class Figure(Value, frozen=True, kw_only=True):
    """A ratio of two slices of one scene: of their tokens a second, or of how soon the first token is there."""

    scene: str
    of: str
    to: str
    bar: float
    what: str
    sooner: bool = False

    def ratio(self, slices: dict[str, Counted]) -> float:
        """Return the figure of one round."""
        ours, theirs = slices[self.of], slices[self.to]
        if self.sooner:
            return float(theirs["first_token_ms"]["p50"] / ours["first_token_ms"]["p50"])
        return float(ours["tokens_per_second"] / theirs["tokens_per_second"])


FIGURES = {
    "ceiling_ratio": Figure(
        scene="random", of="streamed", to="ceiling", bar=0.95, what="of what CTranslate2 writes alone in full batches"
    ),
    "backlog_ratio": Figure(
        scene="random", of="streamed", to="backlog", bar=0, what="of the same in batches that 16 streams cannot fill"
    ),
    "naive_ratio": Figure(
        scene="random", of="streamed", to="naive", bar=3, what="times the tokens of one stream for each request"
    ),
    "naive_ttft_ratio": Figure(
        scene="random", of="streamed", to="naive", bar=5, what="times sooner than with one stream", sooner=True
    ),
    "builtin_ceiling_ratio": Figure(
        scene="builtin", of="streamed", to="ceiling", bar=0.8, what="of CTranslate2 alone, with the built-in model"
    ),
    "builtin_told_ratio": Figure(
        scene="builtin", of="streamed", to="told", bar=0, what="of the same with an empty callback for each token"
    ),
    "ragged_ratio": Figure(
        scene="ragged", of="ragged", to="mixed", bar=2, what="times the tokens of batches of any lengths"
    ),
    "ragged_equal_ratio": Figure(
        scene="ragged", of="ragged", to="equal", bar=0.5, what="of the tokens of prompts of equal lengths"
    ),
    "llama_ratio": Figure(
        scene="random", of="streamed", to="llama", bar=1.3, what="times the tokens of llama.cpp's server"
    ),
    "llama_ttft_ratio": Figure(
        scene="random", of="streamed", to="llama", bar=3, what="times sooner than llama.cpp's server", sooner=True
    ),
}


def bench_local(
    *,
    only: Collection[str] = (),
    rounds: int = 5,
    seconds: float = 6.0,
    form: str = "",
    llama: Llama | None = None,
    patience: int = 0,
    progress: Progress = lambda done, what: None,
) -> dict[str, Any]:
    """Run the benchmark and return its figures: `rounds` rounds, slices of about `seconds`.

    `only` names figures, none for all; those of llama.cpp's server are measured where there is one. `form` is how the
    models run, see `local_rig.Rig`. A slice that others disturbed is repeated up to `patience` times, see
    `local_rig.undisturbed`.
    """
    wanted = {
        name: figure
        for name, figure in FIGURES.items()
        if (llama is not None if figure.to == "llama" else name in (only or FIGURES))
    }
    scenes = list(dict.fromkeys(figure.scene for figure in wanted.values()))
    report: dict[str, Any] = {
        "machine": machine() | {"load_before": [round(load, 2) for load in os.getloadavg()]},
        "form": form or "process",
        "rounds": rounds,
        "seconds": seconds,
        "scenes": {},
    }
    for number, scene in enumerate(scenes):

        def tell(done: float, what: str, number: int = number, scene: str = scene) -> None:
            progress((number + done) / len(scenes), f"{scene}: {what}")

        tuning, found = _scene(scene, wanted, rounds, seconds, form, llama, patience, tell)
        for name, figure in wanted.items():
            if figure.scene == scene:
                summary = _summary(figure, found)
                report[name], report[name.replace("ratio", "detail")] = summary.pop("median"), summary
        report["scenes"][scene] = {
            "tuning": msgspec.to_builtins(tuning),
            "slices": _typical(found),
            "rounds": found,
        }
    return report


def _scene(
    scene: str,
    wanted: Mapping[str, Figure],
    rounds: int,
    seconds: float,
    form: str,
    llama: Llama | None,
    patience: int,
    tell: Progress,
) -> tuple[Tuning, list[dict[str, Counted]]]:
    """Run the rounds of one scene with the tuning that a start would use here."""
    tell(0.0, "starting")
    folder = ARTIFACT if scene == "builtin" else random_model()
    tuning = tuning_for(find_workspace(os.environ), folder)
    needed = {name for figure in wanted.values() if figure.scene == scene for name in (figure.of, figure.to)}
    with contextlib.ExitStack() as stack:
        rig = Rig(stack, folder, tuning, form)
        other = LlamaServer(stack, llama) if llama is not None and "llama" in needed else None
        return tuning, _Stage(rig, tuning, seconds, other, patience).run(scene, needed, rounds, tell)


class _Stage:
    """Runs the slices of one scene in turns."""

    def __init__(self, rig: Rig, tuning: Tuning, seconds: float, llama: LlamaServer | None, patience: int) -> None:
        self._rig = rig
        self._patience = patience
        self._replicas = tuning.replicas
        self._seconds = seconds
        self._llama = llama

    def run(self, scene: str, needed: Collection[str], rounds: int, tell: Progress) -> list[dict[str, Counted]]:
        """Return what each slice of each round counted; every other round goes the other way."""
        slices = {name: slice_ for name, slice_ in self._slices(scene, needed, tell).items() if name in needed}
        seconds = self._seconds * (2 if scene == "ragged" else 1)
        done: list[dict[str, Counted]] = []
        for number in range(rounds):
            counted: dict[str, Counted] = {}
            for name in list(slices) if number % 2 == 0 else reversed(list(slices)):
                share = (number + len(counted) / len(slices)) / rounds
                tell(_SEARCH + (1 - _SEARCH) * share, f"{name}, round {number + 1} of {rounds}")
                counted[name] = undisturbed(partial(slices[name], seconds), self._patience)
            done.append(counted)
        return done

    def _slices(self, scene: str, needed: Collection[str], tell: Progress) -> dict[str, Slice]:
        rig, replicas = self._rig, self._replicas
        if scene == "ragged":
            return {
                "ragged": lambda seconds: rig.streamed(RAGGED, MANY, seconds),
                "mixed": lambda seconds: rig.bare("mixed", RAGGED, MANY // replicas, seconds),
                "equal": lambda seconds: rig.streamed(EQUAL, MANY, seconds),
            }
        asked = QUESTIONS if scene == "builtin" else WORDS
        full = [rows for rows in _ROWS if rows < STREAMS / replicas] + [-(-STREAMS // replicas)]
        speeds = self._search(asked, sorted({*full, *(_ROWS if "backlog" in needed else ())}), tell)
        fit, best = max(full, key=speeds.__getitem__), max(speeds, key=speeds.__getitem__)
        return {
            "streamed": lambda seconds: rig.streamed(asked, STREAMS, seconds),
            "ceiling": lambda seconds: rig.bare("sorted", asked, fit, seconds),
            "told": lambda seconds: rig.bare("told", asked, fit, seconds),
            "naive": lambda seconds: rig.bare("one", asked, STREAMS, seconds),
            "backlog": lambda seconds: rig.bare("sorted", asked, best, seconds),
            "llama": lambda seconds: self._llama_slice(seconds),
        }

    def _search(self, asked: Workload, sizes: Sequence[int], tell: Progress) -> dict[int, float]:
        """Return what CTranslate2 writes alone with batches of these sizes, in tokens a second."""
        speeds = {}
        for number, rows in enumerate(sizes):
            tell(_SEARCH * number / len(sizes), f"CTranslate2 alone, batches of {rows}")
            speeds[rows] = self._rig.bare("sorted", asked, rows, self._seconds / 2)["tokens_per_second"]
        return speeds

    def _llama_slice(self, seconds: float) -> Counted:
        assert self._llama is not None
        return self._llama.streamed(STREAMS, seconds)


def _summary(figure: Figure, rounds: Sequence[dict[str, Counted]]) -> dict[str, Any]:
    ratios = [figure.ratio(slices) for slices in rounds]
    return {
        "median": round(statistics.median(ratios), 3),
        "lowest": round(min(ratios), 3),
        "highest": round(max(ratios), 3),
        "bar": figure.bar,
        "what": figure.what,
    }


def _typical(rounds: Sequence[dict[str, Counted]]) -> dict[str, dict[str, float]]:
    """Return the median of each slice's figures."""
    typical = {}
    for name in rounds[0]:
        counted = [slices[name] for slices in rounds]
        firsts = [each["first_token_ms"].get("p50", 0.0) for each in counted]
        typical[name] = {
            "tokens_per_second": round(statistics.median(each["tokens_per_second"] for each in counted), 1),
            "others": round(statistics.median(each["processors"]["others"] for each in counted), 2),
            "first_token_ms": round(statistics.median(firsts), 2),
        }
    return typical
