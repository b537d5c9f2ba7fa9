"""Answers in the Anthropic dialect, as they come. Only what is needed of an event is decoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from moltbot_server.models.engine import Listener
from moltbot_server.models.providers.drafts import Draft, Refused, tokens
from moltbot_server.models.providers.events import Broken
from moltbot_server.turns import FinishReason, Tool, Usage

_FINISH = {
    "end_turn": FinishReason.STOP,
    "pause_turn": FinishReason.STOP,
    "max_tokens": FinishReason.LENGTH,
    "model_context_window_exceeded": FinishReason.LENGTH,
    "stop_sequence": FinishReason.STOP_TEXT,
    "tool_use": FinishReason.TOOL_CALLS,
    "refusal": FinishReason.CONTENT_FILTER,
}


class _Block(msgspec.Struct, gc=False):
    type: str = ""
    id: str | None = None
    name: str | None = None
    text: str | None = None
    thinking: str | None = None


class _Delta(msgspec.Struct, gc=False):
    text: str | None = None
    thinking: str | None = None
    partial_json: str | None = None
    stop_reason: str | None = None


class _Usage(msgspec.Struct, gc=False):
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None


class _Message(msgspec.Struct, gc=False):
    usage: _Usage | None = None


class _Event(msgspec.Struct, gc=False):
    type: str
    index: int = 0
    delta: _Delta | None = None
    content_block: _Block | None = None
    message: _Message | None = None
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


class AnthropicReading:
    """An answer of messages; it is complete with its stop reason and `message_stop`."""

    __slots__ = ("_read", "_tools", "draft")

    def __init__(self, listener: Listener, tools: Sequence[Tool], *, inline_thoughts: bool = False) -> None:
        """`inline_thoughts` means nothing here: this dialect has blocks of their own for them."""
        self.draft = Draft(listener, tools)
        self._tools: set[int] = set()
        self._read = _Usage()

    def read(self, payloads: Sequence[bytes]) -> bool:
        """Read events; see `Reading.read`."""
        draft = self.draft
        for payload in payloads:
            try:
                event = _decode(payload)
            except (ValueError, RecursionError):
                raise Broken("it sent an event that is no part of an answer") from None
            kind, delta = event.type, event.delta
            if kind == "content_block_delta" and delta is not None:
                if delta.text:
                    draft.say(delta.text)
                elif delta.thinking:
                    draft.think(delta.thinking)
                elif delta.partial_json and event.index in self._tools:
                    draft.call(event.index, "", "", delta.partial_json)
            elif kind == "content_block_start" and event.content_block is not None:
                self._begin(event.index, event.content_block)
            elif kind == "message_delta":
                if delta is not None and delta.stop_reason:
                    draft.finish = _FINISH.get(delta.stop_reason, FinishReason.STOP)
                self._count(event.usage)
            elif kind == "message_start" and event.message is not None:
                self._count(event.message.usage)
            elif kind == "message_stop":
                draft.flush()
                if draft.finish is None:
                    raise Broken("its answer ended without a reason")
                return True
            elif kind == "error":
                raise Refused(event.error)
        draft.flush()
        return False

    def missing(self) -> str:
        """Say what is missing."""
        return "its answer ended without message_stop" if self.draft.finish is not None else "its answer broke off"

    def _begin(self, index: int, block: _Block) -> None:
        if block.type == "tool_use":
            self._tools.add(index)
            self.draft.call(index, block.id or "", block.name or "", "")
        if block.text:
            self.draft.say(block.text)
        if block.thinking:
            self.draft.think(block.thinking)

    def _count(self, usage: _Usage | None) -> None:
        """Take in what was counted; the last word on each number is right (both events tell cumulative ones)."""
        if usage is None:
            return
        read = self._read
        for name in read.__struct_fields__:
            if (value := getattr(usage, name)) is not None:
                setattr(read, name, value)
        cached = tokens(read.cache_read_input_tokens)
        written = tokens(read.cache_creation_input_tokens)
        self.draft.usage = Usage(
            input_tokens=tokens(read.input_tokens) + cached + written,
            output_tokens=tokens(read.output_tokens),
            cached_input_tokens=cached,
        )
