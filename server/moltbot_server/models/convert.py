"""Weights of Transformers to a model folder of ours: `moltbot model convert`.

torch and transformers come with the optional extra `convert`; nothing else of MoltBot needs them.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ctranslate2
import msgspec
from ctranslate2.specs.model_spec import ACCEPTED_MODEL_TYPES

from moltbot_server.errors import ModelExists, ModelUnavailable
from moltbot_server.models.convert_weights import Progress, WeightsConverter
from moltbot_server.models.encoder_folder import POOLING, check_modules, read_encoder_folder
from moltbot_server.models.folder import DESCRIPTION, families, is_encoder, read_folder
from moltbot_server.models.memory import available_memory, check_room
from moltbot_server.models.tokenizer import Tokenizer
from moltbot_server.models.tokenizer_config import CHAT_TEMPLATE, GENERATION_CONFIG, TOKENIZER_CONFIG, read_json

_NEEDED = ("torch", "transformers")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_KEPT = ("LICEN[CS]E*", "NOTICE*", "USE_POLICY*", GENERATION_CONFIG, "modules.json", "sentence_bert_config.json")
_FAMILY_OF = {"gemma2": "gemma", "gemma3_text": "gemma3", "qwen2": "qwen", "qwen3": "qwen"}
_UNBOUNDED = 1_000_000
"""Tokenizers without a limit of their own name a far greater number."""


def convert(source: Path, target: Path, quantization: str = "int8", progress: Progress | None = None) -> None:
    """Convert the model in the folder `source` into a new folder `target`, which appears when it is whole.

    `quantization` is the number type of the weights, one that CTranslate2 knows. The result was read once, as the
    server reads it.

    Raises:
        ModelExists: there is something at `target` already.
        ModelUnavailable: the extra is not installed, the source is no model that can be converted, or the result
            cannot be used; the text says what was found and what to do.
        ModelNotLoadable: the memory would not suffice.
    """
    progress = progress or _nobody
    if target.exists():
        raise ModelExists(f"{target} exists already; choose another name or remove it first.")
    if quantization not in ACCEPTED_MODEL_TYPES:
        raise ModelUnavailable(
            f"{quantization!r} is no number type; expected one of {', '.join(ACCEPTED_MODEL_TYPES)}."
        )
    _check_source(source)
    _check_extra()
    progress("reading", 0.0)
    fresh = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        _convert(source, fresh, quantization, progress)
        progress("checking", 0.95)
        _prove(fresh)
        fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    progress("finished", 1.0)


def _nobody(stage: str, share: float) -> None:
    pass


def _check_source(source: Path) -> None:
    weights = [file for pattern in _WEIGHTS for file in source.glob(pattern)] if source.is_dir() else []
    if not weights or not (source / "config.json").is_file():
        found = ", ".join(sorted(file.name for file in source.iterdir())[:6]) if source.is_dir() else "no folder"
        raise ModelUnavailable(
            f"{source}: found {found or 'an empty folder'}; expected config.json and *.safetensors, "
            "weights for Transformers."
        )
    check_modules(source)
    # Measured: the weights as they are read and as they are written, at the same time.
    check_room(source.name, 2 * sum(file.stat().st_size for file in weights), available_memory())


def _check_extra() -> None:
    # No hub is asked for anything: the model is a folder on this machine.
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelUnavailable(
            f"Converting needs {' and '.join(missing)}, which the extra `convert` brings: "
            "type  .venv/bin/python -m pip install --editable '.[convert]'  in MoltBot's folder and repeat the command."
        )
    transformers = importlib.import_module("transformers")
    if int(transformers.__version__.partition(".")[0]) < 5:
        raise ModelUnavailable(
            f"Converting needs transformers 5 or newer; found {transformers.__version__}: "
            "type  .venv/bin/python -m pip install --upgrade --editable '.[convert]'  in MoltBot's folder and repeat."
        )
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _convert(source: Path, target: Path, quantization: str, progress: Progress) -> None:
    converter = WeightsConverter(str(source), progress)
    with _told(source):
        converter.convert(str(target), quantization=quantization)
        config, tokenizer = converter.config, converter.tokenizer
        del converter
        gc.collect()  # the weights as Transformers had them
        tokenizer.save_pretrained(str(target))
    for pattern in _KEPT:
        for file in source.glob(pattern):
            shutil.copy2(file, target / file.name)
    if (source / POOLING).is_file():
        (target / POOLING).parent.mkdir()
        shutil.copy2(source / POOLING, target / POOLING)
    if not (target / GENERATION_CONFIG).exists() and config.eos_token_id is not None:
        (target / GENERATION_CONFIG).write_bytes(msgspec.json.encode({"eos_token_id": config.eos_token_id}))
    if not (target / "tokenizer.json").exists() and (source / "tokenizer.model").exists():
        shutil.copy2(source / "tokenizer.model", target)
    description = _describe(source, target, config, tokenizer, quantization)
    (target / DESCRIPTION).write_bytes(msgspec.yaml.encode(description))


@contextlib.contextmanager
def _told(source: Path) -> Iterator[None]:
    """Tell what a library says about a model in words of ours, with its own at the end."""
    try:
        yield
    except Exception as problem:  # three libraries raise what they like about a model that they cannot read
        raise ModelUnavailable(f"{source} cannot be converted: {_words(problem):.500}") from problem


def _words(problem: Exception) -> str:
    """Return the first line of what a library says, or all of them where the first one only announces the others."""
    if isinstance(problem, OSError) and problem.strerror:
        return f"{problem.strerror} ({problem.filename})" if problem.filename else problem.strerror
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    told = " ".join(lines) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return told.rstrip(": ") or type(problem).__name__


def _describe(source: Path, target: Path, config: Any, tokenizer: Any, quantization: str) -> dict[str, object]:
    kind = str(config.model_type)
    words = tokenizer.get_vocab()
    family = _FAMILY_OF.get(kind, kind)
    if kind == "llama":
        family = "llama3" if "<|eot_id|>" in words else "llama2"
    description: dict[str, object] = {
        "family": family,
        "display_name": source.resolve().name,
        "context_length": _context_length(config, tokenizer, encoder=is_encoder(target)),
        "provenance": f"Converted from {source.resolve().name}, a {kind} of Transformers, "
        f"to {quantization} with CTranslate2 {ctranslate2.__version__}.",
    }
    if "enable_thinking" in str(getattr(tokenizer, "chat_template", "")):
        # Whoever chats would read the reasoning as the answer; true lets the model reason.
        description["template_options"] = {"enable_thinking": False}
    return description


def _context_length(config: Any, tokenizer: Any, *, encoder: bool) -> int:
    """Return how many tokens CTranslate2 reads right.

    It computes attention over a sliding window right as far as the window goes, and wrong behind it.
    """
    limits = [getattr(config, "max_position_embeddings", None) or 2048]
    if encoder:
        limits[0] -= 2 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
        if tokenizer.model_max_length < _UNBOUNDED:
            limits.append(tokenizer.model_max_length)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if slides and getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        limits.append(config.sliding_window)
    return int(min(limits))


def _prove(target: Path) -> None:
    """Read the result as the server will."""
    if is_encoder(target):
        read_encoder_folder(target)
        return
    template = (target / CHAT_TEMPLATE).is_file() or read_json(target / TOKENIZER_CONFIG, {}).get("chat_template")
    family = msgspec.yaml.decode((target / DESCRIPTION).read_bytes())["family"]
    if not template and family not in families():
        raise ModelUnavailable(
            f"The model has no chat template, and its kind, {family}, is no family that is known; "
            "MoltBot needs a model that was made for conversations (its name often ends with Instruct, Chat or it)."
        )
    Tokenizer(read_folder(target))
