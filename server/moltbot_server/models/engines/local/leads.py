"""The beginnings of prompts that the model keeps: system prompts that many conversations share.

CTranslate2 keeps the state of a `static_prompt` for as long as the model is loaded and forgets none, so it is only told
to keep what is asked often, and not more than a bound.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import takewhile

from moltbot_server.turns import Message, Role, TextPart

MOST_LEADS = 16
"""Most beginnings that a model keeps."""

_SHORTEST = 8  # tokens; below it there is nothing to gain
_WATCHED = 256
_OFTEN = 3
_REST = 2  # tokens that have to be read after a lead, so that nothing of a prompt is told as an answer
_QUESTIONS = ("a", "。")

Prompting = Callable[[Sequence[Message]], Sequence[str]]
"""Makes the tokens of a conversation's prompt."""


class _Seen:
    """A system prompt that was met: how often, and its tokens once they are known."""

    __slots__ = ("kept", "lead", "times")

    def __init__(self) -> None:
        self.times = 0
        self.lead: tuple[str, ...] | None = None
        self.kept = False


class Leads:
    """Decides which beginnings are kept, the most used first; for one thread."""

    def __init__(self, prompt: Prompting, most_tokens: int, most: int = MOST_LEADS) -> None:
        """`most_tokens`: of all that is kept together; 0 keeps nothing."""
        self._prompt = prompt
        self._most = most
        self._room = most_tokens
        self._kept = 0
        self._seen: OrderedDict[tuple[str, ...], _Seen] = OrderedDict()

    def __len__(self) -> int:
        return self._kept

    def of(self, messages: Sequence[Message], prompt: Sequence[str]) -> tuple[str, ...]:
        """Return the beginning of a prompt that the model is to keep, or has kept; empty for none.

        The same beginning is always the same object.
        """
        if not messages or messages[0].role is not Role.SYSTEM or not self._room:
            return ()
        system = tuple(message.text for message in takewhile(lambda message: message.role is Role.SYSTEM, messages))
        seen = self._meet(system)
        seen.times += 1
        if not seen.kept and not self._keep(seen, messages[: len(system)]):
            return ()
        lead = seen.lead or ()
        fits = len(prompt) >= len(lead) + _REST and tuple(prompt[: len(lead)]) == lead
        return lead if fits else ()

    def _meet(self, system: tuple[str, ...]) -> _Seen:
        seen = self._seen.get(system)
        if seen is None:
            seen = self._seen[system] = _Seen()
            if len(self._seen) > _WATCHED:
                self._forget()
        else:
            self._seen.move_to_end(system)
        return seen

    def _forget(self) -> None:
        """Forget what was not met for the longest time; what is kept stays known."""
        del self._seen[next(system for system, seen in self._seen.items() if not seen.kept)]

    def _keep(self, seen: _Seen, system: Sequence[Message]) -> bool:
        """Decide whether to keep a beginning from now on: the fewer places are left, the oftener it has to be met."""
        if self._kept >= self._most or seen.times < _OFTEN * 2 ** (4 * self._kept // self._most):
            return False
        if seen.lead is None:
            first, second = (
                self._prompt([*system, Message(role=Role.USER, parts=(TextPart(text=question),))])
                for question in _QUESTIONS
            )
            seen.lead = tuple(_common(first, second))
        if not _SHORTEST <= len(seen.lead) <= self._room:
            return False
        seen.kept = True
        self._kept += 1
        self._room -= len(seen.lead)
        return True


def _common(first: Sequence[str], second: Sequence[str]) -> list[str]:
    return [token for token, other in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))]
