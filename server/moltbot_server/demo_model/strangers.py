"""Questions that the model must not pretend to answer, drawn from templates and word lists.

Training and test use different templates and different words, so the held-out refusal rate is measured on text that is
new in both.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from typing import Literal

from moltbot_server.demo_model import grammar, topics

Split = Literal["train", "test"]
WRITTEN_OUT = 0.5
"""How often a question comes from those written out one by one, rather than from a template."""
FRAMED = 0.3
"""How often a question that is not written out is a foreign word in a frame of the topics."""
INVENTED = 0.15
"""How often one word of a question is replaced by a made-up one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stranger:
    """A question outside the model's knowledge and the refusal that suits it best."""

    text: str
    topic: str
    language: topics.Language


@cache
def _templates(language: topics.Language, split: Split) -> tuple[tuple[str, tuple[grammar.Sequence, ...]], ...]:
    content = topics.read(f"strangers_{language}.yaml")
    words = {name: tuple(lists[split].replace("\n", " ").split("|")) for name, lists in content["words"].items()}
    words = {name: tuple(word.strip() for word in alternatives) for name, alternatives in words.items()}
    return tuple(
        (topic, tuple(grammar.parse(line.strip(), words) for line in lists[split].splitlines() if line.strip()))
        for topic, lists in content["templates"].items()
    )


@cache
def written_out(language: topics.Language) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Reads the training questions that are written one by one, by the refusal that suits them."""
    lists = topics.gather("more_strangers*.yaml")
    return tuple(
        (topic, tuple(line.strip() for line in sides[language].splitlines() if line.strip()))
        for topic, sides in lists.items()
    )


def draw(language: topics.Language, rng: random.Random) -> Stranger:
    """Makes one training question; kinds are weighted by the root of their number of templates or lines."""
    if rng.random() < WRITTEN_OUT:
        lists = written_out(language)
        topic, lines = rng.choices(lists, weights=[len(lines) ** 0.5 for _, lines in lists])[0]
        return Stranger(text=_invent(rng.choice(lines), language, rng), topic=topic, language=language)
    if rng.random() < FRAMED:
        return Stranger(text=_invent(_framed(language, rng), language, rng), topic="unknown", language=language)
    kinds = _templates(language, "train")
    topic, templates = rng.choices(kinds, weights=[len(lines) ** 0.5 for _, lines in kinds])[0]
    text = _invent(grammar.draw(rng.choice(templates), rng), language, rng)
    return Stranger(text=text, topic=topic, language=language)


@cache
def _words(language: topics.Language) -> dict[str, tuple[str, ...]]:
    lists = topics.read(f"strangers_{language}.yaml")["words"]
    return {
        name: tuple(word.strip() for word in words["train"].replace("\n", " ").split("|") if word.strip())
        for name, words in lists.items()
    }


def _framed(language: topics.Language, rng: random.Random) -> str:
    """Puts a foreign thing or chore into a frame that topics use, so that frames alone say nothing."""
    words = _words(language)
    kind, names = rng.choice((("n", ("thing", "person", "country", "city", "dish", "work", "tech")), ("v", ("chore",))))
    word = rng.choice(words[rng.choice(names)])
    return rng.choice(topics.common_words(language)[f"frame_{kind}"]).replace("X", word)


def _invent(text: str, language: topics.Language, rng: random.Random) -> str:
    """Puts a made-up word in the place of one word now and then: what was never heard of is not known."""
    if rng.random() >= INVENTED:
        return text
    if language == "zh" and len(text) > 5:
        pool = "".join(rng.choice(lines) for _, lines in written_out("zh"))
        length = rng.randint(1, 2)
        at = rng.randrange(len(text) - length)
        return text[:at] + "".join(rng.choices(pool, k=length)) + text[at + length :]
    words = text.split()
    at = rng.randrange(len(words))
    if len(words[at]) > 3:
        other = rng.choice([word for _, lines in written_out("en") for word in rng.choice(lines).split()])
        words[at] = words[at][: rng.randint(0, 2)] + other[rng.randint(0, 2) :] if rng.random() < 0.7 else other[::-1]
    return " ".join(words)


def mash(rng: random.Random) -> str:
    """Makes keyboard mash, repetitions, digits, punctuation, emoji or a mixture: text that means nothing."""
    emoji = "😀😂🤣😊😍🤔👍🙏🎉🔥💡🚀🐱🐶🍕⚽❤️✨😭😡"
    kind = rng.randrange(9)
    if kind == 8:
        return rng.choice("abcdefghijklmnopqrstuvwxyzABCXYZ0123456789=-_.*#~!?啊哦长好的哈呵嗯了") * rng.randint(6, 160)
    if kind == 7:
        word = "".join(rng.choices("asdfghjklqwertyuiopzxcvbnm啊哦嗯", k=rng.randint(2, 4)))
        return rng.choice(("", "", " ")).join([word] * rng.randint(6, 60))
    if kind == 0:
        return "".join(rng.choices("asdfghjklqwertyuiopzxcvbnm", k=rng.randint(5, 24)))
    if kind == 1:
        return "".join(rng.choices("0123456789", k=rng.randint(2, 16)))
    if kind == 2:
        return "".join(rng.choices("?!.,;:-_#@$%^&*()[]{}<>/\\|~`'\"。、…", k=rng.randint(1, 12)))
    if kind == 3:
        return "".join(rng.choices(emoji, k=rng.randint(1, 6)))
    if kind == 4:
        return "".join(
            chr(rng.choice((rng.randint(0x21, 0x2FF), rng.randint(0x400, 0x6FF)))) for _ in range(rng.randint(4, 40))
        )
    if kind == 5:
        return "".join(chr(rng.randint(0x4E00, 0x9FA5)) for _ in range(rng.randint(3, 14)))
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    return " ".join("".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(rng.randint(2, 12)))


def held_out(language: topics.Language, seed: int = 7, per_template: int = 2) -> tuple[Stranger, ...]:
    """Makes the fixed test questions of a language: up to `per_template` distinct ones from every held-out template."""
    rng = random.Random(seed)
    found: dict[str, Stranger] = {}
    for topic, templates in _templates(language, "test"):
        for template in templates:
            for _ in range(per_template):
                text = grammar.draw(template, rng)
                found.setdefault(text, Stranger(text=text, topic=topic, language=language))
    return tuple(found.values())
