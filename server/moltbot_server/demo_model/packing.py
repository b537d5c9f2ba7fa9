"""Packs drawn conversations into the fixed-size rows that one compiled training step takes."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from moltbot_server.demo_model import strangers, topics
from moltbot_server.demo_model.dialogue import Speaker
from moltbot_server.demo_model.tokenizer import Tokenizer

SINGLE, SHORT, LONG = (56, 80), (24, 192), (4, 1024)
"""Rows and places of the three kinds of batches: mostly single turns, a few turns, long conversations."""
CLIP = {SINGLE[1]: 0.85, SHORT[1]: 0.5, LONG[1]: 0.0}
SCORED = {SINGLE[1]: 0.5, SHORT[1]: 0.75, LONG[1]: 0.8}  # places for scored targets, as a share of all places


@dataclass(frozen=True, slots=True)
class Line:
    """One encoded conversation: ids, positions, and the indices whose next id is scored."""

    ids: list[int]
    positions: list[int]
    scored: list[int]


class Packer:
    """Encodes conversations with the accidents that make the model robust, and fills batches with them."""

    def __init__(self, speaker: Speaker, knowledge: topics.Knowledge, tokenizer: Tokenizer, rng: random.Random) -> None:
        self._speaker = speaker
        self._knowledge = knowledge
        self._tokenizer = tokenizer
        self._rng = rng

    def line(self, turns: int, room: int, clip: float) -> Line:
        """Encodes a conversation of at most `room` ids.

        `clip` is how often the end of the last answer is left off: its first pieces, where the topic is decided, are
        what takes the practice. Now and then positions jump ahead between turns, which stands in for a long history.
        """
        code, rng = self._tokenizer, self._rng
        ids, positions = [code.bos], [0]
        scored: list[int] = []
        ahead = 0

        def add(pieces: list[int]) -> None:
            for piece in pieces:
                ids.append(piece)
                positions.append(len(ids) - 1 + ahead)

        if rng.random() < 0.15:
            add([code.system, *code.encode(self._speaker.rules(), self._dropout())])
        conversation = self._speaker.conversation(turns)
        for index, turn in enumerate(conversation):
            if rng.random() < 0.12 and ahead < 600:
                ahead += rng.randint(20, 900 - len(ids) if len(ids) < 800 else 20)
            text = turn.text
            if turn.topic == "unclear" and room > 400 and rng.random() < 0.5:
                text = " ".join(strangers.mash(rng) for _ in range(rng.randint(4, 25)))
            said = code.encode(text, self._dropout())
            answer = [*code.encode(self._knowledge.answer(turn.topic, turn.language)), code.end]
            if index == len(conversation) - 1 and rng.random() < clip:
                answer = answer[: rng.randint(3, 7)]
            if len(ids) + len(said) + len(answer) + 2 > room:
                break
            add([code.user, *said, code.bot])
            scored += range(len(ids) - 1, len(ids) - 1 + len(answer))
            add(answer)
        if scored:
            scored = [place for place in scored if place + 1 < len(ids)]
        return Line(ids, positions, scored)

    def _dropout(self) -> float:
        return 0.1 if self._rng.random() < 0.4 else 0.0

    def batch(self, rows: int, time: int) -> dict[str, np.ndarray]:
        """Fills [rows, time] places; rows hold several conversations, kept apart by their segment numbers."""
        tokens = np.zeros((rows, time), dtype=np.int32)
        positions = np.zeros((rows, time), dtype=np.int32)
        segments = np.full((rows, time), -1, dtype=np.int32)
        places = int(rows * time * SCORED[time])
        pick, goal, weight = np.zeros(places, np.int32), np.zeros(places, np.int32), np.zeros(places, np.float32)
        used = [0] * rows
        scored = segment = misses = 0
        while misses < 6:
            line = self.line(self._turns(time), time, clip=CLIP[time])
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
            for place in line.scored[: places - scored]:
                pick[scored], goal[scored], weight[scored] = row * time + start + place, line.ids[place + 1], 1.0
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

    def _turns(self, time: int) -> int:
        if time == LONG[1]:
            return self._rng.randint(6, 24)
        weights = (90, 10) if time == SINGLE[1] else (25, 50, 17, 8)
        return self._rng.choices(range(1, len(weights) + 1), weights=weights)[0]
