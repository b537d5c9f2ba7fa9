"""A model's folder: what lies in it, what it says of itself, and what is wrong with it."""

from __future__ import annotations

import difflib
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from moltbot_server.demo_model import ARTIFACT
from moltbot_server.errors import ModelUnavailable
from moltbot_server.models.chat_template import ChatTemplate, Entry, TemplateRefused, end_of_answer
from moltbot_server.models.plain_yaml import read_plain_yaml
from moltbot_server.models.tokenizer_config import CHAT_TEMPLATE, LONGEST_CONTEXT, Declared, read_declared, read_json
from moltbot_server.turns import Value

DESCRIPTION = "moltbot.yaml"
BUILTIN = "builtin"
BUILTIN_ID = "moltbot-demo"
BUILTIN_NAMES = frozenset({BUILTIN, "built-in", BUILTIN_ID})
SCRIPTED = "scripted"
_SAFE_CONTEXT = 2048
_FAMILIES = Path(__file__).with_name("families.yaml")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "sentencepiece.model", "sentencepiece.bpe.model")
_FOREIGN = {
    "*.safetensors": "weights for Transformers (convert them with `moltbot model convert`)",
    "pytorch_model*.bin": "weights for PyTorch (convert them with `moltbot model convert`)",
    "*.gguf": "weights for llama.cpp",
    "*.onnx": "weights for ONNX Runtime",
}


class Family(Value, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is known of a kind of model without looking into a folder."""

    context_length: int
    chat_template: ChatTemplate
    aliases: tuple[str, ...] = ()


class Description(Value, frozen=True, kw_only=True):
    """A folder's moltbot.yaml; what else stands there (licence, provenance) is for people.

    `chat_template` goes before the template that the model came with. `template_options` are names that such a template
    may read, such as `enable_thinking: false`. `repeats`: how often something may stand in a row in what the model
    reads; what is repeated more is read so often, for small models that lose their thread over it. 0: nothing is cut.
    `continuation`: whether the model goes on with an answer when it reads the answer's text; not one that begins with
    something that is no text.
    """

    context_length: int
    chat_template: ChatTemplate | None = None
    template_options: dict[str, str | int | float | bool] = msgspec.field(default_factory=dict)
    family: str = ""
    id: str = ""
    name: str = ""
    display_name: str = ""
    repeats: Annotated[int, msgspec.Meta(ge=0)] = 0
    continuation: bool = True


class ModelFolder(Value, frozen=True, kw_only=True):
    """A folder that holds all that is needed: CTranslate2 weights, a tokenizer, a chat template.

    `jinja` is the template that the model came with, empty where `template` lays conversations out; `template.stop` and
    `eos_token` are what ends an answer, either way. `repeats` and `continuation` are those of `Description`.
    """

    path: Path
    id: str
    display_name: str
    family: str
    context_length: int
    template: ChatTemplate
    tokenizer: Path
    vocabulary: tuple[str, ...]
    eos_token: str
    jinja: str = ""
    template_options: Mapping[str, str | int | float | bool] = msgspec.field(default_factory=dict)
    repeats: int = 0
    continuation: bool = True


def families() -> dict[str, Family]:
    """Return the built-in families by name, aliases included."""
    known = msgspec.yaml.decode(_FAMILIES.read_bytes(), type=dict[str, Family])
    return known | {alias: family for family in known.values() for alias in family.aliases}


def read_folder(path: Path, model_type: str = "", *, model_id: str = "") -> ModelFolder:
    """Read a model's folder. `model_type` may be empty where the folder has a moltbot.yaml or a chat template.

    Raises:
        ModelUnavailable: something is missing or wrong; the text says what was found and what was expected.
    """
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise ModelUnavailable(f"{path}: found {found}; expected the folder of a CTranslate2 model.")
    check_plain(path)
    description = _describe(path, model_type)
    _require_weights(path)  # whoever named no family hears first of what no family would mend
    tokenizer, vocabulary = _tokenizer(path), _vocabulary(path)
    declared = read_declared(path, vocabulary)
    if not declared.jinja and not (description and description.chat_template):
        _refuse_empty_template(path)
    if description is None:
        description = _describe_by_template(path, declared, vocabulary)
    jinja = "" if description.chat_template else declared.jinja
    name = description.display_name or description.name
    return ModelFolder(
        path=path,
        id=model_id or slug(description.id or path.resolve().name),
        display_name=name or path.resolve().name,
        family=description.family,
        context_length=description.context_length,
        template=_template(path, description, declared, vocabulary),
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        eos_token=str(read_json(path / "config.json", {}).get("eos_token") or "</s>"),
        jinja=jinja,
        template_options={**declared.specials, **description.template_options},
        repeats=description.repeats,
        continuation=description.continuation,
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


def check_vocabulary(folder: ModelFolder, words: Sequence[str]) -> None:
    """Refuse a tokenizer whose words are not the tokens of the weights beside it.

    Raises:
        ModelUnavailable: more than one word in a hundred is missing.
    """
    known = set(folder.vocabulary)
    missing = [word for word in words if word not in known]
    if len(missing) > len(words) // 100:
        raise ModelUnavailable(
            f"{folder.tokenizer} does not belong to the weights beside it: {len(missing)} of its {len(words)} pieces, "
            f"such as {missing[0]!r}, are not among their {len(known)} tokens."
        )


def read_description(path: Path) -> Description | None:
    """Return what a folder's moltbot.yaml says, None where there is none.

    Raises:
        ModelUnavailable: it cannot be read, or says what cannot be.
    """
    file = path / DESCRIPTION
    if not file.is_file():
        return None
    try:
        description = read_plain_yaml(file, Description)
    except (OSError, ValueError) as problem:
        raise ModelUnavailable(f"{file} does not describe a model: {problem}.") from None
    if not 16 <= description.context_length <= LONGEST_CONTEXT:
        raise ModelUnavailable(
            f"{file}: context_length is {description.context_length}; expected 16 to {LONGEST_CONTEXT}."
        )
    return description


def check_plain(path: Path) -> None:
    """Refuse a folder with a pipe, a socket or a device in it: whoever reads such a thing may wait for ever.

    Raises:
        ModelUnavailable: with the name of it, or why the folder cannot be read.
    """
    try:
        for entry in sorted(path.iterdir()):
            if entry.exists() and not (entry.is_file() or entry.is_dir()):
                raise ModelUnavailable(f"{entry} is no plain file, but a pipe, a socket or a device; remove it.")
    except OSError as problem:
        raise ModelUnavailable(f"{path} cannot be read: {problem.strerror}.") from None


def is_encoder(path: Path) -> bool:
    """Return whether a folder holds a model that embeds texts, and not one that writes."""
    try:
        if not (path / "model.bin").is_file():
            return False
        with (path / "model.bin").open("rb") as file:
            head = file.read(64)
        size = struct.unpack_from("<H", head, 4)[0]
    except (OSError, struct.error):
        return False
    # The file begins with its version and the name of the specification that it was made by.
    return head[6 : 6 + size - 1] == b"TransformerEncoderSpec"


def _describe(path: Path, model_type: str) -> Description | None:
    """Return what the folder says of itself, or what is known of the family that was named; None without either."""
    known = families()
    description = read_description(path)
    if description is not None:
        asked = known.get(model_type.lower())
        same = model_type.lower() == description.family or (asked and asked == known.get(description.family))
        if model_type and not same:
            others = "" if asked else f" It is no family either; these are known: {', '.join(sorted(known))}."
            raise ModelUnavailable(
                f"MODEL_TYPE is {model_type!r}, but {path / DESCRIPTION} says {description.family!r}; "
                f"leave MODEL_TYPE empty or set it to {description.family!r}.{others}"
            )
        return description
    if not model_type:
        return None
    family = known.get(model_type.lower())
    if family is None:
        raise unknown_type(model_type, sorted(known))
    return Description(context_length=family.context_length, family=model_type.lower())


def _refuse_empty_template(path: Path) -> None:
    """Refuse a template's file with nothing in it: a download that broke off, and no wish for another template."""
    if (path / CHAT_TEMPLATE).is_file():
        raise ModelUnavailable(
            f"{path / CHAT_TEMPLATE}: found an empty file; expected a chat template in Jinja. Fetch the file again, or "
            "delete it where the model has none: then its family says how conversations are laid out."
        )


def _describe_by_template(path: Path, declared: Declared, vocabulary: tuple[str, ...]) -> Description:
    """Return what can be told of a model of which nobody said more than how it lays conversations out."""
    known = families()
    if not declared.jinja:
        raise ModelUnavailable(
            f"{path} has neither a {DESCRIPTION} nor a chat template, so MODEL_TYPE must name its family: one of "
            f"{', '.join(sorted(known))}."
        )
    tokens = frozenset(vocabulary)
    # All families that end answers as this one may can read so much.
    lengths = [each.context_length for each in known.values() if not tokens.isdisjoint(each.chat_template.stop)]
    return Description(context_length=declared.context_length or min(lengths, default=_SAFE_CONTEXT))


def _template(path: Path, description: Description, declared: Declared, vocabulary: tuple[str, ...]) -> ChatTemplate:
    """Return the folder's own template, else a mere list of end tokens beside a Jinja template, else the family's."""
    if description.chat_template:
        template = description.chat_template
    elif declared.jinja:
        ends = _end_of_answer(path, description, declared, frozenset(vocabulary))
        template = ChatTemplate(user=Entry(), assistant=Entry(), stop=(ends,) if ends else ())
    else:
        template = _family_template(path, description.family, frozenset(vocabulary))
    stop = tuple(dict.fromkeys((*template.stop, *declared.ends)))
    return msgspec.structs.replace(template, stop=stop)


def _end_of_answer(path: Path, description: Description, declared: Declared, vocabulary: frozenset[str]) -> str:
    # Imported late: Jinja takes a tenth of a second, and most folders' templates are prefixes and suffixes.
    from moltbot_server.models.chat_template_sandbox import compile_template

    try:
        options = {**declared.specials, **description.template_options}
        return end_of_answer(compile_template(declared.jinja, options), vocabulary)
    except TemplateRefused as problem:
        raise ModelUnavailable(
            f"{path}: the chat template that it came with cannot be used: {problem}; "
            f"a chat_template in {DESCRIPTION} goes before it."
        ) from None


def _family_template(path: Path, name: str, vocabulary: frozenset[str]) -> ChatTemplate:
    family = families().get(name.lower())
    if family is None:
        raise ModelUnavailable(
            f"{path}: found no chat template; expected chat_template in {DESCRIPTION}, {CHAT_TEMPLATE}, or as family "
            f"one of {', '.join(sorted(families()))}."
        )
    template = family.chat_template
    if vocabulary.isdisjoint(template.stop):
        fitting = {other for other, known in families().items() if not vocabulary.isdisjoint(known.chat_template.stop)}
        hint = f"; its tokens would suit {', '.join(sorted(fitting))}" if fitting else ""
        raise ModelUnavailable(
            f"MODEL_TYPE is {name}, whose answers end with {template.stop[0]!r}, "
            f"but the model in {path} has no such token{hint}."
        )
    return template


def _require_weights(path: Path) -> None:
    if is_encoder(path):
        raise ModelUnavailable(f"{path}: found an encoder, which embeds texts; expected a model that writes them.")
    if (path / "model.bin").is_file():
        if not (path / "model.bin").stat().st_size:
            raise ModelUnavailable(f"{path}: found an empty model.bin; expected a CTranslate2 model.")
        if not (path / "config.json").is_file():
            raise ModelUnavailable(
                f"{path}: found no config.json beside model.bin; expected both of a CTranslate2 model."
            )
        return
    for pattern, what in _FOREIGN.items():
        if match := next(iter(sorted(path.glob(pattern))), None):
            raise ModelUnavailable(f"{path}: found {match.name}, {what}; expected model.bin, a CTranslate2 model.")
    raise ModelUnavailable(f"{path}: found {listing(path)}; expected model.bin, a CTranslate2 model.")


def _tokenizer(path: Path) -> Path:
    for name in _TOKENIZERS:
        if (path / name).is_file():
            return path / name
    others = sorted(path.glob("*.model"))
    if len(others) == 1:
        return others[0]
    if others:
        found = ", ".join(file.name for file in others)
        raise ModelUnavailable(f"{path}: found {found}; expected one of them to be named tokenizer.model.")
    raise ModelUnavailable(
        f"{path}: found {listing(path)}; expected tokenizer.json, or tokenizer.model for sentencepiece."
    )


def _vocabulary(path: Path) -> tuple[str, ...]:
    """Return the tokens of the weights by id: what CTranslate2 counts by, which may be more than the tokenizer has."""
    tokens = read_json(path / "vocabulary.json", None)
    if tokens is None and (path / "vocabulary.txt").is_file():
        tokens = (path / "vocabulary.txt").read_text(encoding="utf-8").split("\n")
        tokens = tokens[:-1] if tokens and not tokens[-1] else tokens
    if not isinstance(tokens, list) or not tokens:
        raise ModelUnavailable(f"{path}: found {listing(path)}; expected vocabulary.json, the list of tokens.")
    return tuple(map(str, tokens))


def listing(path: Path) -> str:
    """Return the first names in a folder, for a text that says what was found."""
    names = sorted(entry.name for entry in path.iterdir())
    return ", ".join(names[:6]) + (" …" if len(names) > 6 else "") if names else "an empty folder"


def slug(name: str) -> str:
    """Return a name as a resource id."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:63] or "model"
