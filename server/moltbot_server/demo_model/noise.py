"""What people do to a question while typing it: manners, case, punctuation, typos, stray spaces."""

from __future__ import annotations

import random

from moltbot_server.demo_model import grammar, topics

_KEYS = "qwertyuiopasdfghjklzxcvbnm"


def roughen(text: str, language: topics.Language, rng: random.Random, strength: float = 1.0) -> str:
    """Returns the question as a person might have typed it; `strength` scales every probability."""

    def happens(probability: float) -> bool:
        return rng.random() < probability * strength

    words = topics.common_words(language)
    if happens(0.3):
        text = rng.choice(words["opening"]) + text if language == "zh" else f"{rng.choice(words['opening'])} {text}"
    if happens(0.15):
        text = text + rng.choice(words["closing"]) if language == "zh" else f"{text} {rng.choice(words['closing'])}"
    if happens(0.12):
        text = _slip(text, rng)
        if len(text) > 25 and happens(0.4):
            text = _slip(text, rng)
    if language == "en" and happens(0.06):
        text = _drop_word(text, rng)
    if language == "zh" and happens(0.1):
        text = _respace(text, rng)
    if happens(0.55):
        text = text + rng.choice(words["ending"])
    return grammar.tidy(_recase(text, rng, strength))


def blur(text: str, language: topics.Language, rng: random.Random) -> str:
    """Drops or swaps words of a question; in Chinese, fillers, single characters, or the order of two halves."""
    fillers = topics.common_words(language)["filler"]
    if language == "en":
        words = text.split()
        few = [word for word in words if word.lower().strip("?,.!") not in fillers or rng.random() < 0.5]
        few = [word for word in few if rng.random() > 0.06]
        if rng.random() < 0.25 and len(few) > 2:
            at = rng.randrange(1, len(few))
            few = few[at:] + few[:at]
        return " ".join(few or words)
    for filler in fillers:
        if filler in text and rng.random() < 0.4:
            text = text.replace(filler, "", 1) if len(text) > len(filler) + 1 else text
    if len(text) > 6 and rng.random() < 0.2:
        at = rng.randrange(2, len(text) - 2)
        if not (text[at - 1].isascii() and text[at].isascii()):
            text = text[at:] + text[:at]
    if len(text) > 6 and rng.random() < 0.15:
        at = rng.randrange(len(text))
        text = text[:at] + text[at + 1 :]
    return text


def mix(first: str, second: str, language: topics.Language, rng: random.Random) -> str:
    """Joins parts of two questions with one meaning: words in English, runs of two to four characters in Chinese."""
    parts: list[str] = []
    for text in (first, second):
        if language == "en":
            pieces = text.split()
        else:
            pieces, at = [], 0
            while at < len(text):
                size = rng.randint(2, 4)
                pieces.append(text[at : at + size])
                at += size
        parts += [piece for piece in pieces if rng.random() < 0.6]
    return (" " if language == "en" else "").join(parts) or first


def repeat(text: str, language: topics.Language, rng: random.Random) -> str:
    """Says it over and over, as people do who lean on a key or paste too often: up to some 240 characters."""
    between = " " if language == "en" else ""
    return between.join([text] * rng.randint(2, max(2, 240 // max(1, len(text)))))


def _slip(text: str, rng: random.Random) -> str:
    """Loses, doubles, swaps or mistypes one character; Chinese characters are only ever lost or doubled."""
    if len(text) < 4:
        return text
    at = rng.randrange(len(text) - 1)
    kind = rng.randrange(4) if text[at].isascii() and text[at + 1].isascii() else rng.randrange(2)
    if kind == 0:
        return text[:at] + text[at + 1 :]
    if kind == 1:
        return text[:at] + text[at] + text[at:]
    if kind == 2:
        return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    return text[:at] + rng.choice(_KEYS) + text[at + 1 :]


def _drop_word(text: str, rng: random.Random) -> str:
    words = text.split(" ")
    if len(words) < 5:
        return text
    words.pop(rng.randrange(len(words)))
    return " ".join(words)


def _respace(text: str, rng: random.Random) -> str:
    """Adds or removes the space where Chinese meets Latin letters, which people write either way."""
    if rng.random() < 0.5:
        return text.replace(" ", "")
    result = ""
    for char in text:
        if result and result[-1] != " " and char != " " and char.isascii() != result[-1].isascii():
            result += " "
        result += char
    return result


def _recase(text: str, rng: random.Random, strength: float) -> str:
    draw = rng.random() / max(strength, 1e-9)
    if draw < 0.3:
        return text[:1].upper() + text[1:]
    if draw < 0.4:
        return text.lower()
    if draw < 0.44:
        return text.upper()
    if draw < 0.47:
        return text.title()
    return text
