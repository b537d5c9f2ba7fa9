"""An answer that was broken off: what another core kept of it, and how its model goes on, or begins anew after all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moltbot_server.errors import InvalidField
from moltbot_server.live_turn import LiveTurn
from moltbot_server.models.engine import Engine, Finished, Listener
from moltbot_server.turns import (
    Accepted,
    Message,
    Notice,
    Queued,
    Reset,
    Role,
    Routed,
    TextDelta,
    TextPart,
)

_SAYS_NOTHING = Accepted | Queued | Notice
_WHY = "the answer cannot be gone on with: what comes now counts"


def begun(live: LiveTurn, engine: Engine) -> str:
    """Return what is kept of an answer if this engine goes on with it; empty where it has to be given anew.

    It goes on with its own text alone, and not where it had begun to think or to add something that is no text. Of what
    a power failure left there may be the end without the middle.
    """
    if engine.is_route or not engine.capabilities.continuation:
        return ""
    text, model, is_whole, expected = "", "", True, 1
    for event in live.events:
        kind = event.kind
        is_whole = isinstance(kind, Reset) or (is_whole and event.sequence == expected)
        expected = event.sequence + 1
        if isinstance(kind, TextDelta):
            text += kind.text
        elif isinstance(kind, Reset):
            text = kind.text
        elif isinstance(kind, Routed):
            model = kind.name
        elif not isinstance(kind, _SAYS_NOTHING):
            return ""
    return text if is_whole and model == engine.id and not text.isspace() else ""


def with_answer(messages: Sequence[Message], text: str) -> Sequence[Message]:
    """Return a conversation that ends with what there is of its answer, if any; see `Capabilities.continuation`."""
    if not text:
        return messages
    return (*messages, Message(role=Role.ASSISTANT, parts=(TextPart(text=text),)))


def go_on(generate: Callable[[Listener, str], None], listener: Listener, text: str) -> None:
    """Have an answer gone on with by `generate`, or given from its first word if its model has nothing to add to it."""
    going = _GoingOn(generate, listener)
    try:
        generate(going, text)
    except InvalidField as refusal:
        going.ended(refusal)


class _GoingOn:
    """A listener before another one, for an answer that goes on."""

    __slots__ = ("_generate", "_listener")

    def __init__(self, generate: Callable[[Listener, str], None], listener: Listener) -> None:
        self._generate = generate
        self._listener = listener

    def queued(self, position: int) -> None:
        """Pass on the place in the queue."""
        self._listener.queued(position)

    def wrote(self, text: str, tokens: int) -> None:
        """Pass on another piece."""
        self._listener.wrote(text, tokens)

    def thought(self, text: str) -> None:
        """Pass on what the model thinks."""
        self._listener.thought(text)

    def noted(self, what: Routed | Notice | Reset) -> None:
        """Pass on who answers, or what is void."""
        self._listener.noted(what)

    def ended(self, end: Finished | Exception) -> None:
        """Pass on the end, unless it is that the model has nothing to add: then it begins anew."""
        if not isinstance(end, InvalidField):
            self._listener.ended(end)
            return
        self._listener.noted(Reset(text="", reason=_WHY))
        try:
            self._generate(self._listener, "")
        except Exception as error:
            self._listener.ended(error)
