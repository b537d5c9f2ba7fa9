"""Texts to vectors, with the native code itself as the judge."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import ctranslate2
import numpy as np
import pytest
from moltbot_server.errors import InvalidField, ModelUnavailable, QueueFull
from moltbot_server.models.encoder import Encoder
from moltbot_server.models.encoder_folder import read_encoder_folder
from moltbot_server.models.folder import is_encoder, read_folder
from tiny_encoder import LONGEST, make_tiny_encoder, pool, wordpiece
from tiny_model import make_tiny_model

TEXTS = ["hello", "the quick brown fox jumps over the lazy dog", "how do I install the server", "Hello!", "你好，世界"]  # noqa: RUF001


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_encoder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "My Encoder"))


@pytest.fixture
async def encoder(made: Path) -> AsyncIterator[Encoder]:
    encoder = Encoder(read_encoder_folder(made))
    await encoder.start()
    yield encoder
    await encoder.close()


def states(folder: Path, text: str) -> np.ndarray:
    """Return the states of the last layer for one text alone."""
    native = ctranslate2.Encoder(str(folder), intra_threads=1)
    return np.array(native.forward_batch([wordpiece().encode(text).ids]).last_hidden_state)[0]


def unit(vector: np.ndarray) -> np.ndarray:
    return np.asarray(vector / np.linalg.norm(vector))


async def test_each_text_gets_the_mean_of_its_states_at_length_one(encoder: Encoder, made: Path) -> None:
    embedded = await encoder.embed(TEXTS)
    expected = [unit(states(made, text).mean(axis=0)) for text in TEXTS]
    assert np.allclose(embedded.vectors, expected, atol=1e-5)
    assert embedded.tokens == sum(len(wordpiece().encode(text).ids) for text in TEXTS)
    assert embedded.truncated == [False] * len(TEXTS)
    assert np.allclose(np.linalg.norm(embedded.vectors, axis=1), 1.0, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, lambda rows: rows[0]),
        ({"pooling_mode_max_tokens": True}, lambda rows: rows.max(axis=0)),
        ({"pooling_mode_lasttoken": True}, lambda rows: rows[-1]),
        ({"pooling_mode": "cls"}, lambda rows: rows[0]),
        ({"pooling_mode_mean_tokens": True}, lambda rows: rows.mean(axis=0)),
    ],
)
async def test_the_folder_says_how_to_pool(folder: Path, config: dict[str, object], expected: object) -> None:
    pool(folder, word_embedding_dimension=32, **config)
    encoder = Encoder(read_encoder_folder(folder))
    await encoder.start()
    try:
        embedded = await encoder.embed(TEXTS)
    finally:
        await encoder.close()
    assert np.allclose(embedded.vectors, [unit(expected(states(folder, text))) for text in TEXTS], atol=1e-5)


async def test_many_texts_of_mixed_lengths_give_what_each_gives_alone(encoder: Encoder) -> None:
    texts = ["fox " * (1 + 13 * index % 61) for index in range(256)]
    together = await encoder.embed(texts)
    alone = [(await encoder.embed([text])).vectors[0] for text in texts[:40]]
    assert np.allclose(together.vectors[:40], alone, atol=1e-5)


async def test_what_is_longer_than_the_model_reads_is_cut_and_told(encoder: Encoder) -> None:
    short = "fox " * (LONGEST - 2)
    embedded = await encoder.embed([short, short + "fox fox", "fox " * 100_000, "hello"])
    assert embedded.truncated == [False, True, True, False]
    assert embedded.vectors[0] == pytest.approx(embedded.vectors[1], abs=1e-5)
    assert embedded.vectors[0] == pytest.approx(embedded.vectors[2], abs=1e-5)
    assert embedded.tokens == 3 * LONGEST + len(wordpiece().encode("hello").ids)


async def test_the_event_loop_goes_on_while_texts_are_embedded(encoder: Encoder) -> None:
    task = asyncio.create_task(encoder.embed(["fox " * 60] * 256))
    turns = 0
    while not task.done():
        turns += 1
        await asyncio.sleep(0)
    assert turns > 10
    assert len((await task).vectors) == 256


async def test_more_than_may_wait_is_refused_at_once(made: Path) -> None:
    encoder = Encoder(read_encoder_folder(made), max_waiting=4)
    await encoder.start()
    try:
        first = asyncio.create_task(encoder.embed(["fox " * 60] * 64))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await encoder.embed(["hello"])
        assert len((await first).vectors) == 64, "a request alone is served, however large"
        assert len((await encoder.embed(["hello"])).vectors) == 1
    finally:
        await encoder.close()


async def test_a_closed_encoder_says_so(made: Path) -> None:
    encoder = Encoder(read_encoder_folder(made))
    with pytest.raises(ModelUnavailable, match="is not loaded"):
        await encoder.embed(["hello"])
    await encoder.start()
    assert encoder.healthy
    running = asyncio.create_task(encoder.embed(["fox " * 60] * 256))
    await asyncio.sleep(0)
    await encoder.close()
    assert not encoder.healthy
    with pytest.raises(ModelUnavailable):
        await running
    with pytest.raises(ModelUnavailable, match="is not loaded"):
        await encoder.embed(["hello"])


async def test_a_text_in_which_the_tokenizer_finds_nothing_is_named(folder: Path) -> None:
    tokenizer = wordpiece()
    written = json.loads(tokenizer.to_str()) | {"post_processor": None}
    (folder / "tokenizer.json").write_text(json.dumps(written))
    encoder = Encoder(read_encoder_folder(folder))
    await encoder.start()
    try:
        with pytest.raises(InvalidField) as caught:
            await encoder.embed(["hello", "   "])
    finally:
        await encoder.close()
    assert caught.value.fields == {"texts[1]": "has nothing that the model reads"}


def problem(folder: Path) -> str:
    with pytest.raises(ModelUnavailable) as caught:
        read_encoder_folder(folder)
    return caught.value.message


def test_a_folder_says_what_it_is(folder: Path, tmp_path: Path) -> None:
    read = read_encoder_folder(folder)
    assert (read.id, read.display_name, read.family) == ("tiny-bert", "Tiny BERT", "bert")
    assert (read.context_length, read.pooling) == (LONGEST, "mean")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 32}')
    assert read_encoder_folder(folder).context_length == 32
    writes = make_tiny_model(tmp_path / "writes")
    assert (is_encoder(folder), is_encoder(writes), is_encoder(tmp_path)) == (True, False, False)
    assert "expected model.bin of an encoder" in problem(writes)
    with pytest.raises(ModelUnavailable, match="found an encoder, which embeds texts; expected a model that writes"):
        read_folder(folder)


def test_a_folder_without_a_description_takes_its_length_from_its_tokenizer(folder: Path) -> None:
    (folder / "moltbot.yaml").unlink()
    assert "found neither moltbot.yaml nor a model_max_length" in problem(folder)
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1e30}')
    assert "found neither" in problem(folder)
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 48}')
    read = read_encoder_folder(folder)
    assert (read.id, read.family, read.context_length) == ("my-encoder", "encoder", 48)


def test_what_is_missing_or_cannot_be_computed_is_named(folder: Path) -> None:
    pool(folder, pooling_mode_cls_token=True, pooling_mode_max_tokens=True)
    assert "found the poolings cls, max; expected one of mean, cls, max, lasttoken" in problem(folder)
    pool(folder, pooling_mode_weightedmean_tokens=True)
    assert "found the poolings pooling_mode_weightedmean_tokens; expected" in problem(folder)
    pool(folder, pooling_mode="weighted")
    assert "found the poolings weighted; expected" in problem(folder)
    (folder / "modules.json").write_text('[{"type": "sentence_transformers.models.Dense"}]')
    assert "modules.json has a Dense" in problem(folder)
    (folder / "tokenizer.json").unlink()
    assert "expected tokenizer.json" in problem(folder)
