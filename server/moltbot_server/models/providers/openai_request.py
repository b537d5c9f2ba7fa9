"""Requests in the OpenAI dialect: chat completions, streamed; https://platform.openai.com/docs/api-reference/chat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from moltbot_server.models.providers.contents import address, arguments, as_base64, is_plain, left_out, media_type
from moltbot_server.models.providers.presets import Terms
from moltbot_server.turns import (
    GenerationOptions,
    MediaPart,
    Message,
    Part,
    Role,
    TextPart,
    Tool,
    ToolCallPart,
    ToolChoice,
    ToolMode,
    ToolResultPart,
)

_ROLES = {Role.SYSTEM: "system", Role.USER: "user", Role.ASSISTANT: "assistant", Role.TOOL: "user"}


def request(terms: Terms, messages: Sequence[Message], options: GenerationOptions) -> bytes:
    """Return the body of a request.

    Raises:
        UnsupportedContent: a picture lies where the provider cannot fetch it.
    """
    body: dict[str, Any] = {
        "model": terms.id,
        "messages": _conversation(messages, terms),
        "stream": True,
    }
    if terms.asks_usage:
        body["stream_options"] = {"include_usage": True}
    for name in ("max_output_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed"):
        value, field = getattr(options, name), terms.options.get(name)
        if value is not None and field and not (name == "top_k" and value == 0):  # 0 is all tokens, as without it
            body[field] = value
    if options.stop and (field := terms.options.get("stop")):
        body[field] = options.stop
    if options.tools:
        body["tools"] = [_tool(tool, terms) for tool in options.tools]
        if options.tool_choice is not None:
            body["tool_choice"] = _choice(options.tool_choice)
    return msgspec.json.encode(body)


def _conversation(messages: Sequence[Message], terms: Terms) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for message in messages:
        parts = message.parts
        if len(parts) == 1 and type(parts[0]) is TextPart:  # nearly every message of a long history: no call for it
            entries.append({"role": _ROLES[message.role], "content": parts[0].text})
        else:
            entries.extend(_entries(message, terms))
    return entries


def _entries(message: Message, terms: Terms) -> Iterator[dict[str, Any]]:
    """Yield what one message of ours is over there: results of tools are messages of their own, before the rest."""
    rest = message.parts
    if not is_plain(rest):
        for part in rest:
            if isinstance(part, ToolResultPart):
                output = f"Error: {part.output}" if part.is_error else part.output
                yield {"role": "tool", "tool_call_id": part.call_id, "content": output}
        rest = tuple(part for part in rest if not isinstance(part, ToolResultPart))
        if not rest:
            return
    role = _ROLES[message.role]
    if role == "assistant":
        yield _answer(rest)
    elif is_plain(rest):
        yield {"role": role, "content": message.text}
    else:
        yield {"role": role, "content": [_content(part, terms) for part in rest]}


def _answer(parts: Sequence[Part]) -> dict[str, Any]:
    text = "".join(map(_words, parts))
    calls = [
        {
            "id": part.call_id,
            "type": "function",
            "function": {"name": part.tool, "arguments": bytes(arguments(part.arguments_json)).decode()},
        }
        for part in parts
        if isinstance(part, ToolCallPart)
    ]
    if calls:
        return {"role": "assistant", "content": text or None, "tool_calls": calls}
    return {"role": "assistant", "content": text}


def _words(part: Part) -> str:
    if isinstance(part, TextPart):
        return part.text
    return left_out(part) if isinstance(part, MediaPart) else ""


def _content(part: Part, terms: Terms) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    if not isinstance(part, MediaPart):
        return {"type": "text", "text": "[call of a tool]"}  # no user makes one; a message is never sent without words
    if part.kind != "image" or not terms.vision:
        return {"type": "text", "text": left_out(part)}
    url = f"data:{media_type(part)};base64,{as_base64(part)}" if part.data else address(part)
    return {"type": "image_url", "image_url": {"url": url}}


def _tool(tool: Tool, terms: Terms) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    if tool.parameters_json:
        function["parameters"] = msgspec.Raw(tool.parameters_json.encode())
    if tool.strict and terms.strict_tools:
        function["strict"] = True
    return {"type": "function", "function": function}


def _choice(choice: ToolChoice) -> object:
    if choice.tool:
        return {"type": "function", "function": {"name": choice.tool}}
    return {ToolMode.AUTO: "auto", ToolMode.NONE: "none", ToolMode.REQUIRED: "required"}[choice.mode]
