"""The messages of a Chat Completions request as the contract's transcript, parts and system prompt."""

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Any

from moltbot.v1 import message_pb2

from moltbot_adapters.http.body import whole, wrong_type
from moltbot_adapters.http.errors import HttpError

_ROLES = {
    "system": message_pb2.ROLE_SYSTEM,
    "developer": message_pb2.ROLE_SYSTEM,
    "user": message_pb2.ROLE_USER,
    "assistant": message_pb2.ROLE_ASSISTANT,
    "tool": message_pb2.ROLE_TOOL,
}
_AUDIO = {"wav": "audio/wav", "mp3": "audio/mpeg"}
_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[\w.+-]*)*;base64,(.*)", re.ASCII | re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A request's messages, taken apart: the rules, what was said before, and what is to be answered."""

    system_prompt: str
    history: tuple[message_pb2.Message, ...]
    parts: tuple[message_pb2.Part, ...]


def conversation_of(messages: Any, *, closed: bool) -> Conversation:
    """Returns the messages as the core takes them. Raises `HttpError` 400, naming the message and the part.

    `closed`: they are all that there is, so that what a tool answered must answer a call among them. What several
    tools answered last is answered together.
    """
    if not isinstance(messages, list) or not messages:
        raise wrong_type("messages", "a list of at least one message")
    rules: list[str] = []
    said: list[message_pb2.Message] = []
    called: dict[str, str] = {}
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        role, parts = _message(message, where)
        if role == message_pb2.ROLE_TOOL:
            _name_the_tool(parts[0].tool_result, called, where, closed=closed)
        called |= {part.tool_call.call_id: part.tool_call.tool for part in parts if part.HasField("tool_call")}
        if role == message_pb2.ROLE_SYSTEM and not said:
            rules.append(_only_text(parts, f"{where}.content"))
        elif parts or index == len(messages) - 1:
            said.append(message_pb2.Message(role=role, parts=parts))
    newest = _newest(said)
    return Conversation(
        system_prompt="\n\n".join(rule for rule in rules if rule),
        history=tuple(said[: len(said) - len(newest)]),
        parts=tuple(part for message in newest for part in message.parts),
    )


def _newest(said: list[message_pb2.Message]) -> list[message_pb2.Message]:
    """Return the last messages, which are to be answered: one of the user, or what tools answered one after another."""
    if not said or said[-1].role not in (message_pb2.ROLE_USER, message_pb2.ROLE_TOOL):
        raise HttpError(
            400, "invalid_value", "The last message must be of the role 'user' or 'tool'.", param="messages"
        )
    if said[-1].role == message_pb2.ROLE_USER:
        return said[-1:]
    before = next((at for at in range(len(said), 0, -1) if said[at - 1].role != message_pb2.ROLE_TOOL), 0)
    return said[before:]


def _name_the_tool(result: message_pb2.ToolResult, called: dict[str, str], where: str, *, closed: bool) -> None:
    if closed and result.call_id not in called:
        problem = f"'{where}' answers no call: no 'tool_calls' of a message before it has this 'tool_call_id'."
        raise HttpError(400, "invalid_value", problem, param=f"{where}.tool_call_id")
    result.tool = called.get(result.call_id, "")


def _only_text(parts: list[message_pb2.Part], where: str) -> str:
    if not all(part.HasField("text") for part in parts):
        raise HttpError(400, "unsupported_value", f"'{where}' may hold text only.", param=where)
    return "".join(part.text for part in parts)


def _message(message: Any, where: str) -> tuple["message_pb2.Role.ValueType", list[message_pb2.Part]]:
    if not isinstance(message, dict):
        raise wrong_type(where, "an object")
    name = message.get("role")
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise HttpError(
            400, "invalid_value", f"'{where}.role' must be one of {', '.join(_ROLES)}.", param=f"{where}.role"
        )
    content = message.get("content")
    if role == message_pb2.ROLE_TOOL:
        output = _only_text(_parts(content, where), f"{where}.content")
        call_id = _text(message.get("tool_call_id"), f"{where}.tool_call_id")
        return role, [message_pb2.Part(tool_result=message_pb2.ToolResult(call_id=call_id, output=output))]
    if role == message_pb2.ROLE_ASSISTANT:
        return role, [*([] if content is None else _parts(content, where)), *_tool_calls(message, where)]
    return role, _parts(content, where)


def _parts(content: Any, where: str) -> list[message_pb2.Part]:
    where = f"{where}.content"
    if isinstance(content, str):
        return [message_pb2.Part(text=whole(content, where))] if content else []
    if not isinstance(content, list):
        raise wrong_type(where, "a string or a list of parts")
    return [_part(part, f"{where}[{index}]") for index, part in enumerate(content)]


def _part(part: Any, where: str) -> message_pb2.Part:
    if not isinstance(part, dict):
        raise wrong_type(where, "an object")
    match part.get("type"):
        case "text":
            return message_pb2.Part(text=_text(part.get("text"), f"{where}.text"))
        case "refusal":
            return message_pb2.Part(text=_text(part.get("refusal"), f"{where}.refusal"))
        case "image_url":
            return message_pb2.Part(image=_image(part.get("image_url"), f"{where}.image_url"))
        case "input_audio":
            return message_pb2.Part(audio=_audio(part.get("input_audio"), f"{where}.input_audio"))
        case "file":
            return message_pb2.Part(file=_file(part.get("file"), f"{where}.file"))
    raise HttpError(
        400,
        "unsupported_value",
        f"'{where}.type' must be one of text, image_url, input_audio, file.",
        param=f"{where}.type",
    )


def _image(value: Any, where: str) -> message_pb2.Media:
    url = _text(value.get("url") if isinstance(value, dict) else value, f"{where}.url")
    if url.startswith("https://"):
        return message_pb2.Media(uri=url)
    return _data_url(url, f"{where}.url", "a data: URL in base64 or an https: URL")


def _audio(value: Any, where: str) -> message_pb2.Media:
    if not isinstance(value, dict):
        raise wrong_type(where, "an object")
    kind = value.get("format")
    if not isinstance(kind, str) or kind not in _AUDIO:
        raise HttpError(400, "unsupported_value", f"'{where}.format' must be wav or mp3.", param=f"{where}.format")
    return message_pb2.Media(data=_base64(value.get("data"), f"{where}.data"), media_type=_AUDIO[kind])


def _file(value: Any, where: str) -> message_pb2.Media:
    if not isinstance(value, dict):
        raise wrong_type(where, "an object")
    if value.get("file_id") is not None:
        raise HttpError(
            400, "unsupported_value", f"'{where}.file_id' is not supported; send file_data.", param=f"{where}.file_id"
        )
    data = _text(value.get("file_data"), f"{where}.file_data")
    if data.startswith("data:"):
        media = _data_url(data, f"{where}.file_data", "a data: URL in base64")
    else:
        media = message_pb2.Media(data=_base64(data, f"{where}.file_data"), media_type="application/octet-stream")
    media.filename = _text(value.get("filename", ""), f"{where}.filename")
    return media


def _data_url(url: str, where: str, wanted: str) -> message_pb2.Media:
    found = _DATA_URL.fullmatch(url)
    if found is None:
        raise HttpError(400, "invalid_value", f"'{where}' must be {wanted}.", param=where)
    return message_pb2.Media(data=_base64(found[2], where), media_type=found[1] or "application/octet-stream")


def _base64(value: Any, where: str) -> bytes:
    try:
        return base64.b64decode(_text(value, where), validate=True)
    except (binascii.Error, ValueError):
        raise HttpError(400, "invalid_value", f"'{where}' is not valid base64.", param=where) from None


def _tool_calls(message: dict[str, Any], where: str) -> list[message_pb2.Part]:
    calls = message.get("tool_calls")
    where = f"{where}.tool_calls"
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise wrong_type(where, "a list")
    return [_tool_call(call, f"{where}[{index}]") for index, call in enumerate(calls)]


def _tool_call(call: Any, where: str) -> message_pb2.Part:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise wrong_type(f"{where}.function", "an object")
    return message_pb2.Part(
        tool_call=message_pb2.ToolCall(
            call_id=_text(call.get("id"), f"{where}.id"),
            tool=_text(function.get("name"), f"{where}.function.name"),
            arguments_json=_text(function.get("arguments", ""), f"{where}.function.arguments"),
        )
    )


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise wrong_type(where, "a string")
    return whole(value, where)
