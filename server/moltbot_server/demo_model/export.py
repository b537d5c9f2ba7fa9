"""Writes the trained weights as a CTranslate2 folder, int8, with its tokenizer and description."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from ctranslate2.specs import common_spec, transformer_spec
from ctranslate2.specs.model_spec import NumpyVariable

from moltbot_server.demo_model.network import EPSILON, Params, Shape, as_arrays
from moltbot_server.demo_model.tokenizer import BOT, END, SYSTEM, USER, Tokenizer
from moltbot_server.demo_model.weights import fitted, variables

CONTEXT_LENGTH = 1024
PLACES = {
    "attend_norm": "self_attention/layer_norm/gamma",
    "qkv": "self_attention/linear_0/weight",
    "out": "self_attention/linear_1/weight",
    "feed_norm": "ffn/layer_norm/gamma",
    "gate": "ffn/linear_0/weight",
    "up": "ffn/linear_0_noact/weight",
    "down": "ffn/linear_1/weight",
}
"""Where CTranslate2 keeps the weights of a layer."""


def description(shape: Shape) -> dict[str, object]:
    """Describes the model to the core: family, context, chat template, and where it comes from."""
    return {
        "family": "moltbot-demo",
        "name": "MoltBot built-in model",
        "context_length": CONTEXT_LENGTH,
        "repeats": 2,
        "continuation": False,  # an answer begins with the token of its topic
        "languages": ["en", "zh"],
        "chat_template": {
            "bos": "<s>",
            "system": {"prefix": SYSTEM, "suffix": ""},
            "user": {"prefix": USER, "suffix": ""},
            "assistant": {"prefix": BOT, "suffix": END},
            "stop": [END],
        },
        "architecture": (
            f"Llama-shaped decoder, {shape.layers} layers, width {shape.width}, {shape.heads} heads, "
            f"vocabulary {shape.vocabulary}, tied embeddings, int8"
        ),
        "licence": "Apache-2.0",
        "provenance": (
            "Trained from scratch by `python -m moltbot_server.demo_model.train` on the questions and answers in "
            "moltbot_server/demo_model/data, all written for MoltBot; no other text and no other weights went into it."
        ),
    }


def restore(folder: Path, shape: Shape) -> Params:
    """Reads back the weights of an exported model, to train it further; rounding to int8 is all that is lost."""
    stored = variables(folder / "model.bin")
    found = {
        name: value / stored[f"{name}_scale"][:, None] if f"{name}_scale" in stored else value
        for name, value in stored.items()
    }

    def layer(index: int) -> dict[str, np.ndarray]:
        prefix = f"decoder/layer_{index}/"
        return {name: found[prefix + place] for name, place in PLACES.items()}

    params: Params = {"embed": found["decoder/embeddings/weight"], "norm": found["decoder/layer_norm/gamma"]}
    params |= {f"layer{index}": layer(index) for index in range(shape.layers)}
    return as_arrays(params)


def mean(several: Sequence[Params]) -> Params:
    """Returns the mean of the weights of trainings that began from one model; it often knows more than each of them."""

    def of(values: Sequence[Any]) -> Any:
        if isinstance(values[0], dict):
            return {name: of([value[name] for value in values]) for name in values[0]}
        return sum(values[1:], values[0]) / len(values)

    found: Params = of(several)
    return found


def _linears(layer: transformer_spec.TransformerDecoderLayerSpec) -> list[common_spec.LinearSpec]:
    feed = layer.ffn
    return [*layer.self_attention.linear, feed.linear_0, feed.linear_0_noact, feed.linear_1]


def export(params: Params, shape: Shape, tokenizer: Path, folder: Path) -> None:
    """Replaces `folder` by model.bin, config.json, vocabulary.json, tokenizer.model and moltbot.yaml."""
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        shape.layers,
        shape.heads,
        activation=common_spec.Activation.SWISH,
        pre_norm=True,
        ffn_glu=True,
        rms_norm=True,
        rotary_dim=0,
        rotary_interleave=False,
    )

    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = np.array(params["embed"], dtype=np.float32)
    decoder.projection.weight = np.array(params["embed"], dtype=np.float32)  # equal arrays are stored once
    decoder.layer_norm.gamma = np.array(params["norm"])
    for index, layer in enumerate(decoder.layer):
        weights = {name: np.array(value) for name, value in params[f"layer{index}"].items()}
        layer.self_attention.layer_norm.gamma = weights["attend_norm"]
        layer.self_attention.linear[0].weight = weights["qkv"]
        layer.self_attention.linear[1].weight = weights["out"]
        layer.ffn.layer_norm.gamma = weights["feed_norm"]
        layer.ffn.linear_0.weight = weights["gate"]
        layer.ffn.linear_0_noact.weight = weights["up"]
        layer.ffn.linear_1.weight = weights["down"]

    spec.register_vocabulary(Tokenizer(tokenizer).vocabulary())
    spec.config.bos_token, spec.config.eos_token, spec.config.unk_token = "<s>", END, "<unk>"
    spec.config.layer_norm_epsilon = EPSILON
    spec.validate()
    spec.optimize(quantization="int8")
    linears = [linear for layer in decoder.layer for linear in _linears(layer)]
    for quantized in (decoder.embeddings, *linears):
        weight, scale = fitted(quantized.weight.numpy(), quantized.weight_scale.numpy())
        quantized.weight, quantized.weight_scale = NumpyVariable(weight), NumpyVariable(scale)
    folder.mkdir(parents=True, exist_ok=True)
    spec.save(str(folder))
    if tokenizer.resolve() != (folder / "tokenizer.model").resolve():
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
    text = yaml.safe_dump(description(shape), sort_keys=False, allow_unicode=True, width=120)
    (folder / "moltbot.yaml").write_text(text, encoding="utf-8")
