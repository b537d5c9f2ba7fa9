"""Tools that a model may ask for: how they are offered, and how what they answered goes back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from moltbot.v1 import message_pb2


def tool(name: str, description: str = "", parameters: Mapping[str, Any] | None = None) -> message_pb2.Tool:
    """Return a tool for `GenerationOptions.tools`; `parameters` is a JSON Schema of its arguments, None for none."""
    schema = "" if parameters is None else json.dumps(parameters, ensure_ascii=False)
    return message_pb2.Tool(name=name, description=description, parameters_json=schema)


def arguments(call: message_pb2.ToolCall) -> dict[str, Any]:
    """Return the arguments that a model calls a tool with.

    Raises:
        ValueError: the model wrote no JSON object.
    """
    read = json.loads(call.arguments_json or "{}")
    if not isinstance(read, dict):
        raise ValueError("the arguments are no JSON object")
    return read


def result(call: message_pb2.ToolCall, output: object, *, is_error: bool = False) -> message_pb2.Part:
    """Return what a tool answered as a part of the next message; what is no text is written as JSON.

    The results of all calls of an answer go into one message, in any order.
    """
    text = output if isinstance(output, str) else json.dumps(output, ensure_ascii=False)
    told = message_pb2.ToolResult(call_id=call.call_id, tool=call.tool, output=text, is_error=is_error)
    return message_pb2.Part(tool_result=told)
