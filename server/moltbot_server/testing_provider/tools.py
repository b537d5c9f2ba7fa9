"""The tools that a request of either dialect offers, what they answered, and a call of one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moltbot_server.testing_provider.script import ToolCall

_DEEPEST = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """What a request says of tools: the schemas of those it offers, which one has to be called, what some answered."""

    offered: Mapping[str, Any]
    wanted: str = ""
    forbidden: bool = False
    results: Sequence[str] = ()
    """What tools answered since the assistant spoke last."""

    def call(self) -> ToolCall | None:
        """Return a call of the tool that is wanted or of the first one; None where there is nothing to call now."""
        if self.forbidden or self.results or not self.offered:
            return None
        name = self.wanted if self.wanted in self.offered else next(iter(self.offered))
        sample = _sample(self.offered[name], _DEEPEST)
        return ToolCall(name=name, arguments=json.dumps(sample if isinstance(sample, dict) else {}, ensure_ascii=False))


def tools_of(body: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> Tools:
    """Return what a request says of tools; what is not of its dialect is passed over."""
    offered: dict[str, Any] = {}
    for tool in dicts(body.get("tools")):
        function = tool.get("function", tool)
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            offered[function["name"]] = function.get("parameters", function.get("input_schema"))
    choice = body.get("tool_choice")
    kind, named = choice, ""
    if isinstance(choice, dict):
        kind, told = choice.get("type"), choice.get("function", choice)
        named = told.get("name", "") if isinstance(told, dict) else ""
    return Tools(
        offered=offered,
        wanted=named if isinstance(named, str) else "",
        forbidden=kind == "none",
        results=_results(messages),
    )


def _results(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    found: list[str] = []
    for message in reversed(messages):
        if message.get("role") == "assistant":
            break
        content = message.get("content")
        if message.get("role") == "tool":
            found.insert(0, text_of(content))
        else:
            blocks = [block for block in dicts(content) if block.get("type") == "tool_result"]
            found[:0] = [text_of(block.get("content")) for block in blocks]
    return found


def text_of(content: object) -> str:
    """Return the text of a message's content, which is a text or a list of parts."""
    if isinstance(content, str):
        return content
    return "".join(str(part["text"]) for part in dicts(content) if "text" in part)


def dicts(value: object) -> list[dict[str, Any]]:
    """Return the objects of what should be a list of them."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _sample(schema: object, depth: int) -> Any:
    """Return a value that a JSON Schema allows, as far as simple schemas go; of an object what is required."""
    if not isinstance(schema, dict) or not depth:
        return {}
    for name in ("const", "default"):
        if name in schema:
            return schema[name]
    for name in ("enum", "examples"):
        if isinstance(schema.get(name), list) and schema[name]:
            return schema[name][0]
    for name in ("anyOf", "oneOf"):
        if isinstance(schema.get(name), list) and schema[name]:
            return _sample(schema[name][0], depth - 1)
    kind = schema.get("type")
    kind = kind[0] if isinstance(kind, list) and kind else kind
    if kind == "array":
        return [_sample(schema.get("items"), depth - 1)] if schema.get("minItems") else []
    simple = {"string": "text", "boolean": True, "null": None, "integer": 1, "number": 1}
    if isinstance(kind, str) and kind in simple:
        return schema.get("minimum", simple[kind])
    each, required = schema.get("properties"), schema.get("required")
    if not isinstance(each, dict) or not isinstance(required, list):
        return {}
    return {name: _sample(each[name], depth - 1) for name in required if isinstance(name, str) and name in each}
