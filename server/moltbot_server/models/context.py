"""Fitting a conversation into a model's context: what is sent, and what of the history is left out.

The context holds the system prompt, the history, the newest message and the answer. Room for the answer is kept back:
the tokens asked for, else a quarter of the context, in no case more than half of it; and `MARGIN` tokens for what
belongs to no message (the start mark, the opened answer). The system prompt and the newest message stay whole; of the
history the oldest turns go first, each from its user message to the next one.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import NamedTuple

from moltbot_server.errors import ContextLengthExceeded
from moltbot_server.turns import GenerationOptions, MediaPart, Message, Role, TextPart

MARGIN = 16
_OVERHEAD = 500  # bytes of memory that a message takes beside what it says

Count = Callable[[Message], int]
"""How many tokens a message takes: `Engine.count`."""


class Fitted(NamedTuple):
    """A conversation that fits: what the model reads, how many tokens that is, and how much of the history it holds."""

    messages: list[Message]
    tokens: int
    trimmed_messages: int
    history_messages: int


class ContextWindow:
    """The end of one session's history as one model counts it: as much as could ever fit, each message counted once.

    Keep one for a session and a model; a turn then costs its own messages and one copy of the list.
    """

    def __init__(self, count: Count, context_length: int) -> None:
        """Start empty. `context_length` is in tokens, prompt and answer together."""
        self._count = count
        self._context = context_length
        self._kept: deque[Message] = deque()
        self._sizes: deque[int] = deque()
        self._head: Sequence[Message] = ()
        self._tokens = 0
        self._gone = 0
        self._bytes = 0

    @classmethod
    def of(cls, history: Sequence[Message], count: Count, context_length: int) -> ContextWindow:
        """Take up a whole conversation, oldest first; system messages at its head stay, whatever goes.

        Only what could fit is counted.
        """
        window = cls(count, context_length)
        heads = next((at for at, message in enumerate(history) if message.role is not Role.SYSTEM), len(history))
        window._head = history[:heads]
        for message in islice(reversed(history), len(history) - heads):
            tokens = count(message)
            if window._tokens + tokens > context_length:
                break
            window._kept.appendleft(message)
            window._sizes.appendleft(tokens)
            window._tokens += tokens
            window._bytes += _weight(message)
        window._bytes += sum(map(_weight, window._head))
        window._gone = len(history) - heads - len(window._kept)
        window._shorten()
        return window

    def __len__(self) -> int:
        return len(self._kept)

    def is_counted_by(self, count: Count) -> bool:
        """Tell whether the window was made for the model that counts so."""
        return self._count == count

    @property
    def messages(self) -> list[Message]:
        """The messages that are kept, oldest first."""
        return [*self._head, *self._kept]

    @property
    def tokens(self) -> int:
        """Tokens of the messages that are kept."""
        return self._tokens

    @property
    def size(self) -> int:
        """What the messages that are kept take in memory, in bytes; an estimate."""
        return self._bytes

    def extend(self, messages: Iterable[Message]) -> None:
        """Add the messages of a turn that has ended."""
        for message in messages:
            tokens = self._count(message)
            self._kept.append(message)
            self._sizes.append(tokens)
            self._tokens += tokens
            self._bytes += _weight(message)
        self._shorten()

    def fit(
        self, newest: Message, options: GenerationOptions, system: Sequence[Message] = (), *, overhead: int = 0
    ) -> Fitted:
        """Return the conversation with a newest message, cut to the context. The window itself stays as it is.

        `overhead` is what a prompt takes beside its messages, in tokens, where that is more than the usual margin.

        Raises:
            ContextLengthExceeded: the system prompt and the newest message alone leave no room for the answer.
        """
        reserve = answer_reserve(self._context, options)
        head = [*system, *self._head]
        fixed = self._count(newest) + sum(map(self._count, head))
        room = self._context - reserve - max(overhead, min(MARGIN, self._context // 8)) - fixed
        if room < 0:
            raise ContextLengthExceeded(
                "messages",
                f"takes {fixed} tokens with the system prompt; the model reads {self._context}, "
                f"of which {reserve} are kept for the answer",
            )
        skip = self._surplus(room)
        history = islice(self._kept, skip, None) if skip else self._kept
        left_out = sum(islice(self._sizes, skip)) if skip else 0
        tokens = fixed + self._tokens - left_out
        read = len(self._head) + len(self._kept) - skip
        return Fitted([*head, *history, newest], tokens, self._gone + skip, read)

    def _surplus(self, room: int) -> int:
        """Return how many of the oldest messages must go so that the rest takes at most `room` tokens."""
        tokens = self._tokens
        if tokens <= room:
            return 0
        skip = 0
        for message, size in zip(self._kept, self._sizes, strict=True):
            if tokens <= room and (not skip or message.role is Role.USER):
                break
            tokens -= size
            skip += 1
        return skip

    def _shorten(self) -> None:
        """Forget the oldest turns that no answer can be given room beside."""
        for _ in range(self._surplus(self._context)):
            self._forget()
        # A history is read from a question on; what a cut left before it says nothing.
        while self._gone and self._kept and self._kept[0].role is not Role.USER:
            self._forget()

    def _forget(self) -> None:
        self._bytes -= _weight(self._kept.popleft())
        self._tokens -= self._sizes.popleft()
        self._gone += 1


def _weight(message: Message) -> int:
    """Return what a message takes in memory, in bytes; that of text depends on its script."""
    weight = _OVERHEAD
    for part in message.parts:
        if isinstance(part, TextPart):
            weight += sys.getsizeof(part.text)
        elif isinstance(part, MediaPart):
            weight += len(part.data) + len(part.uri)
    return weight


def answer_reserve(context_length: int, options: GenerationOptions) -> int:
    """Return how many tokens of the context are kept for the answer."""
    asked = options.max_output_tokens or context_length // 4
    return max(1, min(asked, context_length // 2))
