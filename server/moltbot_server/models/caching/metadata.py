"""What was looked up elsewhere and seldom changes, such as the list of a provider's models."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast

from moltbot_server.metrics import CacheCounts
from moltbot_server.turns import encode

T = TypeVar("T")

_Place = tuple[str, str]


class MetadataCache:
    """Keeps what `load` functions return, each for a while of its own; who asks meanwhile waits for the same load.

    Belongs to the event loop's thread. What is kept has to be plain: numbers, texts, lists, and the structs of `turns`.
    """

    name = "metadata"
    backend = "memory"
    failures = 0

    def __init__(self, *, ttl: float, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`ttl` is how long most is kept, in seconds; `clock` tells seconds that only grow."""
        self.ttl, self.max_bytes, self._clock = ttl, max_bytes, clock
        self.counts = CacheCounts()
        self.size = 0
        self._kept: OrderedDict[_Place, tuple[float, Any, int]] = OrderedDict()
        self._loading: dict[_Place, asyncio.Task[Any]] = {}

    @property
    def entries(self) -> int:
        """How many entries it holds."""
        return len(self._kept)

    async def get(self, key: str, ttl: float | None, load: Callable[[], Awaitable[T]], *, workspace: str = "") -> T:
        """Return what is kept under a key, or what `load` returns, which is then kept for `ttl` seconds.

        None is the cache's own `ttl`. A load goes on when those who wait for it leave. What it raises is told to all
        who wait and is not kept.
        """
        place = (workspace, key)
        kept = self._kept.get(place)
        if kept is not None and kept[0] > self._clock():
            self.counts.hits += 1
            self._kept.move_to_end(place)
            return cast(T, kept[1])
        loading = self._loading.get(place)
        if loading is None:
            self.counts.misses += 1
            keep = self.ttl if ttl is None else min(ttl, self.ttl)
            loading = self._loading[place] = asyncio.create_task(self._load(place, keep, load))
            loading.add_done_callback(_looked_at)
        else:
            self.counts.joined += 1
        return cast(T, await asyncio.shield(loading))

    async def clear(self, workspace: str) -> int:
        """Forget what belongs to a workspace, and what belongs to none; return how many entries that was."""
        found = [place for place in self._kept if place[0] in ("", workspace)]
        for place in found:
            self._drop(place)
        return len(found)

    async def close(self) -> None:
        """Break off what is being loaded."""
        for task in (loading := [*self._loading.values()]):
            task.cancel()
        if loading:
            await asyncio.wait(loading)

    async def _load(self, place: _Place, keep: float, load: Callable[[], Awaitable[T]]) -> T:
        try:
            value = await load()
            self._keep(place, keep, value)
            return value
        finally:
            del self._loading[place]

    def _keep(self, place: _Place, keep: float, value: object) -> None:
        self._drop(place)
        size = len(encode(value)) + sum(map(len, place))
        if keep <= 0 or size > self.max_bytes:
            return
        self._kept[place] = (self._clock() + keep, value, size)
        self.size += size
        while self.size > self.max_bytes:
            self._drop(next(iter(self._kept)))

    def _drop(self, place: _Place) -> None:
        kept = self._kept.pop(place, None)
        if kept is not None:
            self.size -= kept[2]


def _looked_at(task: asyncio.Task[Any]) -> None:
    """Take note of how a load ended, so that one that nobody waited for to its end is not complained about."""
    if not task.cancelled():
        task.exception()
