"""The streaming detokeniser against sentencepiece itself, over several kinds of tokenizers."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from moltbot_server.models.chat_template import ChatTemplate, Entry
from moltbot_server.models.detokenizer import Detokenizer
from moltbot_server.models.folder import ModelFolder
from moltbot_server.models.tokenizer import Tokenizer
from tiny_model import LINES

KINDS: dict[str, dict[str, object]] = {
    "as the built-in model": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "as Llama": {"split_digits": True, "remove_extra_whitespaces": False},
    "removes extra spaces": {"remove_extra_whitespaces": True},
    "adds no space": {"add_dummy_prefix": False, "remove_extra_whitespaces": False},
    "adds no space but removes": {"add_dummy_prefix": False, "remove_extra_whitespaces": True},
    "has no bytes": {"byte_fallback": False},
    "unigram": {"model_type": "unigram", "vocab_size": 380},
}


@cache
def load(kind: str) -> tuple[sentencepiece.SentencePieceProcessor, Tokenizer]:
    options = {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "allow_whitespace_only_pieces": True,
        "control_symbols": ["<|user|>", "<|end|>"],
        "user_defined_symbols": ["<typed>", "▁▁"],
        "minloglevel": 2,
    } | KINDS[kind]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 4 + ["  two  spaces   three "] * 9), model_writer=model, **options
    )
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        path.write_bytes(model.getvalue())
        pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        described = ModelFolder(
            path=Path(folder),
            id="t",
            display_name="t",
            family="t",
            context_length=256,
            template=ChatTemplate(user=Entry(), assistant=Entry()),
            tokenizer=path,
            vocabulary=tuple(pieces.id_to_piece(index) for index in range(pieces.vocab_size())),
            eos_token="</s>",
        )
        return pieces, Tokenizer(described)


def cut(ids: list[int], sizes: list[int]) -> list[list[int]]:
    parts, at = [], 0
    for size in sizes:
        parts.append(ids[at : at + size])
        at += size
    return [*parts, ids[at:]]


def streamed(tokenizer: Tokenizer, parts: list[list[int]]) -> list[str]:
    decoder = Detokenizer(tokenizer.surfaces)
    return [*(decoder.feed(part) for part in parts), decoder.flush()]


SIZES = st.lists(st.integers(0, 3), max_size=12)
TEXTS = st.text(
    st.sampled_from("ab the 你好世界 🎉👩‍👩‍👧🇨🇳é\n\t  ▁<|user|>") | st.characters(exclude_categories=["Cs"]),
    max_size=40,
)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), sizes=SIZES)
@settings(max_examples=150, deadline=None)
def test_random_ids_read_as_sentencepiece_reads_them(kind: str, data: st.DataObject, sizes: list[int]) -> None:
    pieces, tokenizer = load(kind)
    lone = [
        pieces.piece_to_id(word) for word in ("▁", "▁▁", "<|user|>", "<unk>", "<0xF0>", "<0x9F>", "<0x8E>", "<0x89>")
    ]
    ids = data.draw(st.lists(st.integers(0, pieces.vocab_size() - 1) | st.sampled_from(lone), max_size=30))
    assert "".join(streamed(tokenizer, cut(ids, sizes))) == pieces.decode(ids)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "has no bytes"])
@given(text=TEXTS, sizes=SIZES)
@settings(max_examples=150, deadline=None)
def test_text_streams_in_whole_characters(kind: str, text: str, sizes: list[int]) -> None:
    pieces, tokenizer = load(kind)
    text = text.replace("\ufffd", "")
    parts = streamed(tokenizer, cut(pieces.encode(text), sizes))
    assert "".join(parts) == pieces.decode(pieces.encode(text))
    assert not any("\ufffd" in part for part in parts)


def test_an_emoji_made_of_bytes_appears_only_when_it_is_whole() -> None:
    pieces, tokenizer = load("as the built-in model")
    ids = pieces.encode("ok🎉")
    parts = streamed(tokenizer, [[index] for index in ids])
    assert parts[-5:] == ["", "", "", "🎉", ""]
    assert "".join(parts) == "ok🎉"


def test_a_character_that_never_completes_is_shown_as_broken_at_the_end() -> None:
    pieces, tokenizer = load("as the built-in model")
    half = [pieces.piece_to_id("<0xE4>"), pieces.piece_to_id("<0xBD>")]
    assert streamed(tokenizer, [half]) == ["", "\ufffd\ufffd"]


def test_a_broken_character_does_not_swallow_the_text_after_it() -> None:
    pieces, tokenizer = load("as the built-in model")
    ids = [pieces.piece_to_id("<0xE4>"), pieces.piece_to_id("a"), pieces.piece_to_id("<0xBD>"), pieces.piece_to_id("b")]
    assert streamed(tokenizer, [[index] for index in ids]) == ["", "\ufffda", "\ufffd", "b", ""]
