# ruff: noqa: RUF001  (Chinese punctuation is meant)
"""A tiny random Llama-shaped model in CTranslate2's format, made on the spot: what it says is noise, how is real."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import yaml
from ctranslate2.specs import common_spec, transformer_spec
from moltbot_server.demo_model import tokenizer

LINES = [
    "the quick brown fox jumps over the lazy dog and runs away from the old house",
    "how do I install the server and start it with a model of my own",
    "pack my box with five dozen liquor jugs, then say hello to everybody",
    "我想知道怎么安装这个服务器", "你好，世界！今天天气很好。", "请告诉我如何添加一个新的模型",
    "numbers like 0 1 2 3 4 5 6 7 8 9 and signs like . , : ; ! ? ( ) [ ] < > | / #",
]  # fmt: skip

TEMPLATE = {
    "bos": "<s>",
    "system": {"prefix": tokenizer.SYSTEM, "suffix": ""},
    "user": {"prefix": tokenizer.USER, "suffix": ""},
    "assistant": {"prefix": tokenizer.BOT, "suffix": tokenizer.END},
    "stop": [tokenizer.END],
}


@cache
def _weights(vocabulary: int, seed: int, width: int, layers: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = {"qkv": (3 * width, width), "out": (width, width), "gate": (2 * width, width), "up": (2 * width, width)}
    sizes |= {"down": (width, 2 * width)}
    weights = {"embed": (vocabulary, width), "project": (vocabulary, width)}
    weights |= {f"{layer}.{name}": size for layer in range(layers) for name, size in sizes.items()}
    return {name: rng.normal(0.0, 0.3, size).astype(np.float32) for name, size in weights.items()}


def make_tiny_model(
    folder: Path,
    *,
    seed: int = 1,
    width: int = 64,
    layers: int = 2,
    context_length: int = 256,
    endless: bool = False,
    words: Sequence[str] = (),
) -> Path:
    """Write model.bin, config.json, vocabulary.json, tokenizer.model and moltbot.yaml into a new folder; return it.

    An `endless` model never says its end token: its answers end at their limit only. With `words` as its vocabulary,
    <|end|> among them, it is left without a tokenizer.
    """
    folder.mkdir(parents=True)
    if not words:
        tokenizer.train(LINES * 4, folder / "tokenizer.model", 420)
        words = tokenizer.Tokenizer(folder / "tokenizer.model").vocabulary()
    words = list(words)
    weights = _weights(len(words), seed, width, layers)
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        layers, 4, activation=common_spec.Activation.SWISH, pre_norm=True, ffn_glu=True, rms_norm=True,
        rotary_dim=0, rotary_interleave=False,
    )  # fmt: skip
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = weights["embed"]
    decoder.projection.weight = weights["project"].copy()
    if endless:
        decoder.projection.weight[words.index(tokenizer.END)] = 0.0
    decoder.layer_norm.gamma = np.ones(width, dtype=np.float32)
    for index, layer in enumerate(decoder.layer):
        layer.self_attention.layer_norm.gamma = np.ones(width, dtype=np.float32)
        layer.ffn.layer_norm.gamma = np.ones(width, dtype=np.float32)
        layer.self_attention.linear[0].weight = weights[f"{index}.qkv"]
        layer.self_attention.linear[1].weight = weights[f"{index}.out"]
        layer.ffn.linear_0.weight = weights[f"{index}.gate"]
        layer.ffn.linear_0_noact.weight = weights[f"{index}.up"]
        layer.ffn.linear_1.weight = weights[f"{index}.down"]
    spec.register_vocabulary(words)
    spec.config.bos_token, spec.config.eos_token, spec.config.unk_token = "<s>", tokenizer.END, "<unk>"
    spec.validate()
    spec.optimize(quantization="int8")
    spec.save(str(folder))
    describe(folder, context_length=context_length)
    return folder


def describe(folder: Path, **changes: object) -> None:
    """Write the folder's moltbot.yaml anew with some fields changed; None takes a field out."""
    fields: dict[str, object] = {
        "family": "tiny", "id": "tiny", "display_name": "Tiny random model", "context_length": 256,
        "chat_template": TEMPLATE,
    }  # fmt: skip
    fields = {name: value for name, value in (fields | changes).items() if value is not None}
    (folder / "moltbot.yaml").write_text(yaml.safe_dump(fields, allow_unicode=True), encoding="utf-8")


def vocabulary(folder: Path) -> list[str]:
    """Return the tokens of a model's folder by id."""
    return [str(token) for token in json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))]
