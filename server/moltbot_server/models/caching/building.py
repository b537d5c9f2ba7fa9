"""The caches of a core, from its settings."""

from __future__ import annotations

from hashlib import blake2b
from typing import NamedTuple

from moltbot_server.config import ConfigError, Problem, Settings
from moltbot_server.models.caching.answers import AnswerCache
from moltbot_server.models.caching.backend import Backend, MemoryBackend
from moltbot_server.models.caching.metadata import MetadataCache
from moltbot_server.workspace import Workspace

_METADATA_BYTES = 4 << 20


class Caches(NamedTuple):
    """What a core keeps for another time beside its sessions."""

    answers: AnswerCache
    metadata: MetadataCache

    @classmethod
    def of(cls, settings: Settings) -> Caches:
        """Return the caches that the settings ask for, not started yet.

        Raises:
            ConfigError: answers are to be kept in Redis, and its client is not installed.
        """
        cache = settings.cache
        shared = cache.type == "redis"
        answers = AnswerCache(
            _redis(settings) if shared else MemoryBackend(ttl=cache.ttl, max_bytes=cache.max_bytes),
            ttl=cache.ttl,
            max_bytes=0 if shared else cache.max_bytes,
            answers=cache.answers if cache.ttl > 0 else "off",
        )
        return cls(answers, MetadataCache(ttl=cache.ttl, max_bytes=_METADATA_BYTES))

    async def start(self) -> None:
        """Become ready; a cache that is out of reach is done without."""
        await self.answers.start()

    async def close(self) -> None:
        """Let go of what they need."""
        await self.metadata.close()
        await self.answers.close()


def routing_digest(settings: Settings, default: str) -> bytes:
    """Return a digest of what decides which model answers, for `AnswerCache.renew`; `default` is the default model."""
    decides = (settings.models, settings.routes, settings.providers, default)
    return blake2b(repr(decides).encode(), digest_size=16).digest()


def _redis(settings: Settings) -> Backend:
    # Late: it takes half a second, and only those who keep answers in Redis need it installed.
    try:
        from moltbot_server.models.caching.redis_backend import RedisBackend
    except ModuleNotFoundError:
        text = (
            "cache.type is redis, and its client is not installed: "
            "type  .venv/bin/python -m pip install --editable '.[redis]'  in MoltBot's folder and start again"
        )
        raise ConfigError(Problem(where=settings.origin("cache.type"), text=text)) from None
    cache = settings.cache
    place = Workspace(folder=settings.workspace)
    # All nodes of a workspace have its key, and no other workspace has.
    owner = blake2b(place.read_key().encode(), digest_size=8).hexdigest() if place.exists() else ""
    return RedisBackend(host=cache.host, port=cache.port, password=cache.password, ttl=cache.ttl, owner=owner)
