"""First embeddings that know which pieces belong to which topics, in both languages, before training begins.

Drawn at random, embeddings take most of the training to learn that "telegram" and "whatsapp" are alike. Counting which
pieces occur with which topic says so at once: positive pointwise mutual information, reduced by a singular value
decomposition, as in latent semantic analysis. English and Chinese share the topics, so they end up in one space.
"""

from __future__ import annotations

import random

import numpy as np

from moltbot_server.demo_model import grammar, strangers, topics
from moltbot_server.demo_model.tokenizer import Tokenizer

FREE = 0.2
"""Share of the width that is left to chance, for what topics do not tell."""
SIZE = 0.1
"""Root mean square of the embeddings; random ones are as large, so frequent and rare pieces weigh the same."""


def texts(knowledge: topics.Knowledge, rng: random.Random) -> dict[str, list[str]]:
    """Collects training text by topic, by kind of follow-up and by kind of refusal."""
    found: dict[str, list[str]] = {}
    for topic in (*knowledge.topics.values(), *knowledge.follow_ups.values()):
        lines = found.setdefault(topic.id, [])
        for side in topic.sides.values():
            lines += [side.say, *side.phrasings]
            lines += [grammar.draw(pattern, rng) for pattern in side.ask for _ in range(5)]
    for language in topics.LANGUAGES:
        for _ in range(5000):
            stranger = strangers.draw(language, rng)
            found[stranger.topic].append(stranger.text)
    return {topic: lines for topic, lines in found.items() if lines}


def embeddings(knowledge: topics.Knowledge, tokenizer: Tokenizer, width: int, rng: random.Random) -> np.ndarray:
    """Makes the first embeddings as [pieces, width]."""
    columns = texts(knowledge, rng)
    counts = np.zeros((len(tokenizer), len(columns)))
    for column, lines in enumerate(columns.values()):
        for line in lines:
            for form in (line, line.lower()):
                for dropout in (0.0, 0.1):
                    counts[list(set(tokenizer.encode(form, dropout))), column] += 1
    counts /= np.maximum(counts.sum(axis=0, keepdims=True), 1) / 1000  # refusals have many more lines than topics
    pieces = counts.sum(axis=1, keepdims=True)
    expected = pieces * counts.sum(axis=0, keepdims=True) / counts.sum()
    trust = pieces / (pieces + 2)
    surprise = trust * np.log(np.maximum(counts, 1e-9) / np.maximum(expected, 1e-9))
    left, values, right = np.linalg.svd(np.maximum(surprise, 0), full_matrices=False)
    known = min(int(width * (1 - FREE)), len(values))
    meaning = left[:, :known] * values[:known] ** 0.5
    meaning *= SIZE / np.sqrt((meaning**2).mean())
    about = right[:known].T * values[:known] ** 0.5
    for topic, row in zip(columns, about, strict=True):
        if topic in knowledge.topics:
            meaning[tokenizer.topic(topic)] = row * SIZE / np.sqrt((row**2).mean())
    free = np.random.default_rng(rng.randrange(2**32)).normal(0, SIZE, (len(tokenizer), width - known))
    return np.concatenate([meaning, free], axis=1)
