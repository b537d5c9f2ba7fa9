"""Measures how a model runs best on this machine: replicas, threads, rows of a batch, number type.

Run as `python -m moltbot_server.models.measuring`, a process of its own with `tuning.ENVIRONMENT`: how threads wait for
each other is settled when it starts. Its standard input is a `Plan`, its standard output lines of JSON: how far it is
(`done` from 0 to 1, and `what`), and last an `Outcome`.

What is measured is the local engine as it serves: streams that each ask for the next answer when the last has ended,
read by an event loop, with the work of a server beside it (`measuring_load`).
"""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path

import ctranslate2
import msgspec
import uvloop

from moltbot_server.errors import ModelNotLoadable, ModelUnavailable, MoltBotError
from moltbot_server.models.cpus import usable_cores, usable_cpus
from moltbot_server.models.engines.local import LocalEngine
from moltbot_server.models.folder import ModelFolder, read_folder
from moltbot_server.models.measuring_load import Beside, Questions, run_streams
from moltbot_server.models.measuring_plan import STREAMS, Outcome, Plan, Trial
from moltbot_server.models.memory import available_memory, check_room
from moltbot_server.models.replica.nursery import Nursery
from moltbot_server.models.tuning import Tuning, default_tuning

_PROMPT, _NEW, _FEW = 128, 64, 8
_LONGEST_FEW = 0.5  # seconds for a prompt and `_FEW` tokens; slower models are asked for less
_SHORTEST_SLICE, _LONGEST_SLICE = 0.5, 10.0
_QUICK_SLICE, _QUICK_ROUNDS = 0.08, 2
_MOMENT = 0.02
_BATCHES = (4, 16)
_TYPES = ("int8", "int16", "float32")  # of those that differ on a CPU; `default` is tried anyway
_LARGER = {"float32": 4, "int16": 2}  # than weights of 8 bits
_BETTER, _CLEARLY = 1.03, 1.1
"""How much better than the default another tuning must be, measured thoroughly and quickly: less may be chance."""

Progress = Callable[[float, str], None]


def layouts(cores: int, default: Tuning) -> list[Tuning]:
    """Return how replicas and threads may share so many cores: the default first, then from many replicas to few."""
    found = {(1, 1)}
    for share in {cores, max(1, cores - 1), max(1, cores // 2)}:
        found |= {(min(STREAMS, share // threads), threads) for threads in (1, 2, 4, 8, 16) if threads <= share}
        found |= {(replicas, share // replicas) for replicas in (1, 2, 4) if replicas <= share}
    ordered = sorted(found - {(default.replicas, default.threads)}, key=lambda pair: (pair[1], -pair[0]))
    return [default, *(msgspec.structs.replace(default, replicas=r, threads=t) for r, t in ordered)]


async def measure(folder: ModelFolder, *, quick: bool = False, progress: Progress = lambda done, what: None) -> Outcome:
    """Try how a model runs best here: thoroughly, or within two seconds for a model as small as the built-in one.

    Raises:
        ModelUnavailable, ModelNotLoadable: the model cannot be loaded.
    """
    default = default_tuning(usable_cpus(), _weights(folder), usable_cores())
    nursery = Nursery() if Nursery.possible() else None  # as the engine's process has it
    try:
        async with Beside() as beside:
            bench = _Bench(folder, beside, progress, nursery)
            await bench.prepare(default)
            trials = await (bench.quickly(default) if quick else bench.thoroughly(default))
    finally:
        if nursery is not None:
            nursery.close()
    questions = bench.questions
    return Outcome(
        best=trials[0].tuning,
        trials=tuple(trials),
        notes=tuple(bench.notes),
        prompt_tokens=questions.prompt,
        new_tokens=questions.new,
    )


def better_first(trials: Sequence[Trial], by: float) -> list[Trial]:
    """Return trials with the best one first; the one that was first stays so unless another is better by a factor."""
    ordered = sorted(trials, key=lambda trial: -trial.score)
    if ordered[0].score < trials[0].score * by:
        ordered.remove(trials[0])
        ordered.insert(0, trials[0])
    return ordered


class _Bench:
    """Loads a model with one tuning after the other and counts what it does."""

    def __init__(self, folder: ModelFolder, beside: Beside, progress: Progress, nursery: Nursery | None) -> None:
        self._folder = folder
        self._nursery = nursery
        self._beside = beside
        self._progress = progress
        self._seen: dict[Tuning, list[dict[str, float]]] = {}
        self._done = self._planned = 0
        self._turn = 1.0
        self.questions = Questions(prompt=1, words=1, new=1)
        self.notes: list[str] = []

    async def prepare(self, tuning: Tuning) -> None:
        """See how long an answer takes, and ask for less where that would be too long."""
        self._progress(0.0, "loading")
        async with self._loaded(tuning) as engine:
            room = engine.capabilities.context_length
            prompt, new = min(_PROMPT, room // 4), min(_NEW, room // 4)
            slow = await self._alone(engine, Questions.of(engine, prompt, _FEW)) / _LONGEST_FEW
            if slow > 1:
                prompt, new = max(16, int(prompt / slow)), max(_FEW, int(new / slow))
            self.questions = Questions.of(engine, prompt, new)
            self._turn = await self._alone(engine, self.questions)

    async def _alone(self, engine: LocalEngine, questions: Questions) -> float:
        """Return how many seconds an answer takes."""
        counted = await run_streams(engine, questions, self._beside, 1, _MOMENT)
        return float(counted["whole_ms"]["p50"]) / 1000

    async def quickly(self, default: Tuning) -> list[Trial]:
        """Try the default and its neighbours in turns, and one at a time: there is a MoltBot beside it."""
        cores = usable_cores()
        near = [replicas for replicas in (default.replicas - 1, default.replicas + 1) if 1 <= replicas <= cores]
        tried = [default, *(msgspec.structs.replace(default, replicas=replicas) for replicas in near)]
        self._planned = len(tried) * _QUICK_ROUNDS
        for tuning in tried * _QUICK_ROUNDS:
            async with self._loaded(tuning) as engine:
                await self._count(tuning, engine, _QUICK_SLICE, lone=False)
        return better_first(self._trials(tried), _CLEARLY)

    async def thoroughly(self, default: Tuning) -> list[Trial]:
        """Try how replicas share the cores; then, next to the best of that, other batches and number types."""
        supported = ctranslate2.get_supported_compute_types("cpu")
        types = [name for name in _TYPES if name in supported]
        tried = layouts(usable_cores(), default)
        self._planned = 2 * (len(tried) + 1 + len(_BATCHES) + len(types))
        laid_out = better_first(await self._try(tried), _BETTER)
        best = laid_out[0].tuning
        more = [msgspec.structs.replace(best, batch=batch) for batch in _BATCHES]
        more += [msgspec.structs.replace(best, compute_type=name) for name in types]
        # The best one is counted anew: what was counted minutes ago may have been counted on a busier machine.
        return better_first(await self._try([best, *more]), _BETTER) + laid_out[1:]

    async def _try(self, tunings: Sequence[Tuning]) -> list[Trial]:
        """Count each twice, the second time in the opposite order: a machine's mood changes slowly."""
        self._seen.clear()
        seconds = min(_LONGEST_SLICE, max(_SHORTEST_SLICE, 2 * self._turn))
        for tuning in [*tunings, *reversed(tunings)]:
            try:
                check_room(
                    self._folder.id, _weights(self._folder) * _LARGER.get(tuning.compute_type, 1), available_memory()
                )
                async with self._loaded(tuning) as engine:
                    await self._count(tuning, engine, seconds, lone=True)
            except (ModelUnavailable, ModelNotLoadable) as problem:
                self._done += 1
                note = f"{described(tuning)}: {problem.message}"
                if note not in self.notes:
                    self.notes.append(note)
        return self._trials(tunings)

    async def _count(self, tuning: Tuning, engine: LocalEngine, seconds: float, *, lone: bool) -> None:
        self._progress(self._done / max(1, self._planned), described(tuning))
        many = await run_streams(engine, self.questions, self._beside, STREAMS, seconds)
        seen = {"tokens": many["tokens_per_second"], "first": many["first_token_ms"].get("p50", 0.0)}
        if lone:
            alone = await run_streams(engine, self.questions, self._beside, 1, max(_MOMENT, self._turn))
            seen |= {"lone": alone["tokens_per_second"], "lone_first": alone["first_token_ms"].get("p50", 0.0)}
        self._seen.setdefault(tuning, []).append(seen)
        self._done += 1

    def _trials(self, tunings: Sequence[Tuning]) -> list[Trial]:
        trials = [self._trial(tuning) for tuning in tunings if tuning in self._seen]
        if not trials:
            raise ModelNotLoadable("; ".join(self.notes))
        return trials

    def _trial(self, tuning: Tuning) -> Trial:
        seen = self._seen[tuning]

        def typical(name: str) -> float:
            return round(statistics.median(each.get(name, 0.0) for each in seen), 1)

        return Trial(
            tuning=tuning,
            tokens_per_second=typical("tokens"),
            first_token_ms=typical("first"),
            lone_tokens_per_second=typical("lone"),
            lone_first_token_ms=typical("lone_first"),
        )

    @contextlib.asynccontextmanager
    async def _loaded(self, tuning: Tuning) -> AsyncGenerator[LocalEngine, None]:
        engine = LocalEngine(self._folder, tuning=tuning, nursery=self._nursery)
        await engine.start()
        try:
            yield engine
        finally:
            await engine.close()


def described(tuning: Tuning) -> str:
    """Return a tuning in words."""
    replicas = "1 replica" if tuning.replicas == 1 else f"{tuning.replicas} replicas"
    threads = "1 thread" if tuning.threads == 1 else f"{tuning.threads} threads"
    return f"{replicas} of {threads}, batches of {tuning.batch}, {tuning.compute_type}"


def _weights(folder: ModelFolder) -> int:
    return (folder.path / "model.bin").stat().st_size


def _main() -> None:
    plan = msgspec.json.decode(sys.stdin.readline(), type=Plan)

    def tell(line: object) -> None:
        print(msgspec.json.encode(line).decode(), flush=True)

    def progress(done: float, what: str) -> None:
        tell({"done": round(done, 3), "what": what})

    try:
        tell(uvloop.run(measure(read_folder(Path(plan.folder), plan.type), quick=plan.quick, progress=progress)))
    except MoltBotError as problem:
        tell({"problem": problem.message})


if __name__ == "__main__":
    _main()
