"""How an answer is to be written, as the contract says it: read, and refused where no model could honour it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import msgspec
from moltbot.v1 import message_pb2

from moltbot_server.errors import ContentTooLarge, InvalidField
from moltbot_server.turns import GenerationOptions, Tool, ToolChoice, ToolMode

_TOOL_MODES = {message_pb2.ToolMode.Value(f"TOOL_MODE_{mode.value.upper()}"): mode for mode in ToolMode}
_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

_MOST_TOOLS = 128


def read_options(spec: message_pb2.GenerationOptions, field: str) -> GenerationOptions:
    """Return how an answer is to be written; an engine checks what it can honour.

    Raises:
        InvalidField: an option is out of its range.
    """
    options = GenerationOptions(
        max_output_tokens=spec.max_output_tokens if spec.HasField("max_output_tokens") else None,
        temperature=_exact(spec.temperature) if spec.HasField("temperature") else None,
        top_p=_exact(spec.top_p) if spec.HasField("top_p") else None,
        top_k=spec.top_k if spec.HasField("top_k") else None,
        stop=tuple(spec.stop),
        repetition_penalty=_exact(spec.repetition_penalty) if spec.HasField("repetition_penalty") else None,
        seed=spec.seed if spec.HasField("seed") else None,
        tools=_tools(spec.tools, f"{field}.tools") if spec.tools else (),
        tool_choice=_tool_choice(spec, field) if spec.HasField("tool_choice") else None,
    )
    _check_options(options, field)
    return options


def _check_options(options: GenerationOptions, field: str) -> None:
    """Refuse options that no model could honour."""
    ranges: tuple[tuple[str, float | None, float, float], ...] = (
        ("max_output_tokens", options.max_output_tokens, 1, 1 << 20),
        ("temperature", options.temperature, 0.0, 2.0),
        ("top_p", options.top_p, 1e-9, 1.0),
        ("top_k", options.top_k, 0, 1 << 20),
        ("repetition_penalty", options.repetition_penalty, 1e-9, 10.0),
    )
    for name, value, least, most in ranges:
        if value is not None and not least <= value <= most:
            wanted = f"above 0, up to {most:g}" if least == 1e-9 else f"{least:g} to {most:.0f}"
            raise InvalidField(f"{field}.{name}", f"use a value of {wanted}")
    if len(options.stop) > 8:
        raise InvalidField(f"{field}.stop", "use at most 8 texts")
    for text in options.stop:
        if not 1 <= len(text) <= 64:
            raise InvalidField(f"{field}.stop", "use texts of 1 to 64 characters")


def _tools(entries: Sequence[message_pb2.Tool], field: str) -> tuple[Tool, ...]:
    """Return the tools that a model may ask for.

    Raises:
        InvalidField: a name is wrong or there twice, a schema is no JSON object, or there are too many.
    """
    if len(entries) > _MOST_TOOLS:
        raise ContentTooLarge(field, f"name at most {_MOST_TOOLS} tools")
    read: dict[str, Tool] = {}
    for index, entry in enumerate(entries):
        if not _TOOL_NAME.fullmatch(entry.name) or entry.name in read:
            raise InvalidField(f"{field}[{index}].name", "use 1 to 64 characters of A-Z a-z 0-9 _ -, each name once")
        if entry.parameters_json and not _is_object(entry.parameters_json):
            raise InvalidField(f"{field}[{index}].parameters_json", "write a JSON Schema: one JSON object")
        read[entry.name] = Tool(
            name=entry.name,
            description=entry.description,
            parameters_json=entry.parameters_json,
            strict=entry.strict,
        )
    return tuple(read.values())


def _tool_choice(spec: message_pb2.GenerationOptions, field: str) -> ToolChoice:
    choice = spec.tool_choice
    if choice.tool and choice.tool not in {entry.name for entry in spec.tools}:
        raise InvalidField(f"{field}.tool_choice.tool", "name one of `tools`")
    mode = _TOOL_MODES.get(choice.mode, ToolMode.AUTO)
    if mode is ToolMode.REQUIRED and not spec.tools:
        raise InvalidField(f"{field}.tool_choice.mode", "there are no `tools` to ask for")
    return ToolChoice(mode=ToolMode.REQUIRED if choice.tool else mode, tool=choice.tool)


def _is_object(text: str) -> bool:
    try:
        return isinstance(msgspec.json.decode(text), dict)
    except (msgspec.DecodeError, RecursionError):
        return False


def _exact(value: float) -> float:
    """Return a float32 of the wire as the decimal that was meant: 0.7 rather than 0.699999988."""
    return float(f"{value:.7g}") if math.isfinite(value) else value
