"""What `moltbot cache` does: asks the core that runs, and prints a table or JSON."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import grpc
from moltbot import MoltBotClientError
from moltbot.channel import open_channel
from moltbot.errors import from_status
from moltbot.v1 import cache_pb2, cache_pb2_grpc

from moltbot_server.cli.asking import Place
from moltbot_server.cli.model_place import Models, told
from moltbot_server.cli.tables import table
from moltbot_server.cli.terminal import Exit, Failure, harmless
from moltbot_server.config_spelling import nearest
from moltbot_server.models.sizes import readable

_Answer = TypeVar("_Answer")
_PATIENCE = 60.0


@told
def list_caches(given: argparse.Namespace) -> int:
    """Print the caches; return the exit status."""
    caches = _caches(_core(given))
    print(json.dumps({"caches": caches}) if given.json else _table(caches))
    return int(Exit.OK)


@told
def clear_caches(given: argparse.Namespace) -> int:
    """Clear a cache or all of them; return the exit status."""
    name = str(given.name or "-").removeprefix("caches/")
    request = cache_pb2.ClearCacheRequest(name=f"caches/{name}")

    async def ask(service: Any, metadata: Any) -> int:
        return int((await service.ClearCache(request, metadata=metadata, timeout=_PATIENCE)).cleared)

    core = _core(given)
    try:
        cleared = asyncio.run(_asked(core, ask))
    except MoltBotClientError as error:
        if "name" not in error.fields:
            raise
        raise _no_cache(name, [cache["name"] for cache in _caches(core)]) from None
    if given.json:
        print(json.dumps({"cleared": cleared}))
    else:
        print(f"{cleared} {'entry was' if cleared == 1 else 'entries were'} forgotten.")
    return int(Exit.OK)


def _caches(core: Place) -> Sequence[Mapping[str, Any]]:
    async def ask(service: Any, metadata: Any) -> Sequence[cache_pb2.Cache]:
        answer = await service.ListCaches(cache_pb2.ListCachesRequest(), metadata=metadata, timeout=_PATIENCE)
        return list(answer.caches)

    return [_entry(cache) for cache in asyncio.run(_asked(core, ask))]


def _no_cache(name: str, known: Sequence[str]) -> Failure:
    near = nearest(name, known)
    hint = f"did you mean {near}?" if near else f"there are {', '.join(known)}; without a name all are cleared"
    return Failure(f"there is no cache {harmless(name[:64])!r}; {hint}", Exit.USAGE)


def _core(given: argparse.Namespace) -> Place:
    return Models.of(given).running_core("only it has caches")


async def _asked(place: Place, ask: Callable[[Any, Any], Awaitable[_Answer]]) -> _Answer:
    channel = open_channel(place.address, None)
    try:
        return await ask(cache_pb2_grpc.CacheServiceStub(channel), (("authorization", f"Bearer {place.key}"),))
    except grpc.aio.AioRpcError as error:
        raise from_status(error, place.address) from None
    finally:
        await channel.close()


def _entry(cache: cache_pb2.Cache) -> dict[str, Any]:
    return {
        "name": cache.name.removeprefix("caches/"),
        "backend": cache.backend,
        "entries": cache.entries,
        "bytes": cache.bytes,
        "max_bytes": cache.max_bytes,
        "ttl": cache.ttl.ToTimedelta().total_seconds(),
        "hits": cache.hits,
        "misses": cache.misses,
        "joined": cache.joined,
    }


def _table(caches: Sequence[Mapping[str, Any]]) -> str:
    rows = [("NAME", "KEPT IN", "ENTRIES", "SIZE", "AT MOST", "FOR", "HITS", "MISSES", "JOINED")]
    for cache in caches:
        here = cache["backend"] == "memory"
        rows.append(
            (
                cache["name"],
                cache["backend"],
                str(cache["entries"]) if here else "-",
                readable(cache["bytes"]) if here else "-",
                readable(cache["max_bytes"]) if cache["max_bytes"] else "-",
                f"{cache['ttl']:g} s",
                *(str(cache[count]) for count in ("hits", "misses", "joined")),
            )
        )
    return table(rows)
