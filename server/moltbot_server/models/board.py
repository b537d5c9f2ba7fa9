"""What the workers of one machine know together: a few facts in a file that each of them has mapped into its memory.

Whether another one has written something is one look at that memory, so each turn can ask for it. To write takes a lock
on the file for some microseconds, which ends with whoever holds it.

Times are those of the system's monotonic clock, which all processes of a boot share; what an earlier boot has left is
taken for nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import struct
import time
import weakref
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import get_ident
from typing import Any, Generic, TypeVar

import msgspec

log = logging.getLogger(__name__)

SIZE = 1 << 20
"""The most bytes that all facts take, with what is told of them; a file of zeros takes no room on a disk."""

_HEAD = struct.Struct("<QII")  # version, length and CRC-32 of what follows
_VERSION = struct.Struct("<Q")
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_TRIES, _PAUSE = 20, 0.0005  # somebody who was stopped with the lock in hand holds nobody up for longer
_LOOKS = 50

F = TypeVar("F")


class Board(Generic[F]):
    """Facts of one kind, all of which are written at once. It belongs to the thread that opens it."""

    def __init__(self, path: Path, kind: type[F]) -> None:
        """Open the file, or make it, for as long as the board is there.

        Raises:
            OSError: it cannot be opened.
        """
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        weakref.finalize(self, os.close, self._fd)
        self._owner = get_ident()
        if os.fstat(self._fd).st_size < SIZE:
            os.ftruncate(self._fd, SIZE)
        self._map = mmap.mmap(self._fd, SIZE)
        self._boot = _BOOT.read_text().strip() if _BOOT.exists() else ""
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(tuple[str, list[kind]])  # type: ignore[valid-type]
        self._seen = 0

    @property
    def has_news(self) -> bool:
        """Whether something was written since it was last read, or written, here; for other threads there never is.

        Metrics are asked for by a thread of their own, which must not change what the event loop is about to write.
        """
        return bool(_VERSION.unpack_from(self._map)[0] != self._seen) and get_ident() == self._owner

    def read(self) -> Sequence[F] | None:
        """Return all facts; None where what is there is of no use, such as what a worker wrote that was killed."""
        for _ in range(_LOOKS):
            self._seen, length, checksum = _HEAD.unpack_from(self._map)
            content = self._map[_HEAD.size : _HEAD.size + length]
            if zlib.crc32(content) != checksum:
                continue
            if not content:
                return ()
            try:
                boot, facts = self._decoder.decode(content)
            except msgspec.MsgspecError:
                log.warning("what the workers tell each other cannot be read", extra={"bytes": length})
                return None
            return facts if boot == self._boot else ()
        return None

    @contextlib.contextmanager
    def held(self) -> Iterator[bool]:
        """Keep others from writing meanwhile; tells whether that could be had, else nothing must be written."""
        holds = self._lock()
        try:
            yield holds
        finally:
            if holds:
                fcntl.flock(self._fd, fcntl.LOCK_UN)

    def write(self, facts: Sequence[F]) -> None:
        """Replace all facts; to be called while it is held."""
        content = self._encoder.encode((self._boot, facts))
        if _HEAD.size + len(content) > SIZE:
            told = {"bytes": len(content)}
            log.warning("the workers have more to tell each other than there is room for", extra=told)
            return
        version = _VERSION.unpack_from(self._map)[0] + 1
        self._map[_HEAD.size : _HEAD.size + len(content)] = content
        # Whoever reads between the two finds a checksum that is wrong, and reads again.
        _HEAD.pack_into(self._map, 0, version, len(content), zlib.crc32(content))
        self._seen = version

    def _lock(self) -> bool:
        for _ in range(_TRIES):
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_PAUSE)
            else:
                return True
        log.warning("another worker holds what the workers tell each other")
        return False
