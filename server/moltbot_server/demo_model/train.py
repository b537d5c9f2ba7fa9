"""Makes the built-in model on the CPU: vocabulary, training, export (`python -m moltbot_server.demo_model.train`)."""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import tempfile
import time
from pathlib import Path

from moltbot_server.demo_model import ARTIFACT, export, grammar, meaning, network, strangers, topics
from moltbot_server.demo_model.dialogue import Speaker
from moltbot_server.demo_model.packing import ALOUD, FIRST, LONG, QUICK, WHOLE, Packer
from moltbot_server.demo_model.tokenizer import Tokenizer, train

EARLY = (FIRST, FIRST, ALOUD, FIRST, FIRST, WHOLE)
LATE = (FIRST, QUICK, FIRST, WHOLE, ALOUD, FIRST, FIRST, QUICK, ALOUD, FIRST, WHOLE, LONG)
STEPS = 4000
WARM_UP = 40
SINGLE_TURNS = 0.4
"""Share of the training that goes almost wholly to single questions, which are short."""


def vocabulary_lines(knowledge: topics.Knowledge, rng: random.Random) -> list[str]:
    """Collects the text that the vocabulary is learned from: answers, drawn questions, drawn strangers."""
    lines: list[str] = []
    for topic in [*knowledge.topics.values(), *knowledge.follow_ups.values()]:
        for side in topic.sides.values():
            lines += 3 * side.say.splitlines()
            lines += [grammar.draw(pattern, rng) for pattern in side.ask for _ in range(4)]
            lines += side.phrasings
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


def rate(step: int, progress: float, peak: float) -> float:
    """Learning rate: a linear start, then a cosine down to a hundredth."""
    return peak * min(1.0, (step + 1) / WARM_UP) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--steps", type=int, default=STEPS, help="optimizer steps of about 4,500 pieces (default: %(default)s)")
    add("--minutes", type=float, default=math.inf, help="end the schedule after this time at the latest")
    add("--seed", type=int, default=1, help="seed of weights and of everything drawn (default: %(default)s)")
    add("--vocabulary", type=int, default=7000, help="pieces (default: %(default)s)")
    add("--rate", type=float, default=5e-3, help="peak learning rate (default: %(default)s)")
    add("--out", type=Path, default=ARTIFACT, help="folder to write (default: the one in the package)")
    add(
        "--further",
        type=Path,
        nargs="+",
        metavar="FOLDER",
        help="train exported models, or their mean, further",
    )
    add("--every", type=int, default=0, help="also export every so many steps (default: only at the end)")
    return parser.parse_args()


def main() -> None:
    """Trains, exports and prints what it cost."""
    arguments = parse_arguments()
    rng = random.Random(arguments.seed)
    knowledge = topics.load_knowledge()
    with tempfile.TemporaryDirectory() as scratch:
        pieces = Path(scratch) / "tokenizer.model"
        if arguments.further:
            shutil.copyfile(arguments.further[0] / pieces.name, pieces)
        else:
            train(vocabulary_lines(knowledge, rng), pieces, arguments.vocabulary, knowledge.topics)
        tokenizer = Tokenizer(pieces)
        shape = network.Shape(vocabulary=len(tokenizer))
        if arguments.further:
            params = export.mean([export.restore(folder, shape) for folder in arguments.further])
        else:
            params = network.init(shape, meaning.embeddings(knowledge, tokenizer, shape.width, rng), arguments.seed)
        state = network.optimizer_state(params)
        advance = network.make_step(shape)
        packer = Packer(Speaker(knowledge, rng), knowledge, tokenizer, rng)
        started, seen, value, progress = time.perf_counter(), 0, 0.0, 0.0
        for step in range(arguments.steps):
            elapsed = time.perf_counter() - started
            progress = max(progress, step / arguments.steps, elapsed / 60 / arguments.minutes)
            if progress >= 1:
                break
            forms = EARLY if progress < SINGLE_TURNS and not arguments.further else LATE
            form = forms[step % len(forms)]
            batch = packer.batches(form, network.DEVICES)
            seen += int((batch["segments"] >= 0).sum())
            pace = rate(step, progress, arguments.rate)
            params, state, value = advance(params, state, batch, pace, network.key(arguments.seed, step))
            if step % 50 == 0:
                print(f"step {step} loss {float(value):.4f} pieces {seen} {elapsed:.0f} s", flush=True)
            if arguments.every and step and step % arguments.every == 0:
                export.export(params, shape, pieces, arguments.out)
        export.export(params, shape, pieces, arguments.out)
    report = {
        "steps": int(state["step"]),
        "pieces": seen,
        "seconds": round(time.perf_counter() - started),
        "loss": round(float(value), 4),
        "bytes": sum(path.stat().st_size for path in arguments.out.iterdir()),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
