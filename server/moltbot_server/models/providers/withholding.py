"""Keeps keys out of answers: a provider may echo the key that it was given, in pieces of any size."""

from __future__ import annotations

from collections.abc import Iterable

from moltbot_server.models.engine import Finished, Listener
from moltbot_server.models.providers.keys import HIDDEN
from moltbot_server.turns import Notice, Reset, Routed

_SHORTEST = 8
"""Letters of the shortest key that is looked for: a shorter one may be a word."""


class Withholding:
    """The listener of an answer, to whom no key is told.

    What may be the beginning of a key is held back until more has come: of most texts nothing, of some a letter.
    """

    __slots__ = ("_keys", "_listener", "_text", "_thoughts", "_tokens")

    def __init__(self, listener: Listener, keys: Iterable[str]) -> None:
        self._listener = listener
        self._keys = tuple(key for key in keys if len(key) >= _SHORTEST)
        self._text = self._thoughts = ""
        self._tokens = 0

    def wrote(self, text: str, tokens: int) -> None:
        """Pass on another piece of the answer."""
        shown, self._text = self._taken(self._text + text)
        tokens, self._tokens = self._tokens + tokens, 0
        if shown:
            self._listener.wrote(shown, tokens)
        else:
            self._tokens = tokens

    def thought(self, text: str) -> None:
        """Pass on more of what the model thinks."""
        shown, self._thoughts = self._taken(self._thoughts + text)
        if shown:
            self._listener.thought(shown)

    def queued(self, position: int) -> None:
        """Pass on the place in a queue."""
        self._listener.queued(position)

    def noted(self, what: Routed | Notice | Reset) -> None:
        """Pass on what happened."""
        self._listener.noted(what)

    def ended(self, end: Finished | Exception) -> None:
        """Pass on the end, and what was held back before it."""
        self.let_go()
        self._listener.ended(end)

    def let_go(self) -> None:
        """Pass on what was held back: it was no key."""
        thoughts, self._thoughts = self._thoughts, ""
        if thoughts:
            self._listener.thought(thoughts)
        text, self._text = self._text, ""
        if text:
            self._listener.wrote(text, self._tokens)

    def hidden(self, text: str) -> str:
        """Return a whole text without the keys."""
        for key in self._keys:
            text = text.replace(key, HIDDEN)
        return text

    def _taken(self, text: str) -> tuple[str, str]:
        """Return what of a text may be shown, without keys, and its end that may be the beginning of one."""
        text = self.hidden(text)
        end = len(text)
        for key in self._keys:
            at = text.find(key[0], max(0, len(text) - len(key) + 1))
            while at >= 0 and not key.startswith(text[at:]):
                at = text.find(key[0], at + 1)
            if at >= 0:
                end = min(end, at)
        return text[:end], text[end:]
