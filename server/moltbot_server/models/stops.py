"""Texts that end an answer, found in a stream however it is cut into pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopTexts:
    """Lets text through until one of the stop texts is complete; holds back what may be the start of one.

    Of several stop texts the one that is complete first wins, so the result does not depend on how the text was cut.
    """

    __slots__ = ("_held", "_longest", "_prefixes", "_stops", "stopped")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._prefixes = {stop[:size] for stop in stops for size in range(1, len(stop))}
        self._longest = max(map(len, self._prefixes), default=0)
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """Take more text and return what may be shown; nothing once a stop text was met (`stopped`)."""
        if not self._stops:
            return text
        if self.stopped:
            return ""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]
        keep = len(text) - self._doubtful(text)
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """Return what was held back: the stream has ended and no stop text came of it."""
        held, self._held = self._held, ""
        return held

    def _doubtful(self, text: str) -> int:
        for size in range(min(self._longest, len(text)), 0, -1):
            if text[-size:] in self._prefixes:
                return size
        return 0
