"""Encoders made with Transformers on the spot and converted: the same vectors come of the same texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from moltbot_server.models.convert import convert
from moltbot_server.models.encoder import Encoder
from moltbot_server.models.encoder_folder import read_encoder_folder
from tiny_encoder import pool, wordpiece
from transformers_models import torch, transformers

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch", "ignore::DeprecationWarning")
TEXTS = ["hello", "the quick brown fox jumps over the lazy dog and runs away", "How do I install it?", "你好 " * 40]
KINDS = {
    "BERT": ("BertConfig", {"hidden_act": "gelu"}),
    "DistilBERT": ("DistilBertConfig", {}),
    "RoBERTa": ("RobertaConfig", {"max_position_embeddings": 130}),
    "XLM-RoBERTa": ("XLMRobertaConfig", {"max_position_embeddings": 130}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantization", ["float32", "int8"])
async def test_a_converted_encoder_embeds_as_transformers_does(kind: str, quantization: str, tmp_path: Path) -> None:
    config_class, changes = KINDS[kind]
    source = tmp_path / "source"
    # RoBERTa counts its positions from the padding's id on, which is 1 in all of its models.
    pad = 1 if "RoBERTa" in kind else 0
    special = ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]") if pad else ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=wordpiece(special), unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=128,
    )  # fmt: skip
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    if kind == "DistilBERT":
        sizes = {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96}
    common = {
        "vocab_size": len(tokenizer) + 3,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "pad_token_id": pad,
    }
    torch.manual_seed(5)
    model = transformers.AutoModel.from_config(getattr(transformers, config_class)(**common | sizes | changes)).eval()
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    pool(source, pooling_mode_mean_tokens=True)
    convert(source, tmp_path / "target", quantization)
    folder = read_encoder_folder(tmp_path / "target")
    assert (folder.context_length, folder.pooling) == (128, "mean")
    encoder = Encoder(folder)
    await encoder.start()
    try:
        embedded = await encoder.embed(TEXTS)
    finally:
        await encoder.close()
    for text, vector in zip(TEXTS, embedded.vectors, strict=True):
        read = tokenizer(text, return_tensors="pt", truncation=True, max_length=128, return_token_type_ids=False)
        with torch.no_grad():
            states = model(**read).last_hidden_state[0].mean(dim=0).numpy()
        cosine = float(np.dot(vector, states / np.linalg.norm(states)))
        assert cosine > (0.999 if quantization == "float32" else 0.99), text[:20]
