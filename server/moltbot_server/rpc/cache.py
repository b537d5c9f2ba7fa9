"""CacheService: what the core keeps for another time, and how to clear it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from google.protobuf.duration_pb2 import Duration
from moltbot.v1 import cache_pb2, cache_pb2_grpc

from moltbot_server.errors import InvalidField
from moltbot_server.metrics import CountedCache
from moltbot_server.rpc.interceptors import Call
from moltbot_server.rpc.siblings import Siblings

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

    def __init__(self, caches: Sequence[ClearableCache], siblings: Siblings) -> None:
        self._siblings = siblings
        self._caches = {cache.name: cache for cache in caches}

    async def ListCaches(self, request: cache_pb2.ListCachesRequest, call: Call) -> cache_pb2.ListCachesResponse:  # type: ignore[override]
        """Answer the caches with their counters, which are those of all workers together."""
        found = {cache.name: cache for cache in map(_message, self._caches.values())}
        others = await self._siblings.hear(
            call, lambda channel, common: cache_pb2_grpc.CacheServiceStub(channel).ListCaches(request, **common)
        )
        for theirs in (cache for answer in others for cache in answer.caches):
            if (ours := found.get(theirs.name)) is not None:
                _add(ours, theirs)
        return cache_pb2.ListCachesResponse(caches=found.values())

    async def ClearCache(self, request: cache_pb2.ClearCacheRequest, call: Call) -> cache_pb2.ClearCacheResponse:  # type: ignore[override]
        """Forget what a cache, or each of them, keeps of the caller's workspace."""
        name = request.name.removeprefix(_PREFIX) if request.name.startswith(_PREFIX) else ""
        if name != _ALL and name not in self._caches:
            known = ", ".join(f"`{_PREFIX}{each}`" for each in self._caches)
            raise InvalidField("name", f"use one of {known}, or `{_PREFIX}{_ALL}` for all of them")
        chosen = self._caches.values() if name == _ALL else (self._caches[name],)
        cleared = 0
        for cache in sorted(chosen, key=lambda cache: cache.backend != "memory"):  # Redis may be away
            cleared += await cache.clear(call.principal.workspace)
        others = await self._siblings.carry(
            call, lambda channel, common: cache_pb2_grpc.CacheServiceStub(channel).ClearCache(request, **common)
        )
        cleared += sum(answer.cleared for answer in others)
        return cache_pb2.ClearCacheResponse(cleared=cleared)


def _add(ours: cache_pb2.Cache, theirs: cache_pb2.Cache) -> None:
    """Add what another worker has; what is kept elsewhere is there for all of them, and counts once."""
    ours.hits += theirs.hits
    ours.misses += theirs.misses
    ours.joined += theirs.joined
    if ours.backend == "memory":
        ours.entries += theirs.entries
        ours.bytes += theirs.bytes
        ours.max_bytes += theirs.max_bytes


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
