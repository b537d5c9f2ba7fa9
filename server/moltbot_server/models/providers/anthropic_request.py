"""Requests in the Anthropic dialect: messages, streamed; https://docs.anthropic.com/en/api/messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from moltbot_server.models.providers.contents import address, arguments, as_base64, left_out, media_type, schema
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

VERSION = "2023-06-01"
"""The version of the interface that is asked for by default: the last one that takes sampling options at all."""


def request(terms: Terms, messages: Sequence[Message], options: GenerationOptions) -> bytes:
    """Return the body of a request.

    Raises:
        UnsupportedContent: a picture lies where the provider cannot fetch it.
    """
    body: dict[str, Any] = {
        "model": terms.id,
        "max_tokens": options.max_output_tokens or terms.max_output_tokens,
        "messages": _conversation(messages, terms),
        "stream": True,
    }
    rules = "\n\n".join(message.text for message in messages if message.role is Role.SYSTEM and message.text.strip())
    if rules:
        body["system"] = rules
    for name in ("temperature", "top_p", "top_k"):
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
    """Return the messages without the rules; those of one speaker in a row are one, as the dialect wants them."""
    entries: list[dict[str, Any]] = []
    for message in messages:
        if message.role is Role.SYSTEM:
            continue
        role = "assistant" if message.role is Role.ASSISTANT else "user"
        parts = message.parts
        if len(parts) == 1 and type(parts[0]) is TextPart:  # nearly every message of a long history: no call for it
            blocks = [{"type": "text", "text": parts[0].text}] if parts[0].text.strip() else []
        else:
            blocks = [*_blocks(parts, role, terms)]
        if not blocks:
            continue
        if entries and entries[-1]["role"] == role:
            entries[-1]["content"].extend(blocks)
        else:
            entries.append({"role": role, "content": blocks})
    if entries and entries[-1]["role"] == "assistant" and "text" in (last := entries[-1]["content"][-1]):
        last["text"] = last["text"].rstrip()  # an answer to go on with must not end in a blank
    for entry in entries:
        blocks = entry["content"]
        if len(blocks) > 1:
            blocks.sort(key=lambda block: block["type"] != "tool_result")  # results come first in their message
        elif blocks[0]["type"] == "text":
            entry["content"] = blocks[0]["text"]  # a plain text is sent as one
    return entries


def _blocks(parts: Sequence[Part], role: str, terms: Terms) -> Iterator[dict[str, Any]]:
    for part in parts:
        if isinstance(part, TextPart):
            if part.text.strip():  # an empty block is refused
                yield {"type": "text", "text": part.text}
        elif isinstance(part, ToolCallPart):
            if role == "assistant":
                yield {
                    "type": "tool_use",
                    "id": part.call_id,
                    "name": part.tool,
                    "input": arguments(part.arguments_json),
                }
        elif isinstance(part, ToolResultPart):
            result: dict[str, Any] = {"type": "tool_result", "tool_use_id": part.call_id, "content": part.output}
            yield {**result, "is_error": True} if part.is_error else result
        elif part.kind == "image" and terms.vision and role == "user":
            yield {"type": "image", "source": _source(part)}
        else:
            yield {"type": "text", "text": left_out(part)}


def _source(part: MediaPart) -> dict[str, str]:
    if part.data:
        return {"type": "base64", "media_type": media_type(part), "data": as_base64(part)}
    url = address(part)
    if url.startswith("data:"):
        kind, _, text = url.removeprefix("data:").partition(";base64,")
        return {"type": "base64", "media_type": kind, "data": text}
    return {"type": "url", "url": url}


def _tool(tool: Tool, terms: Terms) -> dict[str, Any]:
    described = {"description": tool.description} if tool.description else {}
    held = {"strict": True} if tool.strict and terms.strict_tools else {}
    return {"name": tool.name, **described, "input_schema": schema(tool), **held}


def _choice(choice: ToolChoice) -> dict[str, str]:
    if choice.tool:
        return {"type": "tool", "name": choice.tool}
    return {"type": {ToolMode.AUTO: "auto", ToolMode.NONE: "none", ToolMode.REQUIRED: "any"}[choice.mode]}
