"""Thoughts that a model writes into its text, between <think> and </think> at the beginning of an answer."""

from __future__ import annotations

from moltbot_server.models.providers.drafts import Draft

_OPEN, _CLOSE = "<think>", "</think>"


class InlineThoughts:
    """Takes thoughts out of a text that comes in pieces; marks may be cut anywhere."""

    __slots__ = ("_draft", "_kept", "_state")

    _BEFORE, _WITHIN, _AFTER, _TEXT = range(4)

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._kept = ""
        self._state = self._BEFORE

    def say(self, text: str) -> None:
        """Take in a piece."""
        if self._state == self._TEXT:
            self._draft.say(text)
            return
        text = self._kept + text
        self._kept = ""
        if self._state == self._BEFORE:
            begun = text.lstrip()
            if begun.startswith(_OPEN):
                self._state, text = self._WITHIN, begun[len(_OPEN) :]
            elif _OPEN.startswith(begun):
                self._kept = text  # it may become the mark
                return
            else:
                self._state = self._TEXT
                self._draft.say(text)
                return
        if self._state == self._WITHIN:
            thought, mark, text = text.partition(_CLOSE)
            if not mark:
                keep = next((n for n in range(len(_CLOSE) - 1, 0, -1) if thought.endswith(_CLOSE[:n])), 0)
                self._kept = thought[len(thought) - keep :]
                thought = thought[: len(thought) - keep]
            if thought:
                self._draft.think(thought)
            if not mark:
                return
            self._state = self._AFTER
        text = text.lstrip()  # the blank lines between thoughts and answer belong to neither
        if text:
            self._state = self._TEXT
            self._draft.say(text)

    def end(self) -> None:
        """Let go of what was kept because it might have become a mark."""
        kept, self._kept = self._kept, ""
        if kept and self._state == self._WITHIN:
            self._draft.think(kept)
        elif kept.strip():
            self._draft.say(kept)
