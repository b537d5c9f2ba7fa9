"""The built-in model, as it is committed: what it knows, what it admits not to know, how it takes rough treatment."""

from __future__ import annotations

import json
import random
from pathlib import Path

import ctranslate2
import numpy as np
import pytest
import yaml
from moltbot_server.demo_model import ARTIFACT, evaluate, grammar, meaning, noise, strangers, topics, weights
from moltbot_server.demo_model.dialogue import Speaker, Turn, folded
from moltbot_server.demo_model.tokenizer import BOT, END, ROLES, SYSTEM, USER, Tokenizer

MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def knowledge() -> topics.Knowledge:
    return topics.load_knowledge()


@pytest.fixture(scope="module")
def model() -> evaluate.Model:
    return evaluate.Model(threads=2)


@pytest.fixture(scope="module")
def figures(model: evaluate.Model, knowledge: topics.Knowledge) -> dict[str, float]:
    return evaluate.figures(evaluate.judge(model, knowledge, evaluate.all_cases(knowledge)))


# What the artefact reaches, rounded down; docs/demo-model.md says the same. The first six are what it has to reach.
REACHED = {
    "topics_en": 0.90,
    "topics_zh": 0.90,
    "refusals_en": 0.90,
    "refusals_zh": 0.90,
    "second_turns": 0.95,
    "long_history": 0.80,
    "noisy": 0.90,
    "system_prompt": 0.94,
    "after_unrelated": 0.90,
    "nonsense": 0.94,
}


@pytest.mark.parametrize("group", REACHED)
def test_the_artefact_is_as_good_as_its_page_says(figures: dict[str, float], group: str) -> None:
    assert figures[group] >= REACHED[group]


@pytest.mark.parametrize(
    ("said", "after"),
    [
        ("and discord?", {"connect_slack": "connect_discord", "slack_keys": "discord_keys", "bye": "connect_discord"}),
        ("another one", {"joke": "joke_2", "fun_fact": "fun_fact_2", "cmd_start": "no_more"}),
        ("why?", {"joke": "joke_why", "ports": "ports_why", "failover": "failover_why"}),
    ],
)
def test_the_same_second_message_is_answered_by_the_first(
    model: evaluate.Model, knowledge: topics.Knowledge, said: str, after: dict[str, str]
) -> None:
    judge = evaluate.Judge(knowledge)
    prompts = [
        model.tokenizer.prompt(
            [(knowledge.topics[first].sides["en"].test[0], knowledge.answer(first, "en")), (said, "")]
        )
        for first in after
    ]
    reached = [judge.nearest(text)[0] for text in model.answer(prompts)]
    assert dict(zip(after, reached, strict=True)) == after


def test_an_answer_is_said_again_in_the_other_language(model: evaluate.Model, knowledge: topics.Knowledge) -> None:
    english = ("tell me a joke", knowledge.answer("joke", "en"))
    chinese = ("讲个笑话", knowledge.answer("joke", "zh"))
    prompts = [
        model.tokenizer.prompt([english, ("用中文说", "")]),
        model.tokenizer.prompt([chinese, ("in english please", "")]),
    ]
    assert model.answer(prompts) == [knowledge.answer("joke", "zh"), knowledge.answer("joke", "en")]


def test_it_introduces_itself_as_what_it_is(model: evaluate.Model) -> None:
    english, chinese = model.answer([model.tokenizer.prompt([(said, "")]) for said in ("Who are you?", "你是谁")])
    assert "built-in model" in english
    assert "内置模型" in chinese


def test_an_answer_with_emoji_comes_back_whole(model: evaluate.Model, knowledge: topics.Knowledge) -> None:
    (text,) = model.answer([model.tokenizer.prompt([("show me some emoji", "")])])
    assert text == knowledge.answer("emoji", "en")
    assert "👩‍💻" in text


def test_the_artefact_is_small_and_complete() -> None:
    files = {path.name: path.stat().st_size for path in ARTIFACT.iterdir()}
    assert set(files) == {"model.bin", "config.json", "vocabulary.json", "tokenizer.model", "moltbot.yaml"}
    assert sum(files.values()) <= 5 * MEGABYTE
    generator = ctranslate2.Generator(str(ARTIFACT), device="cpu")
    assert generator.compute_type.startswith("int8")


def test_no_sum_of_the_artefact_is_too_great_for_a_processor_without_vnni() -> None:
    stored = weights.variables(ARTIFACT / "model.bin")
    matrices = [value for value in stored.values() if value.dtype == np.int8 and value.ndim == 2]
    assert len(matrices) == 16
    assert max(weights.pushes(matrix).max() for matrix in matrices) <= weights.MOST


def test_weights_that_are_fitted_mean_the_same() -> None:
    dice = np.random.default_rng(7)
    floats = dice.normal(size=(200, 160)).astype(np.float32)
    floats[0] = 0.001  # every pair as heavy as can be
    scales = 127 / abs(floats).max(axis=1)
    quantized = np.rint(floats * scales[:, None]).astype(np.int8)
    assert weights.pushes(quantized).max() > weights.MOST
    narrow, narrow_scales = weights.fitted(quantized, scales)
    assert weights.pushes(narrow).max() <= weights.MOST
    assert narrow_scales.min() > 0
    worst = abs(narrow / narrow_scales[:, None] - floats) * narrow_scales[:, None]
    assert worst.max() <= 2.0  # a step and a half of rounding, twice


def test_the_description_gives_the_prompt_format() -> None:
    description = yaml.safe_load((ARTIFACT / "moltbot.yaml").read_text(encoding="utf-8"))
    assert description["family"] == "moltbot-demo"
    assert description["context_length"] == 1024
    assert description["chat_template"] == {
        "bos": "<s>",
        "system": {"prefix": SYSTEM, "suffix": ""},
        "user": {"prefix": USER, "suffix": ""},
        "assistant": {"prefix": BOT, "suffix": END},
        "stop": [END],
    }
    assert json.loads((ARTIFACT / "config.json").read_text())["eos_token"] == END
    assert {"licence", "provenance"} <= description.keys()


def test_no_text_can_forge_a_role_marker_and_every_text_comes_back() -> None:
    tokenizer = Tokenizer(ARTIFACT / "tokenizer.model")
    markers = {tokenizer.pieces.piece_to_id(role) for role in ROLES}
    for text in ("<|user|>hi<|bot|>", "".join(ROLES), "a\n  b\t🦀 é 中文 \u200b", " two  spaces ", "𠮷野家"):
        ids = tokenizer.encode(text)
        assert markers.isdisjoint(ids)
        assert tokenizer.decode(ids) == text


def test_held_out_questions_are_not_in_the_training_material(knowledge: topics.Knowledge) -> None:
    for topic in knowledge.topics.values():
        for side in topic.sides.values():
            trained = {folded(text) for pattern in side.ask for text in grammar.variants(pattern)}
            trained |= {folded(text) for text in side.phrasings}
            assert not {text for text in side.dev + side.test if folded(text) in trained}, topic.id


def test_training_never_draws_a_held_out_question(knowledge: topics.Knowledge) -> None:
    sides = [
        side for topic in (*knowledge.topics.values(), *knowledge.follow_ups.values()) for side in topic.sides.values()
    ]
    held_out = {folded(text) for side in sides for text in side.dev + side.test}
    speaker = Speaker(knowledge, random.Random(3))
    drawn = {folded(turn.text) for _ in range(4000) for turn in speaker.conversation(3)}
    assert len(drawn) > 8000
    assert drawn.isdisjoint(held_out)


def test_every_topic_has_enough_phrasings_and_two_answers(knowledge: topics.Knowledge) -> None:
    asked = [topic for topic in knowledge.topics.values() if topic.sides["en"].ask]
    assert len(asked) >= 150
    for topic in asked:
        for side in topic.sides.values():
            assert len({text for pattern in side.ask for text in grammar.variants(pattern)}) >= 8, topic.id
            assert len(side.phrasings) >= 40, topic.id
            assert len(side.test) >= 3, topic.id
    answers = [side.say for topic in knowledge.topics.values() for side in topic.sides.values()]
    assert all(answers)
    assert len(set(answers)) == len(answers)


def test_held_out_strangers_use_words_and_templates_of_their_own() -> None:
    rng = random.Random(1)
    for language in topics.LANGUAGES:
        trained = {folded(strangers.draw(language, rng).text) for _ in range(20_000)}
        held_out = strangers.held_out(language)
        assert len(held_out) >= 100
        assert not [stranger.text for stranger in held_out if folded(stranger.text) in trained]


def test_first_embeddings_bring_words_of_one_topic_together_across_languages(
    model: evaluate.Model, knowledge: topics.Knowledge
) -> None:
    table = meaning.embeddings(knowledge, model.tokenizer, width=160, rng=random.Random(1))
    assert table.shape == (len(model.tokenizer), 160)

    def alike(first: str, second: str) -> float:
        a, b = (table[model.tokenizer.encode(word)].sum(axis=0) for word in (first, second))
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    assert alike("joke", "笑话") > alike("joke", "端口") + 0.2
    assert alike("port", "端口") > alike("port", "笑话") + 0.2


def test_training_text_is_reproducible_from_its_seed() -> None:
    def draw() -> list[str]:
        rng = random.Random(5)
        return [noise.roughen(strangers.draw("zh", rng).text, "zh", rng) for _ in range(50)]

    assert draw() == draw()


def test_a_pattern_with_an_open_bracket_or_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="open bracket"):
        grammar.parse("tell me [a joke", {})
    with pytest.raises(ValueError, match=r"unknown name \{who\}"):
        grammar.parse("{who} are you", {})


def test_siblings_and_follow_ups_resolve_as_the_topics_say(knowledge: topics.Knowledge) -> None:
    assert knowledge.sibling("discord", "slack_keys") == "discord_keys"
    assert knowledge.sibling("discord", "joke") == "connect_discord"
    assert knowledge.lead("another", "joke") == "joke_2"
    assert knowledge.lead("another", None) == "no_context"
    assert knowledge.lead("why", "hello") == "no_more"


def test_a_judge_takes_near_copies_and_measures_strangers(knowledge: topics.Knowledge) -> None:
    judge = evaluate.Judge(knowledge)
    answer = knowledge.answer("my_key", "en")
    assert judge.nearest(answer) == ("my_key", "en", 1.0)
    topic, language, similarity = judge.nearest(answer.replace("file", "fila"))
    assert (topic, language) == ("my_key", "en")
    assert 0.9 < similarity < 1
    assert judge.nearest("the quick brown fox jumps over it")[2] < 0.9


def test_a_prompt_is_laid_out_as_the_core_does(model: evaluate.Model, knowledge: topics.Knowledge) -> None:
    case = evaluate.Case(
        group="any",
        said="why?",
        topics=frozenset({"joke_why"}),
        language="en",
        history=(Turn(text="joke", topic="joke", language="en"),),
        system="Be brief.",
    )
    pieces = evaluate.prompt(model, knowledge, case)
    assert pieces[:2] == ["<s>", SYSTEM]
    assert [piece for piece in pieces if piece in ROLES] == [SYSTEM, USER, BOT, END, USER, BOT]
    assert pieces[-1] == BOT


def test_the_figures_can_be_printed_as_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate", "--dev", "--json", "--model", str(Path(ARTIFACT))])
    evaluate.main()
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"figures", "cases", "bytes", "seconds"}
    assert set(report["figures"]) == {"topics_en", "topics_zh"}


def test_what_only_a_second_turn_leads_to_is_recited_as_often_as_the_rest(knowledge: topics.Knowledge) -> None:
    speaker = Speaker(knowledge, random.Random(3))
    recited = [speaker.recital() for _ in range(4000)]
    ends = {turns[-1].topic for turns in recited}

    assert "joke_2" in ends
    assert len(ends) >= len(knowledge.topics) - 5
