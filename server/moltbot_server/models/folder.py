"""A model's folder: what lies in it, what it says of itself, and what is wrong with it."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any

import msgspec

from moltbot_server.demo_model import ARTIFACT
from moltbot_server.errors import ModelUnavailable
from moltbot_server.turns import Value

DESCRIPTION = "moltbot.yaml"
BUILTIN = "builtin"
BUILTIN_ID = "moltbot-demo"
BUILTIN_NAMES = frozenset({BUILTIN, "built-in", BUILTIN_ID})
SCRIPTED = "scripted"
_FAMILIES = Path(__file__).with_name("families.yaml")
_TOKENIZERS = ("tokenizer.model", "sentencepiece.model", "sentencepiece.bpe.model")
_FOREIGN = {
    "*.safetensors": "weights for Transformers (convert them with ct2-transformers-converter)",
    "pytorch_model*.bin": "weights for PyTorch (convert them with ct2-transformers-converter)",
    "*.gguf": "weights for llama.cpp",
    "*.onnx": "weights for ONNX Runtime",
}


class Entry(Value, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What stands around a message of one role."""

    prefix: str = ""
    suffix: str = ""


class ChatTemplate(Value, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a conversation is laid out for the model: `bos`, then each message between its prefix and its suffix.

    `system_in_user`: a system message replaces the prefix of the user message after it, as Llama 2 wants it.
    `stop` lists what ends an answer.
    """

    user: Entry
    assistant: Entry
    system: Entry = Entry()
    bos: str = ""
    stop: tuple[str, ...] = ()
    system_in_user: bool = False


class Family(Value, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is known of a kind of model without looking into a folder."""

    context_length: int
    chat_template: ChatTemplate
    aliases: tuple[str, ...] = ()


class Description(Value, frozen=True, kw_only=True):
    """A folder's moltbot.yaml; what else stands there (licence, provenance) is for people."""

    chat_template: ChatTemplate
    context_length: int
    family: str = ""
    id: str = ""
    name: str = ""
    display_name: str = ""


class ModelFolder(Value, frozen=True, kw_only=True):
    """A folder that holds all that is needed: CTranslate2 weights, a sentencepiece model, a chat template."""

    path: Path
    id: str
    display_name: str
    family: str
    context_length: int
    template: ChatTemplate
    tokenizer: Path
    vocabulary: tuple[str, ...]
    eos_token: str


def families() -> dict[str, Family]:
    """Return the built-in families by name, aliases included."""
    known = msgspec.yaml.decode(_FAMILIES.read_bytes(), type=dict[str, Family])
    return known | {alias: family for family in known.values() for alias in family.aliases}


def read_folder(path: Path, model_type: str = "", *, model_id: str = "") -> ModelFolder:
    """Read a model's folder. `model_type` may be empty where the folder has a moltbot.yaml.

    Raises:
        ModelUnavailable: something is missing or wrong; the text says what was found and what was expected.
    """
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise ModelUnavailable(f"MODEL_PATH {path}: found {found}; expected the folder of a CTranslate2 model.")
    description = _describe(path, model_type)
    _require_weights(path)
    name = description.display_name or description.name
    return ModelFolder(
        path=path,
        id=model_id or _slug(description.id or path.resolve().name),
        display_name=name or path.resolve().name,
        family=description.family,
        context_length=description.context_length,
        template=description.chat_template,
        tokenizer=_tokenizer(path),
        vocabulary=_vocabulary(path),
        eos_token=str(_json(path / "config.json", {}).get("eos_token") or "</s>"),
    )


def configured_folder(kind: str, model_path: str) -> ModelFolder:
    """Read the folder that a configuration means: `kind` is a lower-case model type or empty, as the path may be.

    Raises:
        ModelUnavailable: there is no such model; the text says what was found and what was expected.
    """
    if kind in BUILTIN_NAMES or (not kind and not model_path):
        if model_path:
            raise ModelUnavailable(
                f"MODEL_TYPE is {kind} and MODEL_PATH is {model_path}; "
                "leave MODEL_PATH empty for the built-in model, or MODEL_TYPE for what the folder says."
            )
        return read_folder(ARTIFACT, model_id=BUILTIN_ID)
    if not model_path:
        expected = sorted((*families(), BUILTIN, SCRIPTED))
        if kind not in expected:
            raise unknown_type(kind, expected)
        raise ModelUnavailable(f"MODEL_TYPE is {kind} and MODEL_PATH is empty; expected the model's folder.")
    return read_folder(Path(model_path).expanduser(), kind)


def check_context(asked: int, most: int, model: str) -> None:
    """Refuse a context length, in tokens, that a model cannot read.

    Raises:
        ModelUnavailable: it is under 16 or over what the model can read.
    """
    if not 16 <= asked <= most:
        raise ModelUnavailable(f"CONTEXT_LENGTH is {asked}; expected 16 to {most}, which is what {model} can read.")


def unknown_type(model_type: str, expected: list[str]) -> ModelUnavailable:
    """Return the error for a MODEL_TYPE that is none of those expected, with the nearest one."""
    near = difflib.get_close_matches(model_type.lower(), expected, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]}?" if near else ""
    return ModelUnavailable(f"MODEL_TYPE is {model_type!r}; expected one of {', '.join(expected)}.{hint}")


def _describe(path: Path, model_type: str) -> Description:
    known = families()
    file = path / DESCRIPTION
    if file.is_file():
        try:
            description = msgspec.yaml.decode(file.read_bytes(), type=Description)
        except (OSError, msgspec.DecodeError) as problem:
            raise ModelUnavailable(f"{file} does not describe a model: {problem}.") from None
        if description.context_length < 16:
            raise ModelUnavailable(f"{file}: context_length is {description.context_length}; expected 16 or more.")
        asked = known.get(model_type.lower())
        same = model_type.lower() == description.family or (asked and asked == known.get(description.family))
        if model_type and not same:
            raise ModelUnavailable(
                f"MODEL_TYPE is {model_type!r}, but {file} says {description.family!r}; "
                f"leave MODEL_TYPE empty or set it to {description.family!r}."
            )
        return description
    if not model_type:
        raise ModelUnavailable(
            f"{path} has no {DESCRIPTION}, so MODEL_TYPE must name its family: one of {', '.join(sorted(known))}."
        )
    family = known.get(model_type.lower())
    if family is None:
        raise unknown_type(model_type, sorted(known))
    return Description(
        chat_template=family.chat_template, context_length=family.context_length, family=model_type.lower()
    )


def _require_weights(path: Path) -> None:
    if (path / "model.bin").is_file():
        return
    for pattern, what in _FOREIGN.items():
        if match := next(iter(sorted(path.glob(pattern))), None):
            raise ModelUnavailable(f"{path}: found {match.name}, {what}; expected model.bin, a CTranslate2 model.")
    raise ModelUnavailable(f"{path}: found {_listing(path)}; expected model.bin, a CTranslate2 model.")


def _tokenizer(path: Path) -> Path:
    for name in _TOKENIZERS:
        if (path / name).is_file():
            return path / name
    others = sorted(path.glob("*.model"))
    if len(others) == 1:
        return others[0]
    if others:
        found = ", ".join(file.name for file in others)
        raise ModelUnavailable(f"{path}: found {found}; expected one of them to be named {_TOKENIZERS[0]}.")
    found = "tokenizer.json, another kind" if (path / "tokenizer.json").is_file() else _listing(path)
    raise ModelUnavailable(f"{path}: found {found}; expected {_TOKENIZERS[0]}, a sentencepiece model.")


def _vocabulary(path: Path) -> tuple[str, ...]:
    """Return the tokens of the weights by id: what CTranslate2 counts by, which may be more than the tokenizer has."""
    tokens = _json(path / "vocabulary.json", None)
    if tokens is None and (path / "vocabulary.txt").is_file():
        tokens = (path / "vocabulary.txt").read_text(encoding="utf-8").split("\n")
        tokens = tokens[:-1] if tokens and not tokens[-1] else tokens
    if not isinstance(tokens, list) or not tokens:
        raise ModelUnavailable(f"{path}: found {_listing(path)}; expected vocabulary.json, the list of tokens.")
    return tuple(map(str, tokens))


def _json(file: Path, default: Any) -> Any:
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError:
        return default
    except (OSError, ValueError) as problem:
        raise ModelUnavailable(f"{file} cannot be read: {problem}; expected JSON.") from None


def _listing(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    return ", ".join(names[:6]) + (" …" if len(names) > 6 else "") if names else "an empty folder"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:63] or "model"
