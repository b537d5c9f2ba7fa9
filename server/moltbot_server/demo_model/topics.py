"""What the built-in model knows: its topics, their phrasings in two languages, and how a second turn leads on.

Reads the YAML files of `data/`; others may use `load_knowledge` to list the topics or to look up an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from moltbot_server.demo_model import grammar

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")
FOLDER = Path(__file__).parent / "data"
FRAMED = 6
"""Patterns made of a topic's further words, beside five to eight written out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One language of a topic: training patterns and phrasings, two held-out lists of plain questions, and the answer.

    `dev` was looked at while the patterns were written; `test` was only ever counted.
    """

    ask: tuple[grammar.Sequence, ...]
    phrasings: tuple[str, ...]
    dev: tuple[str, ...]
    test: tuple[str, ...]
    say: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Topic:
    """Something the model answers, and where `more`, `another`, `example` or `why` lead from it.

    `family` and `member` say that topics are siblings: after `connect/slack`, "and Discord?" means `connect/discord`.
    `refusal` marks the answers that admit ignorance.
    """

    id: str
    sides: Mapping[Language, Side]
    follow: Mapping[str, str] = field(default_factory=dict)
    family: str = ""
    member: str = ""
    refusal: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """Something that siblings are about, how it is called, and the topic that its bare name leads to."""

    names: Mapping[Language, tuple[str, ...]]
    default: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Knowledge:
    """Everything written down in `data/`: topics by id, follow-up phrasings by kind, members by name."""

    topics: Mapping[str, Topic]
    follow_ups: Mapping[str, Topic]
    members: Mapping[str, Member]

    def answer(self, topic: str, language: Language) -> str:
        """Returns a topic's answer; raises KeyError for an unknown topic."""
        return self.topics[topic].sides[language].say

    def lead(self, kind: str, after: str | None) -> str:
        """Names the topic that a follow-up of this kind means after `after`, or at the very start (None)."""
        if after is None:
            return "no_context"
        return self.topics[after].follow.get(kind, "no_more")

    def sibling(self, member: str, after: str | None) -> str:
        """Names the topic that "and X?" means after `after`: the sibling if there is one, else the member's own."""
        family = self.topics[after].family if after else ""
        for topic in self.topics.values():
            if family and topic.family == family and topic.member == member:
                return topic.id
        return self.members[member].default


@dataclass(frozen=True, slots=True, kw_only=True)
class Further:
    """What other files add to a topic, by language: words that frames make questions of, and plain questions."""

    keys: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    phrasings: Mapping[str, str] = field(default_factory=dict)


def _lines(text: str | None) -> tuple[str, ...]:
    return tuple(line.strip() for line in (text or "").splitlines() if line.strip())


def _framed(keys: Mapping[str, str], words: grammar.Words) -> list[grammar.Sequence]:
    """Makes patterns of a topic's further words: each kind of word stands in each of its frames.

    Repeated patterns are drawn more often; about half of a topic's training questions come from here.
    """
    patterns = []
    for kind, alternatives in keys.items():
        options = tuple(grammar.parse(word, words) for word in alternatives.split("|"))
        frames = tuple(
            grammar.Sequence((before, grammar.Choice(options), after))
            for before, _, after in (frame.partition("X") for frame in words[f"frame_{kind}"])
        )
        patterns.append(grammar.Sequence((grammar.Choice(frames),)))
    return patterns * (FRAMED // len(patterns)) if patterns else []


def _side(entry: Mapping[str, Any], more: Further, language: Language, words: grammar.Words) -> Side:
    keys = more.keys.get(language, {})
    return Side(
        ask=(*(grammar.parse(line, words) for line in _lines(entry.get("ask"))), *_framed(keys, words)),
        phrasings=_lines(more.phrasings.get(language)),
        dev=_lines(entry.get("dev")),
        test=_lines(entry.get("test")),
        say=str(entry.get("say", "")).strip(),
    )


def _topic(entry: Mapping[str, Any], words: Mapping[Language, grammar.Words], more: Further) -> Topic:
    family, _, member = str(entry.get("family", "")).partition("/")
    return Topic(
        id=entry["id"],
        sides={language: _side(entry.get(language, {}), more, language, words[language]) for language in LANGUAGES},
        follow=dict(entry.get("follow", {})),
        family=family,
        member=member,
        refusal=bool(entry.get("refusal", False)),
    )


def _member(entry: Mapping[str, str]) -> Member:
    names = {language: tuple(entry[language].split("|")) for language in LANGUAGES}
    return Member(names=names, default=entry["default"])


def read(name: str) -> Any:
    """Parses one YAML file of `data/`."""
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


@cache
def common_words(language: Language) -> grammar.Words:
    """Reads the alternatives that all patterns of a language share, such as `{how}`."""
    return {name: tuple(str(alternatives).split("|")) for name, alternatives in read("words.yaml")[language].items()}


def gather(pattern: str) -> dict[str, dict[str, str]]:
    """Reads the lines of all files of a kind by topic and language; what several say of a topic is joined."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted(FOLDER.glob(pattern)):
        for topic, sides in read(path.name).items():
            entry = found.setdefault(topic, {})
            for language, lines in sides.items():
                entry[language] = f"{entry.get(language, '')}{lines}\n"
    return found


@cache
def load_knowledge() -> Knowledge:
    """Reads all topics; raises ValueError when an id appears twice or leads nowhere."""
    words: dict[Language, grammar.Words] = {language: common_words(language) for language in LANGUAGES}
    topics: dict[str, Topic] = {}
    phrasings = gather("phrasings_*.yaml")
    keys: dict[str, Any] = {
        topic: entry for path in sorted(FOLDER.glob("keys_*.yaml")) for topic, entry in read(path.name).items()
    }
    for path in sorted(FOLDER.glob("topics_*.yaml")):
        for entry in read(path.name):
            more = Further(keys=keys.get(entry["id"], {}), phrasings=phrasings.get(entry["id"], {}))
            topic = _topic(entry, words, more)
            if topic.id in topics:
                raise ValueError(f"topic {topic.id} is written twice, again in {path.name}")
            topics[topic.id] = topic
    follow = read("follow_ups.yaml")
    members = {name: _member(entry) for name, entry in follow["members"].items()}
    if unknown := sorted((keys.keys() | phrasings.keys()) - topics.keys()):
        raise ValueError(f"there are further phrasings for topics that are not written: {unknown}")
    ends = {end for topic in topics.values() for end in topic.follow.values()} | {m.default for m in members.values()}
    if missing := sorted(ends - topics.keys()):
        raise ValueError(f"these topics are led to but not written: {missing}")
    if strays := sorted({topic.member for topic in topics.values() if topic.family} - members.keys()):
        raise ValueError(f"these members of families are not written: {strays}")
    return Knowledge(
        topics=topics,
        follow_ups={entry["id"]: _topic(entry, words, Further()) for entry in follow["kinds"]},
        members=members,
    )
