"""Measures the built-in model on text that it was not trained on: `python -m moltbot_server.demo_model.evaluate`.

Uses CTranslate2 and sentencepiece alone, greedily, as any program could.
"""

from __future__ import annotations

import argparse
import difflib
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import ctranslate2

from moltbot_server.demo_model import ARTIFACT, noise, strangers, topics
from moltbot_server.demo_model.dialogue import Turn, follow
from moltbot_server.demo_model.tokenizer import END, Tokenizer
from moltbot_server.demo_model.topics import Knowledge, Language

BATCH = 64
SIMILAR = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One prompt and the answers that are right for it.

    `topics` are the right ones; `language` is the one the answer must be in, or None where either will do.
    """

    group: str
    said: str
    topics: frozenset[str]
    language: Language | None
    history: tuple[Turn, ...] = ()
    system: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What came out of a case: the text, the topic and language that it is nearest to, and whether that is right."""

    case: Case
    text: str
    topic: str
    language: Language
    similarity: float
    right: bool


class Model:
    """The artefact, loaded the way that the core loads any CTranslate2 folder with a sentencepiece tokenizer."""

    def __init__(self, folder: Path = ARTIFACT, threads: int = 2) -> None:
        self.tokenizer = Tokenizer(folder / "tokenizer.model")
        self._generator = ctranslate2.Generator(str(folder), device="cpu", inter_threads=1, intra_threads=threads)

    def answer(self, prompts: Sequence[list[str]], limit: int = 400) -> list[str]:
        """Answers prompts greedily, in batches of similar length."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        texts = [""] * len(prompts)
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            results = self._generator.generate_batch(
                [prompts[index] for index in chosen],
                max_length=limit,
                sampling_topk=1,
                include_prompt_in_result=False,
                end_token=END,
            )
            for index, result in zip(chosen, results, strict=True):
                texts[index] = self.tokenizer.decode(result.sequences_ids[0])
        return texts


class Judge:
    """Finds the topic whose answer a text is, or is nearest to."""

    def __init__(self, knowledge: Knowledge) -> None:
        self._answers: list[tuple[str, Language, str]] = [
            (topic.id, language, topic.sides[language].say)
            for topic in knowledge.topics.values()
            for language in topics.LANGUAGES
        ]
        self._exact = {normal(text): (topic, language) for topic, language, text in self._answers}

    def nearest(self, text: str) -> tuple[str, Language, float]:
        """Returns topic, language and similarity (1.0 for the very answer)."""
        if found := self._exact.get(normal(text)):
            return *found, 1.0
        best: tuple[str, Language, float] = ("", "en", 0.0)
        for topic, language, answer in self._answers:
            matcher = difflib.SequenceMatcher(None, text, answer, autojunk=False)
            if matcher.real_quick_ratio() > best[2] and (ratio := matcher.ratio()) > best[2]:
                best = (topic, language, ratio)
        return best


def normal(text: str) -> str:
    """Folds case and spacing, for comparison."""
    return "".join(text.casefold().split())


def single(knowledge: Knowledge, split: str = "test") -> list[Case]:
    """Held-out phrasings, each as the first message of a conversation."""
    return [
        Case(group=f"topics_{language}", said=text, topics=frozenset({topic.id}), language=language)
        for topic in knowledge.topics.values()
        for language in topics.LANGUAGES
        for text in getattr(topic.sides[language], split)
    ]


def foreign(knowledge: Knowledge) -> list[Case]:
    """Held-out questions outside the model's knowledge; any refusal in the right language counts."""
    refusals = frozenset(topic.id for topic in knowledge.topics.values() if topic.refusal)
    return [
        Case(group=f"refusals_{language}", said=stranger.text, topics=refusals, language=language)
        for language in topics.LANGUAGES
        for stranger in strangers.held_out(language)
    ]


def second_turns(knowledge: Knowledge, seed: int = 11) -> list[Case]:
    """Follow-ups in held-out words after held-out first questions, and siblings after each member of a family."""
    rng = random.Random(seed)
    cases: list[Case] = []
    askable = [topic for topic in knowledge.topics.values() if topic.sides["en"].test]

    def add(kind: str, language: Language, said: str, first: topics.Topic) -> None:
        opening = rng.choice(first.sides[language].test)
        before = Turn(text=opening, topic=first.id, language=language)
        if kind == "sibling":
            topic, answer_language = knowledge.sibling(said, first.id), language
            said = rng.choice(
                ["what about X then", "and X, please"] if language == "en" else ["那要是X呢", "请问X呢"]
            ).replace("X", knowledge.members[said].names[language][0])
        else:
            topic, answer_language = follow(knowledge, kind, language, before)
        cases.append(
            Case(
                group=f"second_{kind}",
                said=said,
                topics=frozenset({topic}),
                language=answer_language,
                history=(before,),
            )
        )

    for kind in knowledge.follow_ups.values():
        leads = [topic for topic in askable if kind.id in topic.follow]
        for language in topics.LANGUAGES:
            for said in kind.sides[language].test:
                for first in [*rng.sample(leads, min(4, len(leads))), *rng.sample(askable, 4)]:
                    add(kind.id, language, said, first)
    for first in askable:
        if first.family:
            siblings = [t.member for t in askable if t.family == first.family and t.member != first.member]
            for language in topics.LANGUAGES:
                for member in siblings:
                    add("sibling", language, member, first)
    return cases


def disturbed(knowledge: Knowledge, seed: int = 13) -> list[Case]:
    """Held-out questions made harder: typing noise, a system prompt, unrelated earlier turns, a long history."""
    rng = random.Random(seed)
    cases: list[Case] = []
    plain = single(knowledge)
    rules = "You are the assistant of a bakery. Keep every answer friendly and short."

    def history(turns: int) -> tuple[Turn, ...]:
        return tuple(
            Turn(text=case.said, topic=next(iter(case.topics)), language=case.language or "en")
            for case in rng.sample(plain, turns)
        )

    for case in rng.sample(plain, 120):
        rough = noise.roughen(case.said, case.language or "en", rng, strength=1.5)
        cases.append(replace(case, group="noisy", said=rough))
        cases.append(replace(case, group="system_prompt", system=rules))
        cases.append(replace(case, group="after_unrelated", history=history(rng.randint(1, 3))))
    for case in rng.sample(plain, 40):
        cases.append(replace(case, group="long_history", history=history(13)))
    return cases


def nonsense(knowledge: Knowledge, seed: int = 17) -> list[Case]:
    """Emoji, mash and very long messages: any answer that the model was taught is sane, half-sentences are not."""
    rng = random.Random(seed)
    everything = frozenset(knowledge.topics)
    texts = [strangers.mash(rng) for _ in range(80)]
    texts += [" ".join(strangers.mash(rng) for _ in range(30))[:900] for _ in range(8)]
    texts += ["lorem ipsum dolor sit amet " * 30, "很长的话" * 120, "a" * 600, "🦀" * 60, "\n\n\n", "\u200b\u202e"]
    return [Case(group="nonsense", said=text, topics=everything, language=None) for text in texts]


def prompt(model: Model, knowledge: Knowledge, case: Case) -> list[str]:
    """Lays out a case as pieces."""
    turns = [(turn.text, knowledge.answer(turn.topic, turn.language)) for turn in case.history]
    return model.tokenizer.prompt([*turns, (case.said, "")], case.system)


def judge(model: Model, knowledge: Knowledge, cases: Sequence[Case]) -> list[Verdict]:
    """Answers all cases and judges the answers."""
    judgement = Judge(knowledge)
    texts = model.answer([prompt(model, knowledge, case) for case in cases])
    verdicts = []
    for case, text in zip(cases, texts, strict=True):
        topic, language, similarity = judgement.nearest(text)
        right = similarity >= SIMILAR and topic in case.topics and case.language in (None, language)
        verdicts.append(
            Verdict(case=case, text=text, topic=topic, language=language, similarity=similarity, right=right)
        )
    return verdicts


def all_cases(knowledge: Knowledge) -> list[Case]:
    """Everything that is measured, from the held-out material."""
    return [
        *single(knowledge),
        *foreign(knowledge),
        *second_turns(knowledge),
        *disturbed(knowledge),
        *nonsense(knowledge),
    ]


def figures(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Share of right answers by group, and over all second turns."""
    groups: dict[str, list[bool]] = {}
    for verdict in verdicts:
        groups.setdefault(verdict.case.group, []).append(verdict.right)
        if verdict.case.history and verdict.case.group.startswith("second_"):
            groups.setdefault("second_turns", []).append(verdict.right)
    return {group: round(sum(results) / len(results), 4) for group, results in groups.items()}


def main() -> None:
    """Prints the figures, and on request the wrong answers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument(
        "--model", type=Path, default=ARTIFACT, help="folder of the model (default: the one in the package)"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of CTranslate2 (default: %(default)s)")
    parser.add_argument("--dev", action="store_true", help="measure the dev questions instead of everything held out")
    parser.add_argument(
        "--wrong", metavar="GROUP", help="also print the wrong answers of a group, `all` for every group"
    )
    arguments = parser.parse_args()

    started = time.perf_counter()
    knowledge = topics.load_knowledge()
    model = Model(arguments.model, arguments.threads)
    cases = single(knowledge, "dev") if arguments.dev else all_cases(knowledge)
    verdicts = judge(model, knowledge, cases)
    report: dict[str, object] = {
        "figures": figures(verdicts),
        "cases": len(cases),
        "bytes": sum(path.stat().st_size for path in arguments.model.iterdir()),
        "seconds": round(time.perf_counter() - started, 1),
    }
    if arguments.json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        for group, share in figures(verdicts).items():
            print(f"{group:20} {share:7.1%}")
        print(f"{report['cases']} cases in {report['seconds']} s, model of {report['bytes']} bytes")
    for verdict in verdicts:
        if not verdict.right and arguments.wrong in ("all", verdict.case.group):
            wanted = ",".join(sorted(verdict.case.topics)) if len(verdict.case.topics) < 4 else "a refusal"
            got = f"{verdict.topic}/{verdict.language} ({verdict.similarity:.2f})"
            print(f"{verdict.case.group}: {verdict.case.said[:80]!r} wanted {wanted}, got {got}", file=sys.stderr)


if __name__ == "__main__":
    main()
