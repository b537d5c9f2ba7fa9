"""An answer before it is put in words of a dialect, and the bytes of one after."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from moltbot_server.testing_provider.script import Script, ToolCall, Usage
from moltbot_server.testing_provider.tools import Tools, dicts, text_of, tools_of

DEFAULT_TEXT = "Hello from the mock provider! 你好 我是模拟的模型。 Ask me anything, for example: ¿qué tal? 🙂"
"""What is answered when the script says nothing; some of its characters take two, three and four bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request as both dialects have it."""

    model: str
    stream: bool
    include_usage: bool
    last: str
    """The last text of the user."""
    words: int
    """How many words all messages have: the input tokens where the script says no usage."""
    tools: Tools
    pictures: int
    """How many all messages have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What is said, in the pieces in which it streams."""

    number: int
    created: int
    model: str
    reasoning: Sequence[str]
    text: Sequence[str]
    tool_calls: tuple[ToolCall, ...]
    usage: Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Frames:
    """An answer as bytes: what comes before the first word, the chunks, and what ends it."""

    opening: bytes
    chunks: Sequence[bytes]
    closing: bytes
    done: bytes

    @property
    def whole(self) -> bytes:
        """All of it."""
        return b"".join((self.opening, *self.chunks, self.closing, self.done))


def answer_of(script: Script, asked: Asked, number: int, created: int, *, empty: bool) -> Answer:
    """Return what a script answers to a request."""
    calls = () if empty else _calls(script, asked.tools)
    text = () if empty else pieces(_said(script, asked, calls), script.chunks)
    reasoning = () if empty else pieces(script.reasoning, None)
    output = len(text) + len(reasoning) + sum(len(call.arguments.split()) for call in calls)
    return Answer(
        number=number,
        created=created,
        model=asked.model,
        reasoning=reasoning,
        text=text,
        tool_calls=calls,
        usage=script.usage or Usage(input=asked.words, output=output),
    )


def _calls(script: Script, tools: Tools) -> tuple[ToolCall, ...]:
    if script.use_tools and (call := tools.call()) is not None:
        return (call,)
    return script.tool_calls


def _said(script: Script, asked: Asked, calls: tuple[ToolCall, ...]) -> str:
    if script.use_tools and calls:
        return ""  # what the script says is for the answer that knows what the tool found
    if script.echo:
        return asked.last
    if script.text is not None:
        return script.text
    if script.use_tools and asked.tools.results:
        return f"The tool answered: {' '.join(asked.tools.results)}"
    return "" if calls else DEFAULT_TEXT


@lru_cache(maxsize=1024)
def pieces(text: str, count: int | None) -> tuple[str, ...]:
    """Cut a text into words with the spaces after them, or into `count` equal pieces; a short one is said again."""
    if not text:
        return ()
    if count is None:
        return tuple(re.findall(r"\s*\S+\s*?(?=\s|$)|\s+$", text))
    while len(text) < count:
        text += text
    edges = [len(text) * at // count for at in range(count + 1)]
    return tuple(text[edges[at] : edges[at + 1]] for at in range(count))


def arguments_in_two(call: ToolCall) -> tuple[str, str]:
    """Return the arguments of a call in the two pieces in which they stream."""
    middle = len(call.arguments) // 2
    return call.arguments[:middle], call.arguments[middle:]


def compact(value: Any) -> bytes:
    """Return a value as JSON in UTF-8, so that characters are there to be cut."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


class BadRequest(ValueError):
    """A request is not one of the dialect; `param` names the field that is to blame."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


def read_request(body: object) -> Asked:
    """Return what both dialects share of a request.

    Raises:
        BadRequest: there is no model or no messages.
    """
    if not isinstance(body, dict):
        raise BadRequest("The body must be a JSON object.")
    model, messages = body.get("model"), body.get("messages")
    if not isinstance(model, str) or not model:
        raise BadRequest("You must provide a model.", "model")
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise BadRequest("You must provide messages: a list of objects, at least one.", "messages")
    texts = [text_of(each.get("content")) for each in messages]
    mine = [text for each, text in zip(messages, texts, strict=True) if each.get("role") == "user"]
    options = body.get("stream_options")
    return Asked(
        model=model,
        stream=body.get("stream") is True,
        include_usage=isinstance(options, dict) and options.get("include_usage") is True,
        last=mine[-1] if mine else "",
        words=sum(len(text.split()) for text in [*texts, text_of(body.get("system"))]),
        tools=tools_of(body, messages),
        pictures=sum(
            part.get("type") in ("image_url", "image") for each in messages for part in dicts(each.get("content"))
        ),
    )
