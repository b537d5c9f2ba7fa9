"""`moltbot model tune | bench`: what a model does on this machine."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moltbot_server.cli.model_configured import configured_as
from moltbot_server.cli.model_place import Models, told
from moltbot_server.cli.progress import Progress
from moltbot_server.cli.terminal import Exit, Failure, command, interrupted
from moltbot_server.errors import ModelUnavailable
from moltbot_server.models.building import Resources, build_engine
from moltbot_server.models.engine import Chunk, Engine, Finished, stream
from moltbot_server.models.library import KnownModel, Origin, name_of
from moltbot_server.models.sizes import readable
from moltbot_server.turns import GenerationOptions, Message, Role, TextPart

_MOST_STREAMS = 512
_WORDS = "MoltBot runs on a small machine and answers many people at the same time. Which words come next? "
_WARM_UP = 0.3  # of the time that is measured


@dataclass(slots=True)
class _Seen:
    """What streams did while it counted."""

    tokens: int = 0
    answers: int = 0
    first_tokens: list[float] = field(default_factory=list)


@told
def tune_model(given: argparse.Namespace) -> int:
    """Measure how a model runs best here and keep it; return the exit status."""
    from moltbot_server.cli.tuning import tune

    models = Models.of(given, make=True)
    model = _model(models, given.name)
    return tune(models.workspace, models.open(model), quick=given.quick, as_json=given.json)


@told
def bench_model(given: argparse.Namespace) -> int:
    """Print a model's tokens per second and first tokens; return the exit status."""
    models = Models.of(given)
    model = _model(models, given.name)
    streams = _streams(given.streams)
    if not 0.1 <= given.seconds <= 600 or not given.new >= 1 or not given.prompt >= 1:
        raise Failure("--seconds must be 0.1 to 600, --prompt and --new 1 or more.", Exit.USAGE)
    if models.core() is not None and not given.json:
        print("MoltBot runs here as well and takes its part of the processors.", file=sys.stderr)
    try:
        found = asyncio.run(_bench(models, model, streams, given))
    except KeyboardInterrupt:
        return interrupted("stopped.", as_json=given.json)
    print(json.dumps(found) if given.json else _table(found))
    return int(Exit.OK)


def _model(models: Models, name: str) -> KnownModel:
    """Return the model that a command names, which may be a folder that nobody has added."""
    path = Path(name).expanduser().absolute()
    if name and path.is_dir() and not models.library.knows(name):
        return KnownModel(name=name_of(path.name), origin=Origin.ADDED, path=str(path))
    if not name and models.elsewhere:
        raise Failure(f"name the model: which one answers is for the engine at {models.elsewhere} to say.", Exit.USAGE)
    name = name or models.at_start
    if (found := configured_as(models, name, {})) is not None:
        others = f"those are in `{command('model list', models.workspace)}`"
        raise Failure(f"{found}, and has no files here. Name a model that lies on this machine; {others}.")
    return models.find(name)


def _streams(text: str) -> list[int]:
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(1 <= count <= _MOST_STREAMS for count in found):
        expected = f"numbers such as 1,8,16, each up to {_MOST_STREAMS}"
        raise Failure(f"--streams: found {text!r}, expected {expected}.", Exit.USAGE)
    return found


async def _bench(
    models: Models, model: KnownModel, streams: Sequence[int], given: argparse.Namespace
) -> dict[str, Any]:
    """Load a model and measure it with each number of streams. Times in seconds and milliseconds as named."""
    engine = build_engine(
        model_type=model.type,
        model_path=str(models.library.path(model)),
        model_id=model.name,
        resources=Resources.of(models.settings),
    )
    if not engine.capabilities.generation:
        raise ModelUnavailable(f"{model.name} writes no answers; it only turns texts into vectors.")
    began = time.perf_counter()
    with Progress(f"Loading {model.name}", quiet=given.json) as bar:
        await engine.start()
        loaded = time.perf_counter() - began
        try:
            prompt, size = _prompt(engine, given.prompt)
            results = []
            for index, count in enumerate(streams):
                bar.reach(index / len(streams), f"{count} at once")
                results.append(await _measure(engine, prompt, count, given))
        finally:
            await engine.close()
    return {
        "model": model.name,
        "load_s": round(loaded, 3),
        "memory": engine.memory_bytes,
        "parallel": engine.parallel,
        "prompt_tokens": size,
        "new_tokens": given.new,
        "streams": results,
    }


def _prompt(engine: Engine, tokens: int) -> tuple[str, int]:
    """Return a text of about so many tokens, at most half of what the model reads, and how many it really has."""
    tokens = min(tokens, engine.capabilities.context_length // 2)
    # In another order each time: some models read only once what is said again and again.
    chance, words = random.Random(1), _WORDS.split()
    each = max(engine.count(_user(" ".join(chance.choices(words, k=8 * len(words))))) / (8 * len(words)), 0.1)
    text = " ".join(chance.choices(words, k=max(int(tokens / each), 1)))
    return text, engine.count(_user(text))


def _user(text: str) -> Message:
    return Message(role=Role.USER, parts=(TextPart(text=text),))


async def _measure(engine: Engine, prompt: str, streams: int, given: argparse.Namespace) -> dict[str, Any]:
    """Let so many streams ask one question after the other, and return what they saw once all were under way."""
    seen, counting = _Seen(), False
    options = GenerationOptions(max_output_tokens=given.new)

    async def ask(number: int) -> None:
        while True:
            began, first = time.perf_counter(), True
            question = (_user(f"{number} {prompt}"),)
            async with aclosing(stream(engine, question, options)) as pieces:
                async for piece in pieces:
                    if counting and first:
                        seen.first_tokens.append(time.perf_counter() - began)
                    first = False
                    if counting and isinstance(piece, Chunk):
                        seen.tokens += piece.tokens
                    seen.answers += counting and isinstance(piece, Finished)

    async with asyncio.TaskGroup() as group:
        askers = [group.create_task(ask(number)) for number in range(streams)]
        await asyncio.sleep(given.seconds * _WARM_UP)
        counting, began = True, time.perf_counter()
        await asyncio.sleep(given.seconds)
        seconds, counting = time.perf_counter() - began, False
        for asker in askers:
            asker.cancel()
    firsts = sorted(seen.first_tokens)
    return {
        "streams": streams,
        "tokens_per_s": round(seen.tokens / seconds, 1),
        "first_token_ms": {"p50": _at(firsts, 0.5), "p95": _at(firsts, 0.95)},
        "answers": seen.answers,
    }


def _at(ordered: Sequence[float], share: float) -> float | None:
    """Return a percentile of times in milliseconds, None without any."""
    return round(ordered[min(int(len(ordered) * share), len(ordered) - 1)] * 1000, 1) if ordered else None


def _table(found: Mapping[str, Any]) -> str:
    memory = f", {readable(found['memory'])} of memory" if found["memory"] else ""
    lines = [
        f"{found['model']}: loaded in {found['load_s']:.2f} s{memory}; "
        f"prompts of {found['prompt_tokens']} tokens, answers of {found['new_tokens']} at most",
        f"{'streams':>8}{'tokens/s':>12}{'first token p50':>18}{'p95':>12}{'answers':>10}",
    ]
    for each in found["streams"]:
        p50, p95 = (f"{each['first_token_ms'][key] or 0:.1f} ms" for key in ("p50", "p95"))
        lines.append(f"{each['streams']:>8}{each['tokens_per_s']:>12.0f}{p50:>18}{p95:>12}{each['answers']:>10}")
    return "\n".join(lines)
