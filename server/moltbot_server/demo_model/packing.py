"""Packs drawn conversations into the fixed-size rows that one compiled training step takes."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import numpy as np

from moltbot_server.demo_model import strangers, topics
from moltbot_server.demo_model.dialogue import Speaker
from moltbot_server.demo_model.tokenizer import Tokenizer
from moltbot_server.demo_model.topics import Language

RECITED = 0.5
"""Weight of a piece that follows from the pieces before it, against 1 for those that decide which answer it is."""
OPENED = 2
"""How many pieces of an answer, after its topic token, count fully: they decide its language."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A kind of batch: `rows` of `time` places, a share `scored` of them for targets, and weights of 1, 2, 3... turns.

    Without turns, each topic is asked for as often as any other, in one turn or two. `clip` is how often the last
    answer stops at its topic token; `brief` is how often earlier answers are cut short.
    """

    rows: int
    time: int
    scored: float
    turns: tuple[int, ...]
    clip: float
    brief: float


FIRST = Format(rows=12, time=96, scored=0.3, turns=(1,), clip=0.9, brief=1.0)
ALOUD = Format(rows=5, time=256, scored=0.85, turns=(), clip=0.0, brief=1.0)
QUICK = Format(rows=12, time=96, scored=0.16, turns=(10, 90), clip=0.9, brief=1.0)
WHOLE = Format(rows=5, time=256, scored=0.45, turns=(25, 50, 17, 8), clip=0.3, brief=0.15)
LONG = Format(rows=1, time=1024, scored=0.25, turns=(0,) * 5 + (1,) * 18, clip=0.0, brief=0.0)


@dataclass(frozen=True, slots=True)
class Line:
    """One encoded conversation: ids, positions, and by index what is to be said next, with its weight in the loss."""

    ids: list[int]
    positions: list[int]
    scored: dict[int, tuple[int, float]]


class Packer:
    """Encodes conversations with the accidents that make the model robust, and fills batches with them."""

    def __init__(self, speaker: Speaker, knowledge: topics.Knowledge, tokenizer: Tokenizer, rng: random.Random) -> None:
        self._speaker = speaker
        self._tokenizer = tokenizer
        self._rng = rng
        self._answers: dict[tuple[str, Language], list[int]] = {
            (topic.id, language): [*tokenizer.encode(topic.sides[language].say), tokenizer.end]
            for topic in knowledge.topics.values()
            for language in topics.LANGUAGES
        }
        shared = Counter(tuple(ids[:n]) for ids in self._answers.values() for n in range(1, len(ids)))
        self._decided = {
            key: next((n for n in range(1, len(ids)) if shared[tuple(ids[:n])] == 1), len(ids))
            for key, ids in self._answers.items()
        }

    def line(self, form: Format) -> Line:
        """Encodes a conversation that fits into one row.

        After `<|bot|>` comes the topic token, which takes most of the practice, then the answer. Now and then
        positions jump ahead between turns, which stands in for a long history.
        """
        code, rng = self._tokenizer, self._rng
        ids, positions = [code.bos], [0]
        scored: dict[int, tuple[int, float]] = {}
        ahead = 0

        def add(pieces: list[int]) -> None:
            for piece in pieces:
                ids.append(piece)
                positions.append(len(ids) - 1 + ahead)

        if rng.random() < 0.12:
            add([code.system, *code.encode(self._speaker.rules(), self._dropout())])
        if form.turns:
            turns = rng.choices(range(1, len(form.turns) + 1), weights=form.turns)[0]
            conversation = self._speaker.conversation(turns)
        else:
            conversation = self._speaker.recital()
        for index, turn in enumerate(conversation):
            if rng.random() < 0.1 and ahead < 600:
                ahead += rng.randint(20, 900 - len(ids) if len(ids) < 800 else 20)
            text = turn.text
            if turn.topic == "unclear" and form.time > 400 and rng.random() < 0.5:
                text = " ".join(strangers.mash(rng) for _ in range(rng.randint(4, 25)))
            said = code.encode(text, self._dropout())
            answer, decided = self._answers[turn.topic, turn.language], self._decided[turn.topic, turn.language]
            last = index == len(conversation) - 1
            if not last and rng.random() < form.brief:
                answer = [*answer[: decided + rng.randint(3, 14)], code.end]
            if len(ids) + len(said) + len(answer) + 4 > form.time:
                break
            add([code.user, *said, code.bot])
            scored[len(ids) - 1] = (code.topic(turn.topic), 1.0)
            if last and rng.random() >= form.clip:
                recited = [code.topic(turn.topic), *answer]
                for place in range(1, len(recited)):
                    scored[len(ids) + place - 1] = (recited[place], 1.0 if place <= OPENED else RECITED)
                add(recited)
            elif not last:
                add(answer)  # without its topic token, as a caller who repeats the conversation sends it
        return Line(ids, positions, scored)

    def _dropout(self) -> float:
        return 0.1 if self._rng.random() < 0.3 else 0.0

    def batches(self, form: Format, count: int) -> dict[str, np.ndarray]:
        """Stacks that many batches, one for each device."""
        parts = [self.batch(form) for _ in range(count)]
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    def batch(self, form: Format) -> dict[str, np.ndarray]:
        """Fills [rows, time] places; rows hold several conversations, kept apart by their segment numbers."""
        rows, time = form.rows, form.time
        tokens = np.zeros((rows, time), dtype=np.int32)
        positions = np.zeros((rows, time), dtype=np.int32)
        segments = np.full((rows, time), -1, dtype=np.int32)
        places = int(rows * time * form.scored)
        pick, goal, weight = np.zeros(places, np.int32), np.zeros(places, np.int32), np.zeros(places, np.float32)
        used = [0] * rows
        scored = segment = misses = 0
        while misses < 6:
            line = self.line(form)
            free = [row for row in range(rows) if used[row] + len(line.ids) <= time]
            if not free or not line.scored:
                misses += 1
                continue
            row = max(free, key=lambda index: used[index])
            start = used[row]
            end = start + len(line.ids)
            tokens[row, start:end], positions[row, start:end], segments[row, start:end] = (
                line.ids,
                line.positions,
                segment,
            )
            for place, (next_id, importance) in [*line.scored.items()][: places - scored]:
                pick[scored], goal[scored] = row * time + start + place, next_id
                weight[scored] = importance
                scored += 1
            used[row] = end
            segment += 1
        return {
            "tokens": tokens,
            "positions": positions,
            "segments": segments,
            "pick": pick,
            "goal": goal,
            "weight": weight,
        }
