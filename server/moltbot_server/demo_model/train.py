"""Makes the built-in model on the CPU: vocabulary, training, export (`python -m moltbot_server.demo_model.train`)."""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from pathlib import Path

from moltbot_server.demo_model import ARTIFACT, export, grammar, network, strangers, topics
from moltbot_server.demo_model.dialogue import Speaker
from moltbot_server.demo_model.packing import LONG, SHORT, SINGLE, Packer
from moltbot_server.demo_model.tokenizer import Tokenizer, train

CYCLE = (SINGLE, SINGLE, SHORT, SINGLE, SINGLE, SHORT, SINGLE, SINGLE, SHORT, LONG)
WARM_UP = 60


def vocabulary_lines(knowledge: topics.Knowledge, rng: random.Random) -> list[str]:
    """Collects the text that the vocabulary is learned from: answers, drawn questions, drawn strangers."""
    lines: list[str] = []
    for topic in [*knowledge.topics.values(), *knowledge.follow_ups.values()]:
        for side in topic.sides.values():
            lines += 3 * side.say.splitlines()
            lines += [grammar.draw(pattern, rng) for pattern in side.ask for _ in range(4)]
    for language in topics.LANGUAGES:
        lines += [strangers.draw(language, rng).text for _ in range(6000)]
        lines += [
            phrase
            for group in ("opening", "closing", "rules", "sibling")
            for phrase in topics.common_words(language)[group]
        ]
    for member in knowledge.members.values():
        lines += [name for names in member.names.values() for name in names]
    lines += [form for line in lines for form in (line.lower(), line[:1].upper() + line[1:])]
    return [line for line in lines if line.strip()]


def rate(step: int, steps: int, peak: float) -> float:
    """Learning rate: a linear start, then a cosine down to a hundredth."""
    progress = step / steps
    return peak * min(1.0, (step + 1) / WARM_UP) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def main() -> None:
    """Trains, exports and prints what it cost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--steps", type=int, default=1800, help="optimizer steps of about 4,500 pieces (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="seed of weights and of everything drawn (default: %(default)s)"
    )
    parser.add_argument("--vocabulary", type=int, default=5000, help="pieces (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ARTIFACT, help="folder to write (default: the one in the package)")
    parser.add_argument(
        "--every", type=int, default=0, help="also export every so many steps (default: only at the end)"
    )
    arguments = parser.parse_args()

    rng = random.Random(arguments.seed)
    knowledge = topics.load_knowledge()
    with tempfile.TemporaryDirectory() as scratch:
        pieces = Path(scratch) / "tokenizer.model"
        train(vocabulary_lines(knowledge, rng), pieces, arguments.vocabulary)
        tokenizer = Tokenizer(pieces)
        shape = network.Shape(vocabulary=len(tokenizer))
        params = network.init(shape, arguments.seed)
        state = network.optimizer_state(params)
        advance = network.make_step(shape)
        packer = Packer(Speaker(knowledge, rng), knowledge, tokenizer, rng)
        started, seen, value = time.perf_counter(), 0, 0.0
        for step in range(arguments.steps):
            batch = packer.batch(*CYCLE[step % len(CYCLE)])
            seen += int((batch["segments"] >= 0).sum())
            params, state, value = advance(params, state, batch, rate(step, arguments.steps, arguments.rate))
            if step % 50 == 0:
                print(
                    f"step {step} loss {float(value):.4f} pieces {seen} {time.perf_counter() - started:.0f} s",
                    flush=True,
                )
            if arguments.every and step and step % arguments.every == 0:
                export.export(params, shape, pieces, arguments.out)
        export.export(params, shape, pieces, arguments.out)
    report = {
        "steps": arguments.steps,
        "pieces": seen,
        "seconds": round(time.perf_counter() - started),
        "loss": round(float(value), 4),
        "bytes": sum(path.stat().st_size for path in arguments.out.iterdir()),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
