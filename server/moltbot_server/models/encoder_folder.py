"""The folder of a model that embeds texts: an encoder of CTranslate2, a `tokenizer.json`, how to pool."""

from __future__ import annotations

from pathlib import Path

from moltbot_server.errors import ModelUnavailable
from moltbot_server.models.folder import (
    DESCRIPTION,
    Description,
    check_plain,
    is_encoder,
    listing,
    read_description,
    slug,
)
from moltbot_server.models.tokenizer_config import TOKENIZER_CONFIG, read_json
from moltbot_server.turns import Value

POOLING = Path("1_Pooling", "config.json")
_KINDS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken",
}
_POOLINGS = ("mean", "cls", "max", "lasttoken")
_LONGEST = 1_000_000
"""Tokenizers without a limit of their own name a far greater number."""
_MODULES = ("Transformer", "Pooling", "Normalize")


class EncoderFolder(Value, frozen=True, kw_only=True):
    """What is in the folder. `pooling` is mean, cls, max or lasttoken; `context_length` counts tokens of one text."""

    path: Path
    id: str
    display_name: str
    family: str
    context_length: int
    pooling: str
    tokenizer: Path


def read_encoder_folder(path: Path, *, model_id: str = "") -> EncoderFolder:
    """Read the folder of a model that embeds.

    Raises:
        ModelUnavailable: something is missing or wrong; the text says what was found and what was expected.
    """
    if not is_encoder(path):
        raise ModelUnavailable(f"{path}: found {listing(path)}; expected model.bin of an encoder, which embeds texts.")
    check_plain(path)
    if not (path / "tokenizer.json").is_file():
        raise ModelUnavailable(f"{path}: found {listing(path)}; expected tokenizer.json.")
    check_modules(path)
    description = read_description(path) or Description(context_length=_context_length(path), family="encoder")
    longest = read_json(path / "sentence_bert_config.json", {}).get("max_seq_length") or description.context_length
    name = path.resolve().name
    return EncoderFolder(
        path=path,
        id=model_id or slug(description.id or name),
        display_name=description.display_name or description.name or name,
        family=description.family,
        context_length=min(int(longest), description.context_length),
        pooling=_pooling(path),
        tokenizer=path / "tokenizer.json",
    )


def check_modules(path: Path) -> None:
    """Refuse a model of sentence-transformers that does more than to encode, pool and normalise.

    Raises:
        ModelUnavailable: it does; the text names what.
    """
    for module in read_json(path / "modules.json", []):
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind not in _MODULES:
            raise ModelUnavailable(f"{path}: its modules.json has a {kind}; expected {', '.join(_MODULES)}.")


def _context_length(path: Path) -> int:
    longest = read_json(path / TOKENIZER_CONFIG, {}).get("model_max_length")
    if not isinstance(longest, int) or not 16 <= longest <= _LONGEST:
        raise ModelUnavailable(
            f"{path}: found neither {DESCRIPTION} nor a model_max_length in {TOKENIZER_CONFIG}; "
            "expected one of them, which says how many tokens the model reads."
        )
    return longest


def _pooling(path: Path) -> str:
    config = read_json(path / POOLING, {})
    chosen = [kind for name, kind in _KINDS.items() if config.get(name)]
    if isinstance(config.get("pooling_mode"), str):
        chosen = [config["pooling_mode"]]
    others = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    if len(chosen) > 1 or len(others) > 1 or (others and not chosen) or (chosen and chosen[0] not in _POOLINGS):
        found = ", ".join(chosen or others)
        raise ModelUnavailable(f"{path / POOLING}: found the poolings {found}; expected one of {', '.join(_POOLINGS)}.")
    return chosen[0] if chosen else "mean"
