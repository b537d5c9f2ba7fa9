"""Training conversations: one to many turns in which a later question may lean on an earlier answer."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from moltbot_server.demo_model import grammar, noise, strangers, topics
from moltbot_server.demo_model.topics import Language

STRANGERS = 0.46
"""Share of foreign questions among the openings."""

LEANING = 0.6
"""How often a later question leans on the answer before it."""

MANNERS = ("thanks", "bye", "laugh", "no_wrong")
"""Topics that end or answer a turn; people say them after an answer."""

SWITCHES = {"in_en": "en", "in_zh": "zh"}
"""Follow-ups that ask for the previous answer in a language."""

WRITTEN_OUT = 0.75
"""How often a question comes from the phrasings written out one by one, rather than from a pattern."""

BLURRED = 0.25
"""How often an opening question loses or shuffles words, so that the answer comes to rest on its key words."""

MIXED = 0.15
"""How often an opening question is put together of parts of two that mean the same."""

REPEATED = 0.012
"""How often a question is said over and over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What a user says and the topic and language that answer it."""

    text: str
    topic: str
    language: Language


def follow(knowledge: topics.Knowledge, kind: str, language: Language, before: Turn | None) -> tuple[str, Language]:
    """Resolves a follow-up said in `language` after the turn `before`: the topic and the language of its answer."""
    if kind in SWITCHES:
        target: Language = "en" if kind == "in_en" else "zh"
        return (before.topic, target) if before else ("languages", target)
    if kind == "repeat":
        return (before.topic, before.language) if before else ("no_context", language)
    return knowledge.lead(kind, before.topic if before else None), language


def folded(text: str) -> str:
    """Reduces a question to its letters and digits, so that a copy is found whatever its case and punctuation."""
    return re.sub(r"[\W_]+", "", text.casefold()) or text


class Speaker:
    """Draws conversations from the training half of the material, reproducibly for a given generator."""

    def __init__(self, knowledge: topics.Knowledge, rng: random.Random) -> None:
        self._knowledge = knowledge
        self._rng = rng
        self._asked = [t for t in knowledge.topics.values() if t.sides["en"].ask]
        self._manners = [knowledge.topics[topic] for topic in MANNERS]
        self._kinds = list(knowledge.follow_ups.values())
        self._held_out = {
            folded(text)
            for topic in (*knowledge.topics.values(), *knowledge.follow_ups.values())
            for side in topic.sides.values()
            for text in side.dev + side.test
        }
        self._families: dict[str, list[topics.Topic]] = {}
        for topic in knowledge.topics.values():
            if topic.family:
                self._families.setdefault(topic.family, []).append(topic)

    def conversation(self, turns: int) -> list[Turn]:
        """Draws that many turns, none of them a held-out question."""
        while True:
            result = self._conversation(turns)
            if not any(folded(turn.text) in self._held_out for turn in result):
                return result

    def recital(self) -> list[Turn]:
        """Draws a topic, each as likely as any other, and what leads to its answer: a question, or two turns."""
        language = self._rng.choice(topics.LANGUAGES)
        topic = self._rng.choice(list(self._knowledge.topics.values()))
        leads = [(lead, kind) for lead in self._asked for kind in self._kinds if lead.follow.get(kind.id) == topic.id]
        if topic.sides[language].ask and not (leads and self._rng.random() < 0.3):
            asked = [Turn(text=self._question(topic.sides[language]), topic=topic.id, language=language)]
        elif leads:
            lead, kind = self._rng.choice(leads)
            asked = [
                Turn(text=self._question(lead.sides[language]), topic=lead.id, language=language),
                Turn(
                    text=grammar.draw(self._rng.choice(kind.sides[language].ask), self._rng),
                    topic=topic.id,
                    language=language,
                ),
            ]
        else:
            return self.conversation(1)
        return self.recital() if any(folded(turn.text) in self._held_out for turn in asked) else asked

    def _conversation(self, turns: int) -> list[Turn]:
        language: Language = "en" if self._rng.random() < 0.58 else "zh"
        result: list[Turn] = []
        for _ in range(turns):
            if self._rng.random() < 0.15:
                language = "zh" if language == "en" else "en"
            before = result[-1] if result else None
            leaning = self._rng.random() < (LEANING if before else 0.06)
            leads = len(result) + 1 < turns
            turn = self._leaning(language, before) if leaning else self._opening(language, bool(before) or leads, leads)
            text = turn.text
            if not leaning and self._rng.random() < BLURRED:
                text = noise.blur(text, language, self._rng)
            text = noise.roughen(text, language, self._rng)
            if self._rng.random() < REPEATED:
                text = noise.repeat(text, language, self._rng)
            result.append(Turn(text=text or turn.text, topic=turn.topic, language=turn.language))
        return result

    def rules(self) -> str:
        """Draws a system prompt of the sort that callers send; the model must not be thrown off by it."""
        words = topics.common_words(self._rng.choice(topics.LANGUAGES))
        return " ".join(self._rng.choice(words["rules"]) for _ in range(self._rng.randint(1, 3)))

    def _opening(self, language: Language, later: bool, leads: bool) -> Turn:
        draw = self._rng.random() + (0.2 if leads else 0.0)  # what follows is learned from topics, not from refusals
        if draw < STRANGERS:
            stranger = strangers.draw(language, self._rng)
            return Turn(text=stranger.text, topic=stranger.topic, language=language)
        if draw < STRANGERS + 0.03:
            return Turn(
                text=strangers.mash(self._rng), topic="unclear", language="en" if self._rng.random() < 0.5 else "zh"
            )
        pool = self._asked
        if later and self._rng.random() < 0.15:
            pool = self._manners
        elif later or draw < STRANGERS + 0.2:
            draw = self._rng.random()
            if draw < 0.7:  # openings that a follow-up can lean on are met more often
                pool = [t for t in self._asked if t.follow] if draw < 0.55 else [t for t in self._asked if t.family]
        topic = self._rng.choice(pool)
        text = self._question(topic.sides[language])
        if self._rng.random() < MIXED:
            text = noise.mix(text, self._question(topic.sides[language]), language, self._rng)
        return Turn(text=text, topic=topic.id, language=language)

    def _question(self, side: topics.Side) -> str:
        written = side.phrasings and self._rng.random() < WRITTEN_OUT
        return self._rng.choice(side.phrasings) if written else grammar.draw(self._rng.choice(side.ask), self._rng)

    def _leaning(self, language: Language, before: Turn | None) -> Turn:
        family = self._knowledge.topics[before.topic].family if before else ""
        if self._rng.random() < (0.4 if family else 0.08):
            return self._sibling(language, before, family)
        lead = self._knowledge.topics[before.topic].follow if before else {}
        kinds = self._kinds
        if lead and self._rng.random() < 0.7:
            kinds = [kind for kind in self._kinds if kind.id in lead]
        kind = self._rng.choice(kinds)
        text = grammar.draw(self._rng.choice(kind.sides[language].ask), self._rng)
        topic, answer_language = follow(self._knowledge, kind.id, language, before)
        return Turn(text=text, topic=topic, language=answer_language)

    def _sibling(self, language: Language, before: Turn | None, family: str) -> Turn:
        names = [t.member for t in self._families[family]] if family and self._rng.random() < 0.8 else None
        member = self._rng.choice(names or list(self._knowledge.members))
        name = self._rng.choice(self._knowledge.members[member].names[language])
        frame = self._rng.choice(topics.common_words(language)["sibling"])
        topic = self._knowledge.sibling(member, before.topic if before else None)
        return Turn(text=frame.replace("X", name), topic=topic, language=language)
