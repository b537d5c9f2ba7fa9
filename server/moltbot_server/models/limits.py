"""What a model may be asked for: generation options within their ranges, content that it can read."""

from __future__ import annotations

from collections.abc import Sequence

from moltbot_server.errors import InvalidField, UnsupportedContent, UnsupportedOption
from moltbot_server.models.engine import Capabilities
from moltbot_server.turns import GenerationOptions, MediaPart, Part, TextPart

MAX_STOPS = 8
MAX_STOP_CHARACTERS = 64


def check_options(options: GenerationOptions, capabilities: Capabilities) -> None:
    """Refuse options that are out of range or that a model with these capabilities would ignore.

    Raises:
        InvalidField: an option is out of its range.
        UnsupportedOption: the model cannot honour an option.
    """
    can_write(capabilities, "model")
    if options == _NOTHING_ASKED:
        return
    _check_ranges(options)
    asked = {
        "temperature": options.temperature is not None and not capabilities.sampling,
        "top_p": options.top_p is not None and not capabilities.sampling,
        "top_k": options.top_k is not None and not capabilities.sampling,
        "stop": bool(options.stop) and not capabilities.stop,
        "seed": options.seed is not None and not capabilities.seed,
        "repetition_penalty": options.repetition_penalty is not None and not capabilities.repetition_penalty,
        "tools": bool(options.tools) and not capabilities.tools,
    }
    for name, unsupported in asked.items():
        if unsupported:
            raise UnsupportedOption(f"options.{name}", "this model cannot honour it; leave it out")


def can_write(capabilities: Capabilities, field: str) -> None:
    """Refuse a model that turns texts into vectors and writes no answers.

    Raises:
        InvalidField: the model does not write; `field` is where it was named.
    """
    if not capabilities.generation:
        raise InvalidField(field, "this model turns texts into vectors and writes no answers; name another one")


def check_content(parts: Sequence[Part], capabilities: Capabilities) -> None:
    """Refuse parts that a model with these capabilities cannot read.

    Raises:
        UnsupportedContent: a part is neither text nor named by the capabilities; the field is the part's index.
    """
    for index, part in enumerate(parts):
        if isinstance(part, TextPart):
            continue
        if isinstance(part, MediaPart):
            readable = {"image": capabilities.image_input, "audio": capabilities.audio_input}
            if not readable.get(part.kind, False):
                raise UnsupportedContent(f"parts[{index}]", f"this model reads no {part.kind} content, only text")
        elif not capabilities.tools:
            raise UnsupportedContent(f"parts[{index}]", "this model knows no tools, only text")


_NOTHING_ASKED = GenerationOptions()


def _check_ranges(options: GenerationOptions) -> None:
    if options.max_output_tokens is not None and options.max_output_tokens < 1:
        raise InvalidField("options.max_output_tokens", "must be at least 1")
    if options.temperature is not None and not 0 <= options.temperature <= 2:
        raise InvalidField("options.temperature", "must be from 0 to 2")
    if options.top_p is not None and not 0 < options.top_p <= 1:
        raise InvalidField("options.top_p", "must be above 0 and at most 1")
    if options.top_k is not None and options.top_k < 0:
        raise InvalidField("options.top_k", "must be 0 (all tokens) or more")
    if options.repetition_penalty is not None and not 0 < options.repetition_penalty <= 10:
        raise InvalidField("options.repetition_penalty", "must be above 0 and at most 10")
    if len(options.stop) > MAX_STOPS:
        raise InvalidField("options.stop", f"must be at most {MAX_STOPS} texts")
    for index, text in enumerate(options.stop):
        if not 1 <= len(text) <= MAX_STOP_CHARACTERS:
            raise InvalidField(f"options.stop[{index}]", f"must be 1 to {MAX_STOP_CHARACTERS} characters")
