"""Which nodes have hung up: when a process ends, its connections do so at once, long before its lease is over.

A connection that broke is opened again, and the lease renewed behind it. So a node is gone when the connection that it
told of is closed, and its lease stays as it is for a third of a lease. Where Redis does not say who is connected, or a
process ended with its machine, the end of the lease tells it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from moltbot_server.store.redis_line import Call, RedisLine

_RENEWED = 100
"""Milliseconds by which a lease that was renewed ends later than before at least; Redis rounds both its clocks."""
_LOOKS = 3
"""How often a node has to be found so at least: Redis, or this process, may have stood still between two looks."""


class Lease(NamedTuple):
    """When a node's lease ends (milliseconds, by Redis' clock), and the number of the connection that renews it."""

    ends: int
    connection: bytes | None


class _Silence:
    """For how long a node's connection has been closed, and its lease the same."""

    __slots__ = ("ends", "looked_at", "seconds")

    def __init__(self, ends: int, now: float) -> None:
        self.ends, self.looked_at, self.seconds = ends, now, 0.0


class Hangups:
    """Finds the nodes that have hung up, when it is asked several times in the time of a lease."""

    def __init__(self, line: RedisLine, *, lease: float) -> None:
        """`lease` is how long one lasts, in seconds."""
        self._line = line
        self._patience = lease / 3
        self._silent: dict[str, _Silence] = {}

    def forget(self) -> None:
        """Begin anew: Redis was perhaps away, and the connections of all nodes are closed."""
        self._silent.clear()

    async def among(self, leases: Mapping[str, Lease]) -> Collection[str]:
        """Return those of some nodes that have hung up.

        Raises:
            StorageUnavailable: Redis does not answer.
        """
        told = {node: lease.connection for node, lease in leases.items() if lease.connection is not None}
        open_ones = await self._open(set(told.values())) if told else None
        now = asyncio.get_running_loop().time()
        gone = []
        for node, lease in leases.items():
            if open_ones is None or node not in told or told[node] in open_ones:
                self._silent.pop(node, None)
                continue
            silence = self._silent.get(node)
            if silence is None or lease.ends >= silence.ends + _RENEWED:
                self._silent[node] = _Silence(lease.ends, now)
                continue
            silence.seconds += min(now - silence.looked_at, self._patience / _LOOKS)
            silence.looked_at = now
            if silence.seconds >= self._patience:
                gone.append(node)
        return gone

    async def _open(self, connections: Collection[bytes]) -> Collection[bytes] | None:
        """Return those of some connections that are open; None where Redis does not tell."""

        def read(replies: list[Any]) -> Collection[bytes] | None:
            (reply,) = replies
            if not isinstance(reply, bytes):
                return None
            return {line.partition(b" ")[0].removeprefix(b"id=") for line in reply.splitlines()}

        return await self._line.put(Call(("CLIENT", "LIST", "ID", *connections), read=read, tolerant=True))
