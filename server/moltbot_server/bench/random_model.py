"""A Llama-shaped model of random weights, made on the spot: what it says is noise, what it costs is real.

It is an ordinary model folder (weights, sentencepiece model, moltbot.yaml), so a core loads it like any other. Each of
its words is one token, and it never writes an end token or any other marker: an answer has as many tokens as were asked
for, which is what a measurement wants.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from ctranslate2.specs import common_spec, transformer_spec
from numpy.typing import NDArray
from sentencepiece import sentencepiece_model_pb2 as pieces_pb2

from moltbot_server.turns import Value

USER, BOT = "<|user|>", "<|bot|>"
OPENING = 3
"""Tokens of a prompt beside the words of its one message: `<s>`, the user's marker and the model's."""

_CONTROLS = ("<s>", "</s>", USER, BOT)
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_CONSONANTS, _VOWELS = "bdfghjklmnprstvwz", "aeiou"
_NEVER = -1e4


class Shape(Value, frozen=True, kw_only=True):
    """The sizes of a model; as they stand, of one of 134 million parameters."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    feed: int = 2048
    vocabulary: int = 32_000
    context_length: int = 2048

    @property
    def name(self) -> str:
        """A name that tells models of other sizes apart."""
        return f"random-{self.layers}x{self.width}-{self.vocabulary}-v1"


STANDARD = Shape()


def random_model(
    shape: Shape = STANDARD, *, cache: Path | None = None, progress: Callable[[str], None] | None = None
) -> Path:
    """Return the folder of a random model, made in a few seconds unless the cache has it.

    `cache` is by default `moltbot/bench` in the user's cache folder.
    """
    cache = cache or cache_folder()
    folder = cache / shape.name
    if (folder / "moltbot.yaml").is_file():
        return folder
    if progress is not None:
        progress(f"making a random model in {folder}")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".making-") as draft:
        _write(Path(draft) / "model", shape)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(Path(draft) / "model", folder)
    return folder


def cache_folder() -> Path:
    """Return where benchmarks keep what they make: `moltbot/bench` in XDG_CACHE_HOME or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "moltbot" / "bench"


def words(count: int = STANDARD.vocabulary) -> list[str]:
    """Return the words of a model with so many tokens; each is one token after a space or at a text's beginning."""
    return list(islice(_spoken(), count - len(_CONTROLS) - len(_BYTES) - 1))


def _spoken() -> Iterator[str]:
    for letters in product(_CONSONANTS, _VOWELS, _CONSONANTS, _VOWELS, _CONSONANTS):
        yield "".join(letters)


def _write(folder: Path, shape: Shape) -> None:
    vocabulary = ["<unk>", *_CONTROLS, *_BYTES, *(f"\u2581{word}" for word in words(shape.vocabulary))]
    if len(vocabulary) != shape.vocabulary:
        raise ValueError(f"there are no {shape.vocabulary} words; expected {len(vocabulary)} at most")
    spec = _spec(shape)
    spec.register_vocabulary(vocabulary)
    spec.config.bos_token, spec.config.eos_token, spec.config.unk_token = "<s>", "</s>", "<unk>"
    spec.validate()
    spec.optimize(quantization="int8")
    folder.mkdir()
    spec.save(str(folder))
    (folder / "tokenizer.model").write_bytes(_tokenizer(vocabulary))
    (folder / "moltbot.yaml").write_text(yaml.safe_dump(_description(shape), sort_keys=False), encoding="utf-8")


def _spec(shape: Shape) -> Any:
    """Return the weights: small random numbers, so that no word is likelier than another."""
    random = np.random.default_rng(7)

    def matrix(rows: int, columns: int) -> NDArray[np.float32]:
        return random.standard_normal((rows, columns), dtype=np.float32) * np.float32(0.02)

    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        shape.layers, shape.heads, activation=common_spec.Activation.SWISH, pre_norm=True, ffn_glu=True, rms_norm=True,
        rotary_dim=0, rotary_interleave=False,
    )  # fmt: skip
    decoder, width, ones = spec.decoder, shape.width, np.ones(shape.width, dtype=np.float32)
    decoder.scale_embeddings = False
    decoder.embeddings.weight = matrix(shape.vocabulary, width)
    decoder.projection.weight = matrix(shape.vocabulary, width)
    decoder.projection.bias = np.zeros(shape.vocabulary, dtype=np.float32)
    decoder.projection.bias[: 1 + len(_CONTROLS) + len(_BYTES)] = _NEVER
    decoder.layer_norm.gamma = ones
    for layer in decoder.layer:
        layer.self_attention.layer_norm.gamma = ones
        layer.self_attention.linear[0].weight = matrix(3 * width, width)
        layer.self_attention.linear[1].weight = matrix(width, width)
        layer.ffn.layer_norm.gamma = ones
        layer.ffn.linear_0.weight = matrix(shape.feed, width)
        layer.ffn.linear_0_noact.weight = matrix(shape.feed, width)
        layer.ffn.linear_1.weight = matrix(width, shape.feed)
    return spec


def _tokenizer(vocabulary: list[str]) -> bytes:
    """Return a sentencepiece model whose pieces are the vocabulary, in its order."""
    proto: Any = pieces_pb2
    model, kind = proto.ModelProto(), proto.ModelProto.SentencePiece
    for number, token in enumerate(vocabulary):
        piece = model.pieces.add(piece=token, score=-float(number) / len(vocabulary))
        if number == 0:
            piece.type = kind.UNKNOWN
        elif token in _CONTROLS:
            piece.type = kind.CONTROL
        elif token in _BYTES:
            piece.type = kind.BYTE
    model.trainer_spec.model_type = proto.TrainerSpec.UNIGRAM
    model.trainer_spec.vocab_size = len(vocabulary)
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    return bytes(model.SerializeToString())


def _description(shape: Shape) -> dict[str, object]:
    return {
        "family": "random",
        "id": shape.name,
        "display_name": "Random model",
        "context_length": shape.context_length,
        "chat_template": {
            "bos": "<s>",
            "system": {"prefix": USER, "suffix": ""},
            "user": {"prefix": USER, "suffix": ""},
            "assistant": {"prefix": BOT, "suffix": "</s>"},
            "stop": ["</s>"],
        },
    }
