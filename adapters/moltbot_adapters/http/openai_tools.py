"""Tools in a Chat Completions request, and the calls of them in an answer."""

import json
from collections.abc import Sequence
from typing import Any

from moltbot.v1 import message_pb2

from moltbot_adapters.http.body import whole, wrong_type
from moltbot_adapters.http.errors import HttpError

_MODES = {
    "auto": message_pb2.TOOL_MODE_AUTO,
    "none": message_pb2.TOOL_MODE_NONE,
    "required": message_pb2.TOOL_MODE_REQUIRED,
}


def tools_into(options: message_pb2.GenerationOptions, body: dict[str, Any]) -> None:
    """Fills in which tools the model may ask for. Raises `HttpError` 400, naming the parameter."""
    tools = body.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise wrong_type("tools", "a list")
    options.tools.extend(_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools or ()))
    choice = body.get("tool_choice")
    if choice is None or (choice in ("auto", "none") and not options.tools):
        return
    if not options.tools:
        raise HttpError(400, "invalid_value", "'tool_choice' chooses among 'tools'; send some.", param="tool_choice")
    options.tool_choice.CopyFrom(_choice(choice))


def calls_of(parts: Sequence[message_pb2.Part], *, one: bool) -> list[dict[str, Any]]:
    """Returns the calls among the parts of an answer as the API has them; of several, only the first where `one`.

    A caller that wants one at a time sends its result and is told of the next one then, if the model still wants it.
    """
    calls = [part.tool_call for part in parts if part.HasField("tool_call")]
    return [
        {
            "id": call.call_id,
            "type": "function",
            "function": {"name": call.tool, "arguments": call.arguments_json or "{}"},
        }
        for call in (calls[:1] if one else calls)
    ]


def _tool(tool: Any, where: str) -> message_pb2.Tool:
    if not isinstance(tool, dict):
        raise wrong_type(where, "an object")
    if tool.get("type") != "function":
        raise HttpError(400, "unsupported_value", f"'{where}.type' must be 'function'.", param=f"{where}.type")
    function, where = tool.get("function"), f"{where}.function"
    if not isinstance(function, dict):
        raise wrong_type(where, "an object")
    strict = function.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise wrong_type(f"{where}.strict", "true or false")
    return message_pb2.Tool(
        name=_text(function.get("name"), f"{where}.name"),
        description=_text(function.get("description") or "", f"{where}.description"),
        parameters_json=_schema(function.get("parameters"), f"{where}.parameters"),
        strict=bool(strict),
    )


def _schema(value: Any, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, dict):
        raise wrong_type(where, "an object")
    return whole(json.dumps(value, ensure_ascii=False, separators=(",", ":")), where)


def _choice(choice: Any) -> message_pb2.ToolChoice:
    if isinstance(choice, str) and choice in _MODES:
        return message_pb2.ToolChoice(mode=_MODES[choice])
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    if not isinstance(function, dict):
        raise HttpError(
            400,
            "unsupported_value",
            "'tool_choice' must be none, auto, required, or name one function.",
            param="tool_choice",
        )
    name = _text(function.get("name"), "tool_choice.function.name")
    return message_pb2.ToolChoice(mode=message_pb2.TOOL_MODE_REQUIRED, tool=name)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise wrong_type(where, "a string")
    return whole(value, where)
