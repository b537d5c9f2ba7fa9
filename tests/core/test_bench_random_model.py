"""The model that benchmarks make on the spot is an ordinary one, except that it never ends by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from moltbot_server.bench import random_model as module
from moltbot_server.bench.random_model import OPENING, STANDARD, Shape, cache_folder, random_model, words
from moltbot_server.models.engine import Chunk, Finished, stream
from moltbot_server.models.engines.local import LocalEngine
from moltbot_server.models.folder import read_folder
from moltbot_server.models.tokenizer import Tokenizer
from moltbot_server.turns import FinishReason, GenerationOptions, Message, Role, TextPart

SMALL = Shape(layers=2, width=64, heads=4, feed=128, vocabulary=1000, context_length=256)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(SMALL, cache=tmp_path_factory.mktemp("cache"))


def said(text: str) -> tuple[Message, ...]:
    return (Message(role=Role.USER, parts=(TextPart(text=text),)),)


@pytest.mark.parametrize("count", [1, 13, 125, 700])
def test_each_of_its_words_is_one_token(folder: Path, count: int) -> None:
    tokenizer = Tokenizer(read_folder(folder))
    spoken = words(SMALL.vocabulary)[:count]

    assert len(tokenizer.prompt(said(" ".join(spoken)))) == OPENING + len(spoken)


def test_the_standard_one_has_a_vocabulary_of_distinct_words() -> None:
    spoken = words()

    assert len(set(spoken)) == len(spoken) == STANDARD.vocabulary - 261


@pytest.mark.parametrize("temperature", [None, 1.5])
async def test_an_answer_has_as_many_tokens_as_were_asked_for(folder: Path, temperature: float | None) -> None:
    engine = LocalEngine(read_folder(folder))
    await engine.start()
    try:
        options = GenerationOptions(max_output_tokens=200, temperature=temperature)
        heard = [item async for item in stream(engine, said("babab"), options)]
    finally:
        await engine.close()

    end = heard[-1]
    assert isinstance(end, Finished)
    assert end.finish_reason is FinishReason.LENGTH
    assert (end.usage.input_tokens, end.usage.output_tokens) == (4, 200)
    text = "".join(item.text for item in heard if isinstance(item, Chunk))
    assert len(text.split()) == 200
    assert set(text.split()) <= set(words(SMALL.vocabulary))


def test_it_is_made_once_and_nothing_else_is_left_in_the_cache(folder: Path) -> None:
    before = (folder / "model.bin").stat()

    assert random_model(SMALL, cache=folder.parent) == folder
    assert (folder / "model.bin").stat().st_mtime_ns == before.st_mtime_ns
    assert [entry.name for entry in folder.parent.iterdir()] == [SMALL.name]


def test_one_that_was_broken_off_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / SMALL.name).mkdir()
    told: list[str] = []

    folder = random_model(SMALL, cache=tmp_path, progress=told.append)

    assert read_folder(folder).context_length == 256
    assert told == [f"making a random model in {folder}"]

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_spec", interrupted)
    with pytest.raises(KeyboardInterrupt):
        random_model(Shape(layers=1, vocabulary=1000), cache=tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []


def test_the_cache_lies_where_the_user_keeps_such_things(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere/cache")
    assert cache_folder() == Path("/somewhere/cache/moltbot/bench")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the standard says that those are ignored
    assert cache_folder() == Path.home() / ".cache" / "moltbot" / "bench"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "moltbot" / "bench"
