"""Answers in the OpenAI dialect, as they come. Only what is needed of a chunk is decoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from moltbot_server.models.engine import Listener
from moltbot_server.models.providers.drafts import Draft, Refused, tokens
from moltbot_server.models.providers.events import Broken
from moltbot_server.models.providers.thoughts import InlineThoughts
from moltbot_server.turns import FinishReason, Tool, Usage

_FINISH = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "model_length": FinishReason.LENGTH,
    "model_context_window_exceeded": FinishReason.LENGTH,
    "content_filter": FinishReason.CONTENT_FILTER,
    "sensitive": FinishReason.CONTENT_FILTER,
    "tool_calls": FinishReason.TOOL_CALLS,
    "function_call": FinishReason.TOOL_CALLS,
}
_FAILED = frozenset({"error", "network_error", "insufficient_system_resource", "abort"})


class _Function(msgspec.Struct, gc=False):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct, gc=False):
    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _Delta(msgspec.Struct, gc=False):
    content: str | list[Any] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[_Call] | None = None


class _Details(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    cached_tokens: int | None = None
    prompt_cache_hit_tokens: int | None = None


class _Choice(msgspec.Struct, gc=False):
    index: int | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None
    usage: _Usage | None = None


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


class OpenAIReading:
    """An answer of a chat completion; it is complete with its finish reason and `[DONE]`.

    What comes in one read with a fault is not told: nobody has seen it, so another model can answer unseen.
    """

    __slots__ = ("_inline", "draft")

    def __init__(self, listener: Listener, tools: Sequence[Tool], *, inline_thoughts: bool = False) -> None:
        """`inline_thoughts`: the model may write its thoughts into the text, between <think> and </think>."""
        self.draft = Draft(listener, tools)
        self._inline = InlineThoughts(self.draft) if inline_thoughts else None

    def read(self, payloads: Sequence[bytes]) -> bool:
        """Read chunks; see `Reading.read`."""
        draft = self.draft
        say = draft.say if self._inline is None else self._inline.say
        for payload in payloads:
            if payload == b"[DONE]" or payload.strip() == b"[DONE]":
                return self._done()
            try:
                chunk = _decode(payload)
            except (ValueError, RecursionError):
                raise Broken("it sent an event that is no chunk of an answer") from None
            if chunk.error is not None:
                raise Refused(chunk.error)
            if chunk.usage is not None:
                self._count(chunk.usage)
            if not chunk.choices:
                continue
            choice = chunk.choices[0]
            delta = choice.delta
            if delta is not None and not choice.index:
                if delta.reasoning_content or delta.reasoning:
                    draft.think(delta.reasoning_content or delta.reasoning or "")
                if delta.content:
                    say(delta.content) if isinstance(delta.content, str) else self._parts(delta.content)
                if delta.refusal:
                    say(delta.refusal)
                if delta.tool_calls:
                    self._call(delta.tool_calls)
            if choice.finish_reason:
                self._finish(choice)
        draft.flush()
        return False

    def missing(self) -> str:
        """Say what is missing."""
        return "its answer ended without [DONE]" if self.draft.finish is not None else "its answer broke off"

    def _done(self) -> bool:
        if self._inline is not None:
            self._inline.end()
        self.draft.flush()
        if self.draft.finish is None:
            raise Broken("its answer ended without a reason")
        return True

    def _finish(self, choice: _Choice) -> None:
        reason = choice.finish_reason or ""
        if reason in _FAILED:
            raise Broken(f"it gave up ({reason})")
        finish = _FINISH.get(reason, FinishReason.STOP)
        if finish in (FinishReason.STOP, FinishReason.TOOL_CALLS):  # some say `stop` where tools are to be called
            finish = FinishReason.TOOL_CALLS if self.draft.calls else FinishReason.STOP
        self.draft.finish = finish
        if choice.usage is not None:
            self._count(choice.usage)

    def _parts(self, parts: Sequence[Any]) -> None:
        """Read a content that is a list, as some have it for thoughts."""
        for part in parts:
            if not isinstance(part, dict):
                continue
            if isinstance(text := part.get("text"), str):
                self.draft.say(text)
            for thought in part.get("thinking") or () if isinstance(part.get("thinking"), list) else ():
                if isinstance(thought, dict) and isinstance(text := thought.get("text"), str):
                    self.draft.think(text)

    def _call(self, calls: Sequence[_Call]) -> None:
        draft = self.draft
        for each in calls:
            function = each.function or _Function()
            index = each.index
            if index is None:  # then a piece with a name begins the next call, and one without goes on with the last
                index = draft.next_call if function.name else max(draft.next_call - 1, 0)
            draft.call(index, each.id or "", function.name or "", function.arguments or "")

    def _count(self, usage: _Usage) -> None:
        details = usage.prompt_tokens_details
        cached = details.cached_tokens if details is not None else None
        self.draft.usage = Usage(
            input_tokens=tokens(usage.prompt_tokens),
            output_tokens=tokens(usage.completion_tokens),
            cached_input_tokens=tokens(cached or usage.cached_tokens or usage.prompt_cache_hit_tokens),
        )
