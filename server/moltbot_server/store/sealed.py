"""Values with a checksum: what a disk has changed since is refused, and never told as what was written.

MessagePack has no redundancy: a bit that flips within a text makes another text.
"""

from __future__ import annotations

import zlib
from typing import Any, Generic, TypeVar

import msgspec

from moltbot_server.turns import encode

T = TypeVar("T")

_MARK = b"\xc1"  # with which no value of MessagePack begins
_BODY = 5


class Changed(ValueError):
    """What is kept is not what was written: its checksum is another one."""


def seal(value: Any) -> bytes:
    """Return a value, or a tuple of values, as it is kept: a mark, the CRC-32 of what follows, and MessagePack."""
    body = encode(value)
    return _MARK + zlib.crc32(body).to_bytes(4, "big") + body


class Sealed(Generic[T]):
    """Reads what `seal` has made, and MessagePack by itself, as earlier releases kept it."""

    def __init__(self, kind: Any) -> None:
        """`kind` is the type of the value."""
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(kind)

    def decode(self, kept: bytes) -> T:
        """Return the value.

        Raises:
            Changed: it was changed since.
            msgspec.MsgspecError: it is no such value.
        """
        if kept[:1] != _MARK:
            return self._decoder.decode(kept)
        body = kept[_BODY:]
        if zlib.crc32(body) != int.from_bytes(kept[1:_BODY], "big"):
            raise Changed("its checksum is another one")
        return self._decoder.decode(body)
