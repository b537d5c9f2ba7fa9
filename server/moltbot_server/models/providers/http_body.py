"""The head and the body of an HTTP/1.1 response out of bytes as they come; RFC 9112, sections 4 to 7."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

LARGEST_HEAD = 64 << 10
LARGEST_CHUNK = 1 << 30
_LONGEST_SIZE = 256
_LARGEST_TRAILER = 16 << 10


class Malformed(Exception):
    """What came is no HTTP response; the text says what is wrong with it."""


class Head(NamedTuple):
    """The beginning of a response: status, headers by their names in small letters, whether the connection is kept."""

    status: int
    headers: Mapping[str, str]
    keeps: bool


def read_head(data: bytes) -> Head:
    """Return what the head of a response says, without its blank line.

    Raises:
        Malformed: it is no head.
    """
    first, *lines = data.decode("latin-1").split("\r\n")
    version, _, rest = first.partition(" ")
    status = rest[:3]
    if version not in ("HTTP/1.1", "HTTP/1.0") or not (status.isascii() and status.isdigit() and len(status) == 3):
        raise Malformed("it does not speak HTTP")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon:
            raise Malformed("a header has no colon")
        name, value = name.lower(), value.strip()
        if name in headers:
            if name == "content-length" and headers[name] != value:
                raise Malformed("it names two lengths")
            value = value if name == "content-length" else f"{headers[name]}, {value}"
        headers[name] = value
    wish = headers.get("connection", "").lower()
    return Head(int(status), headers, "close" not in wish if version == "HTTP/1.1" else "keep-alive" in wish)


class Body(Protocol):
    """A body on its way."""

    done: bool
    """Whether all of it has come."""
    clean: bool
    """Whether nothing came after it, so that the connection can be used again."""

    def feed(self, data: bytes) -> bytes:
        """Return what of the bytes belongs to the body; raises Malformed."""

    def cut(self) -> bool:
        """Tell whether something is missing when the connection ends here."""


def body_of(head: Head) -> Body:
    """Return the body that a head announces.

    Raises:
        Malformed: the head contradicts itself.
    """
    if head.status in (204, 304):
        return Sized(0)
    coding = head.headers.get("transfer-encoding")
    if coding is not None:
        if coding.lower() != "chunked":
            raise Malformed("its transfer coding is not known")
        return Chunked()
    length = head.headers.get("content-length")
    if length is None:
        return Endless()
    if not (length.isascii() and length.isdigit() and len(length) < 16):
        raise Malformed("its length is no number")
    return Sized(int(length))


class Endless:
    """A body that ends with its connection."""

    __slots__ = ("clean", "done")

    def __init__(self) -> None:
        self.done = self.clean = False

    def feed(self, data: bytes) -> bytes:
        """Return all of it."""
        return data

    def cut(self) -> bool:
        """Say no: nothing tells."""
        return False


class Sized:
    """A body of a known length."""

    __slots__ = ("_left", "clean", "done")

    def __init__(self, length: int) -> None:
        """`length` is in bytes."""
        self._left = length
        self.done = not length
        self.clean = True

    def feed(self, data: bytes) -> bytes:
        """Return what of it came."""
        if len(data) > self._left:
            data, self.clean = data[: self._left], False
        self._left -= len(data)
        self.done = not self._left
        return data

    def cut(self) -> bool:
        """Tell whether bytes are missing."""
        return not self.done


class Chunked:
    """A body in chunks, each with its size before it."""

    __slots__ = ("_left", "_rest", "_state", "_trailer", "clean", "done")

    _SIZE, _DATA, _BREAK, _TRAILER = range(4)

    def __init__(self) -> None:
        self._state = self._SIZE
        self._left = self._trailer = 0
        self._rest = b""
        self.done, self.clean = False, True

    def feed(self, data: bytes) -> bytes:
        """Return the content of the chunks, as far as it came."""
        if self._rest:
            data = self._rest + data
            self._rest = b""
        pieces = []
        at, size, state = 0, len(data), self._state
        while at < size:
            if state == self._DATA:
                piece = data[at : at + self._left]
                pieces.append(piece)
                at += len(piece)
                self._left -= len(piece)
                if not self._left:
                    state = self._BREAK
                continue
            if self.done:
                self.clean = False
                break
            end = data.find(b"\r\n", at)
            if end < 0:
                self._rest = data[at:]
                break
            state, at = self._line(state, data[at:end]), end + 2
        self._state = state
        if len(self._rest) > _LONGEST_SIZE and (state != self._TRAILER or len(self._rest) > _LARGEST_TRAILER):
            raise Malformed("a chunk has no size")
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _line(self, state: int, line: bytes) -> int:
        """Read a line between two chunks and return what comes after it."""
        if state == self._SIZE:
            try:
                self._left = int(line.partition(b";")[0], 16)
            except ValueError:
                raise Malformed("a chunk has no size") from None
            if not 0 <= self._left <= LARGEST_CHUNK:
                raise Malformed("the size of a chunk makes no sense")
            return self._DATA if self._left else self._TRAILER
        if state == self._BREAK:
            if line:
                raise Malformed("a chunk is longer than its size")
            return self._SIZE
        self._trailer += len(line)
        if self._trailer > _LARGEST_TRAILER:
            raise Malformed("its trailer is too large")
        self.done = not line
        return self._TRAILER

    def cut(self) -> bool:
        """Tell whether the last chunk is missing."""
        return not self.done
