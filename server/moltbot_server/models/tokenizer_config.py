"""What the files of Hugging Face's models say: the chat template, special tokens, what ends an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from moltbot_server.errors import ModelUnavailable

CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
LONGEST_CONTEXT = 1 << 24
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Declared(NamedTuple):
    """What the files say; empty where they say nothing.

    `jinja` is the chat template, `specials` the special tokens by the names that templates know them under, `ends` the
    tokens that end an answer, `context_length` the most tokens that the model reads.
    """

    jinja: str
    specials: dict[str, str]
    ends: tuple[str, ...]
    context_length: int


def read_declared(path: Path, vocabulary: tuple[str, ...]) -> Declared:
    """Read the files of a folder.

    Raises:
        ModelUnavailable: one of them is no JSON, or not what it should be.
    """
    config = _mapping(path / TOKENIZER_CONFIG)
    specials = {name: text for name in _SPECIAL if (text := _token(config.get(name)))}
    ids = _ids(_mapping(path / GENERATION_CONFIG)) + _ids(_mapping(path / "config.json"))
    ends = [specials.get("eos_token", ""), *(vocabulary[index] for index in ids if index < len(vocabulary))]
    return Declared(
        _jinja(path, config),
        specials,
        tuple(dict.fromkeys(end for end in ends if end in vocabulary)),
        _length(config.get("model_max_length")),
    )


def read_json(file: Path, default: Any) -> Any:
    """Return what a JSON file holds, `default` where there is none.

    Raises:
        ModelUnavailable: it cannot be read.
    """
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError:
        return default
    except (OSError, ValueError) as problem:
        raise ModelUnavailable(f"{file} cannot be read: {problem}; expected JSON.") from None
    except RecursionError:
        raise ModelUnavailable(f"{file} cannot be read: it is nested too deeply; expected JSON.") from None


def _mapping(file: Path) -> dict[str, Any]:
    value = read_json(file, {})
    if not isinstance(value, dict):
        raise ModelUnavailable(f"{file}: found a {type(value).__name__}; expected an object with names.")
    return value


def _jinja(path: Path, config: dict[str, Any]) -> str:
    """Return the chat template: of its own file, else of the configuration; of several the one named default."""
    file = path / CHAT_TEMPLATE
    try:
        text = file.read_text("utf-8")
    except FileNotFoundError:
        template = config.get("chat_template")
    except (OSError, UnicodeDecodeError) as problem:
        raise ModelUnavailable(f"{file} cannot be read: {problem}.") from None
    else:
        return text if text.strip() else ""
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default", next(iter(named.values()), None))
    if template is not None and not isinstance(template, str):
        raise ModelUnavailable(f"{path / TOKENIZER_CONFIG}: chat_template is {template!r:.80}; expected a text.")
    return template or ""


def _token(value: Any) -> str:
    """Return a special token, which stands as a text or as an object with its `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""


def _length(value: Any) -> int:
    """Return a context length, 0 where there is none: files without one say so by an astronomical number."""
    return value if isinstance(value, int) and 16 <= value <= LONGEST_CONTEXT else 0


def _ids(config: dict[str, Any]) -> list[int]:
    """Return the ids that end an answer: one, or a list of them."""
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    return [index for index in ids if isinstance(index, int) and index >= 0]
