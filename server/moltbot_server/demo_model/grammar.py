"""A small language for writing many phrasings on one line.

`[slack|discord]` is a choice, `[please|]` may be empty, choices nest, and `{how}` stands for a list of alternatives.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

Words = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Choice:
    """One place of a pattern where any of several sequences may stand."""

    options: tuple[Sequence, ...]


@dataclass(frozen=True, slots=True)
class Sequence:
    """Literal text and choices, one after the other."""

    parts: tuple[str | Choice, ...]


def parse(pattern: str, words: Words) -> Sequence:
    """Reads a pattern, replacing each `{name}` by its alternatives.

    Raises ValueError, naming the pattern, when a bracket is left open or a name is unknown.
    """
    options, end = _options(pattern, 0, words)
    if end != len(pattern) or len(options) != 1:
        raise ValueError(f"stray bracket or bar in pattern: {pattern!r}")
    return options[0]


def _options(text: str, at: int, words: Words) -> tuple[list[Sequence], int]:
    """Reads alternatives from `at` up to the closing bracket or the end."""
    options: list[Sequence] = []
    parts: list[str | Choice] = []
    literal = ""
    while at < len(text) and text[at] != "]":
        char = text[at]
        if char not in "[|{":
            literal += char
            at += 1
            continue
        if literal:
            parts.append(literal)
            literal = ""
        if char == "|":
            options.append(Sequence(tuple(parts)))
            parts = []
            at += 1
        elif char == "[":
            inner, at = _options(text, at + 1, words)
            if at >= len(text):
                raise ValueError(f"open bracket in pattern: {text!r}")
            parts.append(Choice(tuple(inner)))
            at += 1
        else:
            end = text.find("}", at)
            name = text[at + 1 : end]
            if name not in words:
                raise ValueError(f"unknown name {{{name}}} in pattern: {text!r}")
            parts.append(Choice(tuple(parse(word, words) for word in words[name])))
            at = end + 1
    if literal:
        parts.append(literal)
    options.append(Sequence(tuple(parts)))
    return options, at


def tidy(text: str) -> str:
    """Collapses runs of spaces, which empty choices leave behind."""
    return " ".join(text.split())


def draw(sequence: Sequence, rng: random.Random) -> str:
    """Picks one phrasing; every option of a choice is equally likely."""
    return tidy(_draw(sequence, rng))


def _draw(sequence: Sequence, rng: random.Random) -> str:
    return "".join(part if isinstance(part, str) else _draw(rng.choice(part.options), rng) for part in sequence.parts)


def variants(sequence: Sequence) -> Iterator[str]:
    """Yields every phrasing, untidied duplicates included."""
    for combination in _variants(sequence):
        yield tidy(combination)


def _variants(sequence: Sequence) -> Iterator[str]:
    columns = [
        [part] if isinstance(part, str) else [text for option in part.options for text in _variants(option)]
        for part in sequence.parts
    ]
    for row in itertools.product(*columns):
        yield "".join(row)
