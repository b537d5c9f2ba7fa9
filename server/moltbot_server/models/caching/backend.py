"""Where kept answers lie: what a backend promises, and the one in this process' memory."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Protocol

Key = tuple[str, bytes]
"""The workspace that an entry belongs to, and the digest of what it answers."""

_OVERHEAD = (
    400  # bytes of memory that an entry takes beside its value: its key, its places in the table and in the queue
)
_LARGEST = 1 << 20
_SPARE = 1024


class Backend(Protocol):
    """Keeps bytes by key for a while. No method raises because of where they are kept, but `clear`."""

    @property
    def kind(self) -> str:
        """`memory` or `redis`."""

    @property
    def entries(self) -> int:
        """How many entries it holds; 0 where that is not known here."""

    @property
    def size(self) -> int:
        """What they take, in bytes; 0 where that is not known here."""

    @property
    def failures(self) -> int:
        """How often it could not be asked."""

    async def start(self) -> None:
        """Become ready, or find out that it is not."""

    async def close(self) -> None:
        """Let go of what it needs."""

    def find(self, key: Key) -> bytes | asyncio.Future[bytes | None] | None:
        """Return what is kept, None for nothing, or a future of that where it takes a wait; the future never fails."""

    def put(self, key: Key, value: bytes) -> None:
        """Keep a value, or do without; nobody waits for it."""

    async def clear(self, workspace: str) -> int:
        """Forget what belongs to a workspace and return how many entries that was.

        Raises:
            StorageUnavailable: it cannot be reached.
        """


class MemoryBackend:
    """Keeps values in memory: at most so many bytes, the latest used ones, none for longer than `ttl` seconds."""

    kind = "memory"
    failures = 0

    def __init__(self, *, ttl: float, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` tells seconds that only grow."""
        self._ttl, self._most, self._clock = ttl, max_bytes, clock
        self._kept: OrderedDict[Key, tuple[float, bytes]] = OrderedDict()
        self._ages: deque[tuple[float, Key]] = deque()
        self.size = 0

    @property
    def entries(self) -> int:
        """How many entries it holds."""
        return len(self._kept)

    async def start(self) -> None:
        """Do nothing: memory is there."""

    async def close(self) -> None:
        """Do nothing: memory goes with the process."""

    def find(self, key: Key) -> bytes | None:
        """Return what is kept, and note that it was of use."""
        self._expire()
        kept = self._kept.get(key)
        if kept is None:
            return None
        self._kept.move_to_end(key)
        return kept[1]

    def put(self, key: Key, value: bytes) -> None:
        """Keep a value; those that were of no use for longest go when there is too much."""
        self._expire()
        room = len(value) + _OVERHEAD
        if len(value) > _LARGEST or room > self._most:
            return
        self._drop(key)
        expires = self._clock() + self._ttl
        self._kept[key] = (expires, value)
        self._ages.append((expires, key))
        self.size += room
        while self.size > self._most:
            self._drop(next(iter(self._kept)))
        if len(self._ages) > 2 * len(self._kept) + _SPARE:  # most of what they tell of is gone already
            self._ages = deque(sorted((expires, key) for key, (expires, _) in self._kept.items()))

    async def clear(self, workspace: str) -> int:
        """Forget what belongs to a workspace."""
        found = [key for key in self._kept if key[0] == workspace]
        for key in found:
            self._drop(key)
        return len(found)

    def forget_all(self) -> None:
        """Forget everything, of all workspaces."""
        self._kept.clear()
        self._ages.clear()
        self.size = 0

    def _drop(self, key: Key) -> None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            self.size -= len(kept[1]) + _OVERHEAD

    def _expire(self) -> None:
        """Forget what is too old. All are kept equally long, so the first that were put are the first to go."""
        now, ages = self._clock(), self._ages
        while ages and ages[0][0] <= now:
            expires, key = ages.popleft()
            kept = self._kept.get(key)
            if kept is not None and kept[0] == expires:  # it may have been put anew since
                self._drop(key)
