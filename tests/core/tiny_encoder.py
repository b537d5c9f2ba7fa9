"""A tiny random BERT in CTranslate2's format, made on the spot."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import yaml
from ctranslate2.specs import common_spec, transformer_spec
from tiny_model import LINES
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

WIDTH, LAYERS, HEADS, LONGEST = 32, 2, 4, 64


@cache
def wordpiece(special: tuple[str, ...] = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")) -> Tokenizer:
    """A tokenizer of BERT's kind; `special` are its first tokens. Kept, because training it twice gives two."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=list(special), show_progress=False)
    tokenizer.train_from_iterator(LINES * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(word, special.index(word)) for word in ("[CLS]", "[SEP]")]
    )
    return tokenizer


def make_tiny_encoder(folder: Path) -> Path:
    """Write model.bin, config.json, vocabulary.json, tokenizer.json and moltbot.yaml into a new folder; return it."""
    folder.mkdir(parents=True)
    tokenizer = wordpiece()
    tokenizer.save(str(folder / "tokenizer.json"))
    words = [tokenizer.id_to_token(index) for index in range(tokenizer.get_vocab_size())]
    rng = np.random.default_rng(3)

    def random(*shape: int) -> np.ndarray:
        return rng.normal(0.0, 0.3, shape).astype(np.float32)

    def norm(layer: common_spec.LayerNormSpec) -> None:
        layer.gamma, layer.beta = np.ones(WIDTH, np.float32), np.zeros(WIDTH, np.float32)

    def linear(layer: common_spec.LinearSpec, out: int, into: int) -> None:
        layer.weight, layer.bias = random(out, into), random(out)

    encoder = transformer_spec.TransformerEncoderSpec(
        LAYERS, HEADS, pre_norm=False, activation=common_spec.Activation.GELU, layernorm_embedding=True,
        num_source_embeddings=2, embeddings_merge=common_spec.EmbeddingsMerge.ADD,
    )  # fmt: skip
    encoder.scale_embeddings = False
    encoder.embeddings[0].weight, encoder.embeddings[1].weight = random(len(words), WIDTH), random(2, WIDTH)
    encoder.position_encodings.encodings = random(LONGEST, WIDTH)
    norm(encoder.layernorm_embedding)
    for layer in encoder.layer:
        linear(layer.self_attention.linear[0], 3 * WIDTH, WIDTH)
        linear(layer.self_attention.linear[1], WIDTH, WIDTH)
        linear(layer.ffn.linear_0, 2 * WIDTH, WIDTH)
        linear(layer.ffn.linear_1, WIDTH, 2 * WIDTH)
        norm(layer.self_attention.layer_norm)
        norm(layer.ffn.layer_norm)
    spec = transformer_spec.TransformerEncoderModelSpec(encoder)
    spec.register_vocabulary(words)
    spec.config.unk_token = "[UNK]"
    spec.validate()
    spec.optimize(quantization="float32")
    spec.save(str(folder))
    described = {"family": "bert", "id": "tiny-bert", "display_name": "Tiny BERT", "context_length": LONGEST}
    (folder / "moltbot.yaml").write_text(yaml.safe_dump(described))
    return folder


def pool(folder: Path, **config: object) -> None:
    """Write the configuration of the pooling of sentence-transformers."""
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
