"""What becomes of an answer while it is read: text and thoughts on to the listener, calls of tools put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from moltbot_server.models.engine import Listener
from moltbot_server.models.providers.events import Broken
from moltbot_server.turns import FinishReason, Tool, ToolCallPart, Usage

LARGEST_ANSWER = 1 << 20
"""Characters that an answer, its thoughts and its calls of tools have together at most: what a message can carry."""
_MOST_CALLS = 128
_LONG_TOKEN = 8  # characters; twice as many as most have


class Reading(Protocol):
    """An answer in one dialect, as far as it came."""

    draft: Draft

    def read(self, payloads: Sequence[bytes]) -> bool:
        """Read events and tell whether the answer is complete.

        Raises:
            Broken: they cannot be read, or make no answer.
            Refused: the provider says in them that it failed.
        """

    def missing(self) -> str:
        """Say what an answer lacks that ends here."""


class Refused(Exception):
    """A provider says in a stream that it failed; `found` is what it says."""

    def __init__(self, found: object) -> None:
        super().__init__()
        self.found = found


@dataclass(slots=True)
class _Call:
    id: str = ""
    name: str = ""
    arguments: list[str] = field(default_factory=list)


class _Nobody:
    def wrote(self, text: str, tokens: int) -> None:
        pass  # the answer was stopped

    def thought(self, text: str) -> None:
        pass  # the answer was stopped


_NOBODY = _Nobody()
_MOST_TOKENS = 500_000_000


def tokens(told: int | None) -> int:
    """Return a number of tokens that a provider told; one that cannot be is 0, as if it had not been told."""
    return told if told is not None and 0 < told <= _MOST_TOKENS else 0


class Draft:
    """An answer that is being read. Pieces of one read reach the listener together."""

    __slots__ = ("_calls", "_count", "_known", "_listener", "_pieces", "_size", "_thoughts", "finish", "spoke", "usage")

    def __init__(self, listener: Listener, tools: Sequence[Tool]) -> None:
        self._listener: Listener | _Nobody = listener
        self._known = frozenset(tool.name for tool in tools)
        self._pieces: list[str] = []
        self._thoughts: list[str] = []
        self._count = self._size = 0
        self._calls: dict[int, _Call] = {}
        self.spoke = False
        self.finish: FinishReason | None = None
        self.usage = Usage()

    def say(self, text: str) -> None:
        """Take in another piece of the text."""
        if self._thoughts:
            self.flush()
        self._pieces.append(text)

    def think(self, text: str) -> None:
        """Take in another piece of the thoughts."""
        if self._pieces:
            self.flush()
        self._thoughts.append(text)

    def flush(self) -> None:
        """Let the listener hear what was taken in."""
        if self._pieces:
            pieces, self._pieces = self._pieces, []
            self._count += len(pieces)
            text = pieces[0] if len(pieces) == 1 else "".join(pieces)
            self._grow(len(text))
            self.spoke = True
            self._listener.wrote(text, len(pieces))
        if self._thoughts:
            text = "".join(self._thoughts)
            self._thoughts = []
            self._grow(len(text))
            self.spoke = True
            self._listener.thought(text)

    def call(self, index: int, id: str, name: str, arguments: str) -> None:
        """Take in a piece of a tool's call; each part may come in pieces, the arguments will.

        Raises:
            Broken: there are too many, or too much of them.
        """
        call = self._calls.get(index)
        if call is None:
            if len(self._calls) >= _MOST_CALLS:
                raise Broken("it asked for too many tools at once")
            call = self._calls[index] = _Call()
        call.id = call.id or id
        call.name = call.name or name
        if arguments:
            self._grow(len(arguments))
            call.arguments.append(arguments)

    def hush(self) -> None:
        """Tell nobody anything more."""
        self._listener = _NOBODY

    @property
    def calls(self) -> bool:
        """Whether tools are asked for."""
        return bool(self._calls)

    @property
    def next_call(self) -> int:
        """The index of another call, where a provider names none."""
        return len(self._calls)

    @property
    def written(self) -> int:
        """How many pieces of text came."""
        return self._count

    def exceeds(self, tokens: int) -> bool:
        """Tell whether there is more than so many tokens can be: each piece has one, and few are longer than this."""
        return self._count > tokens and self._size > _LONG_TOKEN * tokens

    def attachments(self) -> tuple[ToolCallPart, ...]:
        """Return the calls of tools, in their order.

        Raises:
            Broken: one names no tool that was offered, or its arguments are no JSON object.
        """
        found = []
        for index, call in sorted(self._calls.items()):
            if call.name not in self._known:
                raise Broken("it asked for a tool that it was not offered")
            arguments = "".join(call.arguments).strip() or "{}"
            try:
                if not isinstance(msgspec.json.decode(arguments), dict):
                    raise Broken("it asked for a tool with arguments that are no JSON object")
            except (ValueError, RecursionError):
                raise Broken("it asked for a tool with arguments that are no JSON object") from None
            found.append(ToolCallPart(call_id=call.id or f"call_{index}", tool=call.name, arguments_json=arguments))
        return tuple(found)

    def _grow(self, size: int) -> None:
        self._size += size
        if self._size > LARGEST_ANSWER:
            raise Broken("its answer has no end")
