# ruff: noqa: RUF001  (Chinese punctuation is meant)
"""What people type who try a bot out or lean on a key: the built-in model has words for all of it."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncIterator

import pytest
from moltbot_server.demo_model import ARTIFACT
from moltbot_server.models.engine import Chunk, stream
from moltbot_server.models.engines.local import LocalEngine
from moltbot_server.models.folder import read_folder
from moltbot_server.turns import GenerationOptions, Message, Role, TextPart

CHINESE = re.compile(r"[\u4e00-\u9fff]")


@pytest.fixture
async def engine() -> AsyncIterator[LocalEngine]:
    """The built-in model, loaded."""
    engine = LocalEngine(read_folder(ARTIFACT))
    await engine.start()
    yield engine
    await engine.close()


async def answer(engine: LocalEngine, *said: str) -> str:
    """Return the answer to the last of what was said; before it people and model took turns."""
    roles = [Role.USER, Role.ASSISTANT] * len(said)
    messages = [Message(role=role, parts=(TextPart(text=text),)) for role, text in zip(roles, said, strict=False)]
    pieces = [piece async for piece in stream(engine, messages, GenerationOptions())]
    return "".join(piece.text for piece in pieces if isinstance(piece, Chunk))


@pytest.mark.parametrize(
    "said",
    [
        *("hello " * 300, "hello? " * 300, "thanks " * 200, "what " * 60, "hello no " * 90, "yes\n" * 200),
        *("a" * 2000, "ha" * 400, "!" * 500, "1" * 2000, "1234567890" * 50, "?", "-", "\U0001f600", "\U0001f600" * 100),
        *("你好" * 300, "谢谢" * 200, "是" * 300, "啊" * 2000, "怎么安装？" * 60, "？" * 400, "。", "启动 怎么 " * 60),
    ],
    ids=lambda said: f"{said[:12].strip()} x {len(said)}",
)
async def test_whatever_is_typed_is_answered_in_words_and_in_a_few_of_them(engine: LocalEngine, said: str) -> None:
    text = await answer(engine, said)

    assert text.strip()
    assert len(text) < 1500
    assert not re.search(r"(\b\w{3,}\b)(\W+\1){4}", text), "it lost its thread"


async def test_a_question_that_is_repeated_is_answered_like_the_question_in_its_language(engine: LocalEngine) -> None:
    assert await answer(engine, "hello " * 300) == await answer(engine, "hello") != ""
    assert await answer(engine, "怎么安装？" * 60) == await answer(engine, "怎么安装？") != ""
    assert not CHINESE.search(await answer(engine, "thanks " * 200))
    assert CHINESE.search(await answer(engine, "谢谢" * 200))


async def test_blanks_around_a_question_change_nothing(engine: LocalEngine) -> None:
    assert await answer(engine, "\n  hello \n\n") == await answer(engine, "hello")


async def test_no_answer_of_many_odd_conversations_is_empty(engine: LocalEngine) -> None:
    chance = random.Random(7)
    words = ["hello", "你好", "what", "怎么", "a", "1", "?", "\U0001f600", "模型", "the", "，", "thanks", "no", "启动"]

    def odd() -> str:
        some = chance.choices(words, k=chance.choice((1, 2, 3)))
        return chance.choice((" ", "")).join(some * chance.choice((1, 5, 20, 60)))

    said = [[odd(), "Hello!", odd()] if chance.random() < 0.3 else [odd()] for _ in range(240)]
    for at in range(0, len(said), 24):
        texts = await asyncio.gather(*(answer(engine, *each) for each in said[at : at + 24]))
        assert all(text.strip() for text in texts), [
            each for each, text in zip(said[at:], texts, strict=False) if not text
        ]
