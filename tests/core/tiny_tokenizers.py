"""Small `tokenizer.json` files of each kind that models come with, trained on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_model import LINES
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

MARKERS = ("<|im_start|>", "<|im_end|>", "<|end|>")
TYPED = ("<think>", "</think>", "<tool_call>")
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def special(*tokens: str, **flags: bool) -> list[AddedToken]:
    return [AddedToken(token, special=True, normalized=False, **flags) for token in tokens]


def added(*tokens: str) -> list[AddedToken]:
    return [AddedToken(token, special=False, normalized=False) for token in tokens]


def byte_level() -> Tokenizer:
    """Of the kind of GPT-2, Llama 3 and Qwen: tokens of bytes, written in an alphabet of their own."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(LINES * 4, trainer)
    tokenizer.add_special_tokens(special("<|endoftext|>", *MARKERS))
    tokenizer.add_tokens(added(*TYPED))
    return tokenizer


def llama() -> Tokenizer:
    """Of Llama 2's kind: a mark for each space, one before the text, and bytes for what is not known."""
    tokenizer = _spaced(special("<s>", "</s>", *MARKERS), added(*TYPED))
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    ends = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(ends)
    return tokenizer


def metaspace() -> Tokenizer:
    """Of later Llamas and Mistrals: the mark comes before the whole text only."""
    tokenizer = _spaced(special("<s>", "</s>", *MARKERS), added(*TYPED))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    ends = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(ends)
    return tokenizer


def gemma() -> Tokenizer:
    """Of Gemma's kind: no mark before the text, runs of spaces and of line ends as tokens of their own."""
    tokenizer = _spaced(special("<s>", "</s>", *MARKERS), added("\n\n", "▁▁", *TYPED))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def phi() -> Tokenizer:
    """Of Phi 3's kind: as Llama's, with markers that swallow the white space after them."""
    tokenizer = _spaced(special("<s>", "</s>", *MARKERS, rstrip=True), [])
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    ends = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(ends)
    return tokenizer


def unigram() -> Tokenizer:
    """Of T5's kind, whose model itself finds its control tokens in plain text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>", *MARKERS], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(LINES * 4, trainer)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "llama": llama,
    "metaspace": metaspace,
    "gemma": gemma,
    "phi": phi,
    "unigram": unigram,
}


def _spaced(specials: list[AddedToken], others: list[AddedToken]) -> Tokenizer:
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<unk>", *_BYTES], show_progress=False)
    trained.train_from_iterator([*LINES * 4, "two  spaces   three"] * 2, trainer)
    written: dict[str, Any] = json.loads(trained.to_str())
    # The bytes are words of the model and no tokens that are looked for in texts.
    written["added_tokens"] = [token for token in written["added_tokens"] if token["content"] == "<unk>"]
    written["model"] |= {"byte_fallback": True, "fuse_unk": True}
    written["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(written))
    tokenizer.add_special_tokens(specials)
    tokenizer.add_tokens(others)
    return tokenizer


def vocabulary(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return the tokens by id, as the weights of a model would have them."""
    return tuple(tokenizer.id_to_token(index) for index in range(tokenizer.get_vocab_size()))


def write(tokenizer: Tokenizer, folder: Path) -> Path:
    """Write `tokenizer.json` into a folder and return the file."""
    file = folder / "tokenizer.json"
    tokenizer.save(str(file))
    return file
