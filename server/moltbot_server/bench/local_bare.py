"""A process that runs a model with CTranslate2 and nothing else: what a MoltBot is compared with.

Run as `python -m moltbot_server.bench.local_bare`. The first input line is a plan of JSON (see `Plan`); each further
one is a `Job` and is answered by a line of JSON: what was counted in so many seconds of steady load. The prompts are
those that a core would make.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import ctranslate2
import msgspec

from moltbot_server.bench.local_prompts import Ask, Workload, message
from moltbot_server.models.folder import read_folder
from moltbot_server.models.meter import Answer, Window
from moltbot_server.models.tokenizer import Tokenizer
from moltbot_server.models.tuning import Tuning
from moltbot_server.turns import Value

_DRAWN = 4
"""How many batches' prompts are drawn together, to be sorted by length."""


class Plan(Value, frozen=True, kw_only=True):
    """Which model folder, and how it uses the machine; `tuning.batch` is of no account here."""

    folder: str
    tuning: Tuning


class Job(Value, frozen=True, kw_only=True):
    """What to count for how many seconds, the load running for `warm` seconds first, or counting at once for None.

    `way` is `sorted`: every replica writes one batch of `rows` after the other, its prompts of near length, as is
    possible where all are known from the start; `told`: the same, with a callback for each token that does nothing;
    `mixed`: the same, with prompts as they come; or `one`: `rows` requests
    are under way, each a `generate_tokens` of its own, which is how a server without batches does it.
    """

    way: Literal["sorted", "told", "mixed", "one"]
    workload: Workload
    rows: int
    seconds: float
    warm: float | None = None


class Bare:
    """A model in CTranslate2's own hands."""

    def __init__(self, plan: Plan) -> None:
        folder, tuning = read_folder(Path(plan.folder)), plan.tuning
        self._tokenizer = Tokenizer(folder)
        self._replicas = tuning.replicas
        self._ends = [*folder.template.stop, folder.eos_token]
        self._room = folder.context_length
        self._generator = ctranslate2.Generator(
            str(folder.path),
            inter_threads=tuning.replicas,
            intra_threads=tuning.threads,
            compute_type=tuning.compute_type,
            max_queued_batches=-1,
        )

    def count(self, job: Job) -> dict[str, Any]:
        """Run a job and return what was counted."""
        workers = job.rows if job.way == "one" else self._replicas
        over = threading.Event()
        window = Window(workers, seconds=job.seconds, warm=job.warm, over=over.set)
        problems: list[Exception] = []

        def work(worker: int) -> None:
            ask = job.workload.asking(worker)
            write = self._one(ask, over) if job.way == "one" else self._batches(job, ask)
            try:
                with closing(write) as answers:
                    for answer in answers:
                        window.ended(worker, answer)
                        if over.is_set():
                            return
            except Exception as problem:
                problems.append(problem)
                over.set()

        threads = [threading.Thread(target=work, args=(worker,)) for worker in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if problems:
            raise problems[0]
        return window.counted()

    def _batches(self, job: Job, ask: Ask) -> Generator[Answer, None, None]:
        """Write batch after batch, for ever."""
        callback: dict[str, Any] = {"callback": lambda step: False} if job.way == "told" else {}
        while True:
            drawn = [self._prompt(ask) for _ in range(job.rows * _DRAWN)]
            if job.way != "mixed":
                drawn.sort(key=lambda asked: len(asked[0]))
            for begin in range(0, len(drawn), job.rows):
                batch = drawn[begin : begin + job.rows]
                asked = time.perf_counter()
                results = self._generator.generate_batch(
                    [prompt for prompt, _ in batch],
                    max_length=max(limit for _, limit in batch),
                    end_token=self._ends,
                    include_prompt_in_result=False,
                    **callback,
                )
                ended = time.perf_counter()
                yield Answer(asked, ended, ended, sum(len(result.sequences_ids[0]) for result in results))

    def _one(self, ask: Ask, over: threading.Event) -> Generator[Answer, None, None]:
        """Write answer after answer, token by token, for ever."""
        while True:
            prompt, limit = self._prompt(ask)
            asked, first, tokens = time.perf_counter(), 0.0, 0
            steps = self._generator.generate_tokens(prompt, max_length=limit, end_token=self._ends)
            for step in steps:
                first = first or time.perf_counter()
                tokens += step.token not in self._ends
                if over.is_set():
                    break
            steps.close()
            yield Answer(asked, first, time.perf_counter(), tokens)

    def _prompt(self, ask: Ask) -> tuple[list[str], int]:
        text, limit = ask()
        prompt = self._tokenizer.prompt((message(text),))
        return prompt, limit or self._room - len(prompt)


def _main() -> None:
    bare = Bare(msgspec.json.decode(sys.stdin.readline(), type=Plan))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(bare.count(msgspec.json.decode(line, type=Job))), flush=True)


if __name__ == "__main__":
    _main()
