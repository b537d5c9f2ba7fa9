"""CTranslate2's converter for models of Transformers, with what it leaves out of them set right.

Release 4.8.5 of it was compared with Transformers 5 on small random models of every family: it drops the factor and the
original length of Llama 3's rotary scaling, the base of Gemma's, the linear scaling of the larger Gemma 3, the share of
the head that Phi 4 turns and the epsilon of several norms, and stops at Phi 3 and BERT. The numbers are taken from the
model's configuration here, and `tests/core/test_models_convert.py` compares again.
"""

from __future__ import annotations

from copy import deepcopy
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
from ctranslate2.converters import TransformersConverter
from ctranslate2.specs.attention_spec import RotaryScalingType
from ctranslate2.specs.transformer_spec import TransformerDecoderModelSpec, TransformerEncoderModelSpec


class Progress(Protocol):
    """Who hears how far a conversion is."""

    def __call__(self, stage: str, share: float) -> None:
        """Hear what is done now, and which share of the whole is done, from 0 to 1."""


class Unsupported(Exception):
    """A model has something that CTranslate2 cannot compute; the text says what."""


class WeightsConverter(TransformersConverter):  # type: ignore[misc]  # CTranslate2 ships no types
    """Converts a local folder. `config` and `tokenizer` are those of the model, once it was converted."""

    def __init__(self, source: str, progress: Progress) -> None:
        """Prepare to convert; no code of the model's folder is ever run."""
        super().__init__(source, low_cpu_mem_usage=True, trust_remote_code=False)
        self.config: Any = None
        self.tokenizer: Any = None
        self._ropes: list[dict[str, Any]] = []
        self._progress = progress

    def load_model(self, model_class: Any, model_name_or_path: str, **kwargs: Any) -> Any:
        """Load the weights; see the base class."""
        self._progress("reading", 0.05)
        model = super().load_model(model_class, model_name_or_path, **kwargs)
        self.config = model.config.get_text_config()
        self._ropes = _ropes(self.config)
        _fill_in(model, self.config)
        self._progress("converting", 0.5)
        return model

    def load_tokenizer(self, tokenizer_class: Any, model_name_or_path: str, **kwargs: Any) -> Any:
        """Load the tokenizer; see the base class."""
        self.tokenizer = super().load_tokenizer(tokenizer_class, model_name_or_path, **kwargs)
        return self.tokenizer

    def _load(self) -> Any:
        spec = super()._load()
        if not isinstance(spec, TransformerDecoderModelSpec | TransformerEncoderModelSpec):
            raise Unsupported(f"it is a {type(spec).__name__}; models that write texts and encoders can be used")
        # The native code reads texts only, and not every tokenizer has these.
        spec.config.unk_token = spec.config.unk_token or ""
        if isinstance(spec, TransformerDecoderModelSpec):
            spec.config.eos_token = spec.config.eos_token or ""
            spec.config.bos_token = spec.config.bos_token or spec.config.eos_token
        else:
            # Some weights have more rows than their tokenizer has tokens.
            words = sorted(self.tokenizer.get_vocab().items(), key=lambda word: word[1])
            spare = range(self.config.vocab_size - len(words))
            spec.register_vocabulary([*(word for word, _ in words), *(f"<extra_id_{index}>" for index in spare)])
        epsilon = getattr(self.config, "rms_norm_eps", None) or getattr(self.config, "layer_norm_eps", None)
        if epsilon is not None:
            spec.config.layer_norm_epsilon = epsilon
        if self._ropes:
            head = getattr(self.config, "head_dim", None) or (
                self.config.hidden_size // self.config.num_attention_heads
            )
            for layer, rope in zip(spec.decoder.layer, self._ropes, strict=True):
                _set_rope(layer.self_attention, rope, head)
        self._progress("writing", 0.7)
        return spec


def _ropes(config: Any) -> list[dict[str, Any]]:
    """Return the rotary parameters of each layer; none for a model without them."""
    rope = deepcopy(getattr(config, "rope_parameters", None))
    if not rope:
        return []
    kinds = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
    return [rope.get(kind, rope) for kind in kinds]


def _fill_in(model: Any, config: Any) -> None:
    """Give the model back what earlier releases of Transformers had and the converter reads."""
    if config.model_type in ("bert", "roberta", "xlm-roberta", "camembert"):
        config.position_embedding_type = "absolute"
    if config.model_type == "phi3":
        rope = config.rope_parameters
        for layer in model.model.layers:
            factors = {name: rope.get(name) for name in ("long_factor", "short_factor")}
            layer.self_attn.rotary_emb = SimpleNamespace(**factors)
        if rope["rope_type"] == "default":
            config.rope_parameters = None
        else:
            config.rope_parameters = rope | {"type": rope["rope_type"]}


def _set_rope(attention: Any, rope: dict[str, Any], head: int) -> None:
    kind = rope.get("rope_type", "default")
    # A specification refuses attributes that its constructor did not make, though the native code would read them.
    written = vars(attention)
    written["rotary_base"] = np.float32(rope["rope_theta"])
    share = rope.get("partial_rotary_factor") or 1.0
    if share < 1.0:
        written["rotary_dim"] = np.int32(int(head * share))
    if kind == "linear":
        written["rotary_scaling_type"] = np.int8(RotaryScalingType.Linear)
        written["rotary_scaling_factor"] = np.float32(rope["factor"])
    elif kind == "llama3":
        written["rotary_scaling_type"] = np.int8(RotaryScalingType.Llama3)
        written["rotary_scaling_factor"] = np.float32(rope["factor"])
        written["rotary_low_freq_factor"] = np.float32(rope["low_freq_factor"])
        written["rotary_high_freq_factor"] = np.float32(rope["high_freq_factor"])
        written["original_max_position_embeddings"] = np.int32(rope["original_max_position_embeddings"])
    elif kind not in ("default", "longrope"):
        raise Unsupported(f"its rotary embeddings are scaled by the method {kind}")
