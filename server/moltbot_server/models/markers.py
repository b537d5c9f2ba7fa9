"""Markers: the tokens that only a template may say. What people write never becomes one."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator

CUT = "\ufdd0"
"""Stands in a text where it must be cut in two, though it goes on; a code point that Unicode gives to no character."""
APART = "\ufdd1"
"""Stands in a text where another one begins, read by itself; such a code point too."""
_OURS = re.compile(f"[{CUT}{APART}]")
_NO_CHARACTER = "\ufffd"
_SHAPES = (r"<[^<>\s]{1,%d}>", r"\[[^\[\]\s]{1,%d}\]")
MARKER = re.compile(r"<[^<>\s]+>|\[[A-Z][A-Z_/]*\]|\[/[A-Z_]+\]")
"""What looks like a marker, among the tokens that a tokenizer does not call special."""


class Markers:
    """A set of markers, found in and kept out of texts."""

    def __init__(self, words: Iterable[str]) -> None:
        self._words = frozenset(word for word in words if word)
        self._sorted = sorted(self._words)
        self._longest = max(map(len, self._words), default=1)
        shapes = [shape % self._longest for shape in _SHAPES]
        regular = re.compile("|".join(shapes))
        odd = sorted((word for word in self._words if not regular.fullmatch(word)), key=len, reverse=True)
        firsts = {"<", "["} | {word[0] for word in odd}
        # Thousands of markers have one of two shapes: a set knows them faster than an alternation of all would.
        self._first = re.compile("[" + "".join(map(re.escape, sorted(firsts))) + "]")
        self._here = re.compile("|".join([*map(re.escape, odd), *shapes]))

    def __contains__(self, word: str) -> bool:
        return word in self._words

    def __iter__(self) -> Iterator[str]:
        return iter(self._sorted)

    def places(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield where markers begin and end, from left to right; none that begins within another."""
        end = 0
        for first in self._first.finditer(text):
            begin = first.start()
            if begin < end:
                continue
            here = self._here.match(text, begin)
            if here is not None and here[0] in self._words:
                end = here.end()
                yield begin, end

    def guarded(self, text: str) -> str:
        """Return a text that people wrote, with a `CUT` in each marker that it spells or begins at its end."""
        if CUT in text or APART in text:
            text = _OURS.sub(_NO_CHARACTER, text)
        cuts = [first.start() + 1 for first in self._first.finditer(text) if self._begins_marker(text, first.start())]
        if not cuts:
            return text
        begins = [0, *cuts]
        return CUT.join(text[begin:end] for begin, end in zip(begins, [*cuts, None], strict=True))

    def _begins_marker(self, text: str, begin: int) -> bool:
        here = self._here.match(text, begin)
        if here is not None and here[0] in self._words:
            return True
        rest = text[begin : begin + self._longest]
        if begin + len(rest) < len(text):
            return False
        # The text ends here: what follows in the template must not complete a marker.
        at = bisect_left(self._sorted, rest)
        return at < len(self._sorted) and self._sorted[at].startswith(rest)
