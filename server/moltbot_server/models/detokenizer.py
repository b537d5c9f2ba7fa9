"""Token ids to text while they arrive: whole characters only, in the end what the tokenizer itself would say."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import NamedTuple


class Surfaces(NamedTuple):
    """What the token ids look like in text.

    `text` holds the characters of each id (none for control symbols), `byte` the bytes of those that stand for bytes
    rather than characters, `spaced` whether the piece begins with the mark for a space. `drops_space`: a space at the
    very start of a text comes from the tokenizer and is dropped; `drops_spaces`: all spaces there are.

    `whole_bytes`: bytes go on after a control symbol, and a broken character is one U+FFFD, as GPT-2's kind of
    tokenizers has it; otherwise a control symbol ends a run of bytes, and each byte of a broken character is one.
    """

    text: Sequence[str]
    byte: Sequence[bytes]
    spaced: Sequence[bool]
    drops_space: bool = False
    drops_spaces: bool = False
    whole_bytes: bool = False


def _replace_each_byte(problem: UnicodeError) -> tuple[str, int]:
    """Write one replacement character for each byte that is no UTF-8, as sentencepiece does (Python writes fewer)."""
    if not isinstance(problem, UnicodeDecodeError):
        raise problem
    return "\ufffd" * (problem.end - problem.start), problem.end


codecs.register_error("moltbot-each-byte", _replace_each_byte)
_utf8 = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Writes one answer. A character whose bytes are not all there waits; nothing that was returned ever changes."""

    __slots__ = ("_bytes", "_dropped", "_open", "_started", "_surfaces", "_written")

    def __init__(self, surfaces: Surfaces) -> None:
        self._surfaces = surfaces
        self._bytes = _utf8("replace" if surfaces.whole_bytes else "moltbot-each-byte")
        self._open = False  # a run of byte pieces is being read
        self._started = False  # no more leading spaces to drop
        self._dropped = False  # the piece before gave its space away
        self._written = False  # some text exists

    def feed(self, tokens: Iterable[int]) -> str:
        """Take more token ids and return the characters that they complete."""
        surfaces = self._surfaces
        out: list[str] = []
        for token in tokens:
            if byte := surfaces.byte[token]:
                self._open = self._written = True
                out.append(self._bytes.decode(byte))
                continue
            if self._open:
                if surfaces.whole_bytes and not surfaces.text[token]:
                    continue
                out.append(self._end_of_bytes())
            text = surfaces.text[token] if self._started else self._first(token)
            if text:
                self._written = True
                out.append(text)
        return "".join(out)

    def flush(self) -> str:
        """Return what is left when no token follows: U+FFFD for a character that was never completed."""
        return self._end_of_bytes() if self._open else ""

    def _end_of_bytes(self) -> str:
        self._open = False
        rest = self._bytes.decode(b"", True)
        self._bytes.reset()
        return rest

    def _first(self, token: int) -> str:
        """Return a piece's text while the text may still begin: its space may be the tokenizer's own."""
        surfaces = self._surfaces
        text = surfaces.text[token]
        if self._dropped or self._written:
            self._started = True
            return text
        if surfaces.drops_space and surfaces.spaced[token]:
            self._dropped = not surfaces.drops_spaces
            return text[1:]
        return text


class Continued(Detokenizer):
    """Goes on with a text that is begun: no space at the start is the tokenizer's own.

    The model reads the text without the blanks at its end, and may say them itself: they are not told again.
    """

    __slots__ = ("_owed",)

    def __init__(self, surfaces: Surfaces, blanks: str) -> None:
        """`blanks` are those that the text ends with."""
        super().__init__(surfaces)
        self._started = self._written = True
        self._owed = blanks

    def feed(self, tokens: Iterable[int]) -> str:
        """Take more token ids and return the characters that they complete."""
        text = super().feed(tokens)
        if not self._owed or not text:
            return text
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self._owed, text, strict=False)))
        # Where it goes on otherwise, or beyond them, they are dealt with.
        self._owed = self._owed[same:] if same == len(text) else ""
        return text[same:]
