"""Small random models of Transformers, made on the spot; importing this skips where the extra is not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizers

REASON = "needs the extra `convert`: run make test-convert"
torch: Any = pytest.importorskip("torch", reason=REASON)
torch.set_num_threads(1)
transformers: Any = pytest.importorskip("transformers", reason=REASON)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% if m.role == 'user' %}[user] {{ m.content }} [/user]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
_SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3, "tie_word_embeddings": False,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_SU = {
    "type": "longrope", "long_factor": [1.1, 2, 3, 4, 5, 6, 7, 8],
    "short_factor": [1.05, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
}  # fmt: skip
_LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}

MODELS: dict[str, tuple[str, str, str, dict[str, object]]] = {
    "llama 2": ("LlamaConfig", "llama", TURNS, {"num_key_value_heads": 4}),
    "llama 3": ("LlamaConfig", "byte-level", CHATML, {"rope_theta": 500000.0}),
    "llama 3.1": (
        "LlamaConfig", "byte-level", CHATML,
        {"rope_theta": 500000.0, "rope_scaling": _LLAMA3, "max_position_embeddings": 131072},
    ),
    "mistral": ("MistralConfig", "metaspace", TURNS, {"sliding_window": None, "rope_theta": 1e6}),
    "mistral with a window": ("MistralConfig", "metaspace", TURNS, {"sliding_window": 96}),
    "qwen 2": ("Qwen2Config", "byte-level", CHATML, {"rope_theta": 1e6, "tie_word_embeddings": True}),
    "qwen 3": ("Qwen3Config", "byte-level", CHATML, {"rope_theta": 1e6, "head_dim": 24}),
    "gemma": ("GemmaConfig", "gemma", TURNS, {"head_dim": 16, "rope_theta": 50000.0}),
    "gemma 2": ("Gemma2Config", "gemma", TURNS, {"head_dim": 16, "query_pre_attn_scalar": 16,
                                                  "attn_logit_softcapping": None}),
    "gemma 3": ("Gemma3TextConfig", "gemma", TURNS, {"head_dim": 16, "query_pre_attn_scalar": 16,
                                                      "num_hidden_layers": 6, "sliding_window": 96}),
    "gemma 3, larger": (
        "Gemma3TextConfig", "gemma", TURNS,
        {"head_dim": 16, "query_pre_attn_scalar": 16, "num_hidden_layers": 6, "sliding_window": 96,
         "rope_parameters": {"full_attention": _LINEAR,
                             "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    ),
    "phi 3": ("Phi3Config", "phi", CHATML, {}),
    "phi 3, long": (
        "Phi3Config", "phi", CHATML,
        {"rope_scaling": _SU, "original_max_position_embeddings": 4096, "max_position_embeddings": 131072},
    ),
    "phi 4 mini": ("Phi3Config", "byte-level", CHATML, {"partial_rotary_factor": 0.75, "hidden_size": 96,
                                                         "num_attention_heads": 4}),
}  # fmt: skip
"""By name: the class of the configuration, the kind of tokenizer, the chat template, what differs."""


def make(name: str, folder: Path) -> tuple[Any, Any]:
    """Make a model, save it as its authors would, and return it with its tokenizer."""
    config_class, kind, template, changes = MODELS[name]
    ends = {"bos_token": "<s>", "eos_token": "</s>"} if kind != "byte-level" else {"eos_token": "<|im_end|>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizers.KINDS[kind](), **ends)
    tokenizer.chat_template = template
    end = tokenizer.convert_tokens_to_ids(ends["eos_token"])
    ids = {"eos_token_id": end, "bos_token_id": end, "pad_token_id": 0}
    # A few rows more than tokens, as trained models have them.
    config = getattr(transformers, config_class)(**_SIZES | {"vocab_size": len(tokenizer) + 5} | ids | changes)
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer
