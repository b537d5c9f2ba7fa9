"""CacheService: what the core keeps for another time, and how to clear it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from google.protobuf.duration_pb2 import Duration
from moltbot.v1 import cache_pb2, cache_pb2_grpc

from moltbot_server.errors import InvalidField
from moltbot_server.metrics import CountedCache
from moltbot_server.rpc.interceptors import Call

_PREFIX = "caches/"
_ALL = "-"
_LONGEST = 315_576_000_000  # seconds that a Duration can say


class ClearableCache(CountedCache, Protocol):
    """A cache as this service tells of it and clears it."""

    @property
    def backend(self) -> str:
        """Where it is kept: `memory` or `redis`."""

    @property
    def max_bytes(self) -> int:
        """The most that it holds, in bytes."""

    @property
    def ttl(self) -> float:
        """How long an entry is kept, in seconds."""

    async def clear(self, workspace: str) -> int:
        """Forget what belongs to a workspace and return how many entries that was.

        Raises:
            StorageUnavailable: it is kept elsewhere and cannot be reached.
        """


class CacheService(cache_pb2_grpc.CacheServiceServicer):
    """Serves caches."""

    def __init__(self, caches: Sequence[ClearableCache]) -> None:
        self._caches = {cache.name: cache for cache in caches}

    async def ListCaches(self, request: cache_pb2.ListCachesRequest, call: Call) -> cache_pb2.ListCachesResponse:  # type: ignore[override]
        """Answer the caches with their counters, which are those of the whole core."""
        return cache_pb2.ListCachesResponse(caches=[_message(cache) for cache in self._caches.values()])

    async def ClearCache(self, request: cache_pb2.ClearCacheRequest, call: Call) -> cache_pb2.ClearCacheResponse:  # type: ignore[override]
        """Forget what a cache, or each of them, keeps of the caller's workspace."""
        name = request.name.removeprefix(_PREFIX) if request.name.startswith(_PREFIX) else ""
        if name != _ALL and name not in self._caches:
            known = ", ".join(f"`{_PREFIX}{each}`" for each in self._caches)
            raise InvalidField("name", f"use one of {known}, or `{_PREFIX}{_ALL}` for all of them")
        chosen = self._caches.values() if name == _ALL else (self._caches[name],)
        cleared = 0
        for cache in chosen:
            cleared += await cache.clear(call.principal.workspace)
        return cache_pb2.ClearCacheResponse(cleared=cleared)


def _message(cache: ClearableCache) -> cache_pb2.Cache:
    ttl = Duration()
    ttl.FromNanoseconds(round(min(cache.ttl, _LONGEST) * 1e9))
    return cache_pb2.Cache(
        name=f"{_PREFIX}{cache.name}",
        backend=cache.backend,
        entries=cache.entries,
        max_bytes=cache.max_bytes,
        bytes=cache.size,
        ttl=ttl,
        hits=cache.counts.hits,
        misses=cache.counts.misses,
        joined=cache.counts.joined,
    )
