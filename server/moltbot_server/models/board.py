"""What the workers of one machine know together: a few facts in a file that all of them have open.

Whether another one has written something is told by the first bytes of it, so each turn can look. They are read and not
mapped: a file that somebody cuts, or that has no room on its disk, must end no process. To write takes a lock on the
file for some tens of microseconds, which ends with whoever holds it.

Times are those of the system's monotonic clock, which all processes of a boot share; what an earlier boot has left is
taken for nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
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
"""The most bytes that all facts take, with what is told of them."""

_HEAD = struct.Struct("<8sII")  # a version that is drawn, length and CRC-32 of what follows
_VERSION = 8
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
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        weakref.finalize(self, os.close, self._fd)
        self._owner = get_ident()
        self._boot = _BOOT.read_text().strip() if _BOOT.exists() else ""
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(tuple[str, list[kind]])  # type: ignore[valid-type]
        self._seen = b""
        os.pread(self._fd, 1, 0)  # what is no file that can be read in places says so here

    @property
    def has_news(self) -> bool:
        """Whether something was written since it was last read, or written, here; for other threads there never is.

        Metrics are asked for by a thread of their own, which must not change what the event loop is about to write.
        """
        return get_ident() == self._owner and self._version() != self._seen

    def read(self) -> Sequence[F] | None:
        """Return all facts; None where nothing is there, or nothing of use, as after somebody was killed or cut it."""
        for _ in range(_LOOKS):
            found = self._read()
            self._seen = found[:_VERSION]
            if len(found) < _HEAD.size:
                return None
            _, length, checksum = _HEAD.unpack_from(found)
            content = found[_HEAD.size : _HEAD.size + length]
            if len(content) == length and zlib.crc32(content) == checksum:
                break
        else:
            return None
        try:
            boot, facts = self._decoder.decode(content)
        except msgspec.MsgspecError:
            log.warning("what the workers tell each other cannot be read", extra={"bytes": length})
            return None
        return facts if boot == self._boot else ()

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
        """Replace all facts; to be called while it is held. What cannot be written is known here alone."""
        content = self._encoder.encode((self._boot, facts))
        if _HEAD.size + len(content) > SIZE:
            told = {"bytes": len(content)}
            log.warning("the workers have more to tell each other than there is room for", extra=told)
            return
        version = os.urandom(_VERSION)
        try:
            # Whoever reads between the two finds a checksum that is wrong, and a new version afterwards.
            os.pwrite(self._fd, content, _HEAD.size)
            os.pwrite(self._fd, _HEAD.pack(version, len(content), zlib.crc32(content)), 0)
        except OSError as problem:
            log.warning("the workers cannot tell each other which models rest", extra={"problem": problem.strerror})
        self._seen = self._version()

    def _version(self) -> bytes:
        try:
            return os.pread(self._fd, _VERSION, 0)
        except OSError:
            return self._seen

    def _read(self) -> bytes:
        try:
            return os.pread(self._fd, SIZE, 0)
        except OSError:
            return b""

    def _lock(self) -> bool:
        for _ in range(_TRIES):
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_PAUSE)
            except OSError:
                return False
            else:
                return True
        log.warning("another worker holds what the workers tell each other")
        return False
