"""Whether a model can serve a turn: options, pictures, tools, and the length of the conversation."""

from __future__ import annotations

from collections.abc import Sequence

from moltbot_server.errors import ContextLengthExceeded, InvalidField
from moltbot_server.models.context import MARGIN, ContextWindow, Fitted, answer_reserve
from moltbot_server.models.engine import Engine
from moltbot_server.models.limits import check_content
from moltbot_server.turns import GenerationOptions, Message, TextPart

_MOST_TOKENS_OF_A_CHARACTER = 4
_MOST_TOKENS_OF_MARKERS = 16
_BYTES_OF_A_TOKEN = 5  # rather too many: an estimate must not keep a model from what it can read


class Conversation:
    """What a turn asks: the messages and options, and what of them a model has to be able to do."""

    __slots__ = ("_bytes", "_characters", "_plain", "messages", "options")

    def __init__(self, messages: Sequence[Message], options: GenerationOptions) -> None:
        self.messages = messages
        self.options = options
        self._plain: bool | None = None
        self._characters = self._bytes = -1

    def refusal(self, engine: Engine, longest: int) -> InvalidField | None:
        """Return why a model cannot serve it; None when it can. It has been cut to a context of `longest` tokens."""
        try:
            engine.check(self.options)
        except InvalidField as problem:
            return problem.under("turn")
        try:
            if not self._is_plain():
                for message in self.messages:
                    check_content(message.parts, engine.capabilities)
            self._check_length(engine, longest)
        except InvalidField as problem:
            return problem.at("turn.parts")
        return None

    def shortened(self, engine: Engine) -> Fitted:
        """Return the conversation without what its model cannot read of the history.

        Raises:
            ContextLengthExceeded: its newest message alone is too long.
        """
        context = engine.capabilities.context_length
        window = ContextWindow.of(self.messages[:-1], engine.count, context)
        return window.fit(self.messages[-1], self.options, overhead=engine.overhead)

    def _is_plain(self) -> bool:
        if self._plain is None:
            self._plain = True
            for message in self.messages:
                for part in message.parts:
                    if type(part) is not TextPart:
                        self._plain = False
                        return False
        return self._plain

    def _check_length(self, engine: Engine, longest: int) -> None:
        limit = engine.capabilities.context_length
        if not limit or limit >= longest:
            return
        reserve = answer_reserve(limit, self.options)
        room = limit - reserve - max(engine.overhead, min(MARGIN, limit // 8))
        if self._most() <= room:
            return
        # Engines that serve from elsewhere may know no more than the least that it can be.
        tokens = max(sum(map(engine.count, self.messages)), self._least())
        if tokens > room:
            raise ContextLengthExceeded(
                "turn.parts",
                f"takes about {tokens} tokens with what was said before; {engine.id} reads {limit}, "
                f"of which {reserve} are kept for the answer",
            )

    def _most(self) -> int:
        """Return a number of tokens that no model needs more than, without counting."""
        if self._characters < 0:
            parts = [part for message in self.messages for part in message.parts]
            self._characters = sum([len(part.text) for part in parts if isinstance(part, TextPart)])
        return self._characters * _MOST_TOKENS_OF_A_CHARACTER + len(self.messages) * _MOST_TOKENS_OF_MARKERS

    def _least(self) -> int:
        if self._bytes < 0:
            self._bytes = sum(len(message.text.encode("utf-8", "surrogatepass")) for message in self.messages)
        return self._bytes // _BYTES_OF_A_TOKEN
