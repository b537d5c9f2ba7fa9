"""Stores of several nodes on one Redis, and a look at its keys."""

from __future__ import annotations

import secrets

from moltbot_server.store import NewTurn
from moltbot_server.store.protocol import JournalEntry
from moltbot_server.store.redis import RedisStore
from moltbot_server.turns import Event, TextDelta
from redis.asyncio import Redis

LEASE = 0.5


class Nodes:
    """Stores of several nodes on one Redis."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.prefix = f"test-{secrets.token_hex(4)}"
        self.opened: list[RedisStore] = []

    async def join(self, *, lease: float = LEASE) -> RedisStore:
        """Return an open store."""
        store = RedisStore(host="127.0.0.1", port=self.port, prefix=self.prefix, lease=lease)
        await store.open()
        self.opened.append(store)
        return store

    def keys(self) -> Redis:
        """Return a client that looks at the keys."""
        return Redis(host="127.0.0.1", port=self.port, protocol=2)


def wrote(turn: NewTurn, *words: str, first: int = 1, epoch: int = 1) -> JournalEntry:
    events = (Event(sequence=first + place, at=1.0, kind=TextDelta(text=word)) for place, word in enumerate(words))
    return JournalEntry(key=turn.key, events=tuple(events), epoch=epoch)
