"""Which nodes are there: each has a lease in Redis that ends by Redis' own clock unless it is renewed.

One that has hung up is gone before its lease is over. All this says who may be taken over, and nothing else: what a
node may still write is decided by the epoch of each turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Collection, Sequence
from itertools import chain
from typing import Any

from moltbot_server import tasks
from moltbot_server.errors import MoltBotError
from moltbot_server.store.redis_hangups import Hangups, Lease
from moltbot_server.store.redis_line import Call, Command, RedisLine
from moltbot_server.store.redis_owners import Stranger, enter, owner_of, warn_of_others
from moltbot_server.store.redis_scripts import scripts

log = logging.getLogger(__name__)

LEASE = 3.0
"""Seconds after its last renewal in which a node counts as there."""
_RENEWALS = 5  # in the time of a lease


class NodeLease:
    """The lease of this node, renewed by a task of its own."""

    def __init__(
        self,
        line: RedisLine,
        *,
        prefix: str,
        node: str,
        address: str = "",
        seconds: float = LEASE,
        fingerprint: str = "",
        redis: str = "",
    ) -> None:
        """`address` is where nodes of this machine reach this one, `unix:PATH`, if there is such a way.

        `fingerprint` is of the key that opens this node; without one, it is nobody's stranger. `redis` is the address
        of that, for people.
        """
        self._line = line
        self._redis = redis
        self._local, self._public = address, ""
        self._prefix, self._fingerprint = prefix, fingerprint
        self.node = node
        self._seconds = seconds
        self._calm_until = 0.0
        self._joined = self._missed = False
        self._run = ""
        self._hangups = Hangups(line, lease=seconds)
        self._hurry = asyncio.Event()
        line.when_connected(self._hurry.set)  # others see that the connection of before is closed
        self._task: asyncio.Task[None] | None = None

    async def join(self) -> None:
        """Be among the nodes until `leave`.

        Raises:
            StorageUnavailable: nodes that know another key are there, which alone has no `retry_after`; or Redis does
                not answer.
        """
        up = float(self._line.server.get("uptime_in_seconds", "0"))
        if self._fingerprint:
            await enter(self._try_to_join, redis=self._redis, prefix=self._prefix)
        await self.renew()
        # Redis was away until now: the others had no chance to renew theirs.
        self._calm(self._seconds - up)
        self._task = asyncio.create_task(self._keep())

    async def leave(self) -> None:
        """Be gone at once: others need not wait for the end of the lease."""
        if self._task is None:
            return
        await tasks.end(self._task)
        self._task = None
        try:
            left = (("SADD", self._left, self.node), ("SREM", self._nodes, self.node))
            told = (self._key(self.node), self._connection(self.node), owner_of(self._prefix, self.node))
            await self._ask(*left, ("DEL", *told))
        except MoltBotError:
            log.warning("Redis is away; others take this node's turns over when its lease has ended")

    async def renew(self) -> None:
        """Renew the lease, and take note when it had ended.

        Raises:
            StorageUnavailable: Redis does not answer.
        """
        lease = ("SET", self._key(self.node), self._told, "PX", self._life, "GET")
        connection = ("SET", self._connection(self.node), self._line.client_id, "PX", self._life)
        renewal: list[Command] = [("SADD", self._nodes, self.node), lease, connection]
        if self._fingerprint:
            renewal.append(("SET", owner_of(self._prefix, self.node), self._fingerprint, "PX", self._life))
        try:
            _, held, *_ = await self._ask(*renewal)
        except MoltBotError:
            self._missed = True
            raise
        if held is None and self._joined:
            log.warning("this node was away for longer than its lease; others may have taken its turns over")
        run = self._line.server.get("run_id", "")
        if self._joined and (held is None or self._missed or run != self._run):
            # Redis was perhaps away, for others at a worse moment: they may have had no chance to renew theirs.
            self._calm(self._seconds)
        lapsed = self._joined and held is None
        self._joined, self._missed, self._run = True, False, run
        if lapsed:
            # Whoever started meanwhile could not see this node, which has turns and callers: it stays, and tells.
            await warn_of_others(self._ask, self._prefix, mine=self._fingerprint)

    async def gone(self, nodes: Collection[str]) -> Sequence[str]:
        """Return those of some nodes that are gone.

        Nobody is for a while after this node could not renew its own lease: that may have been Redis' fault, and the
        others need the time to say that they are there. Those that left by themselves are gone at once, those that
        have hung up after a third of a lease.

        Raises:
            StorageUnavailable: Redis does not answer.
        """
        await self.renew()
        others = sorted(set(nodes) - {self.node})
        if not others:
            return ()
        pairs = ((("PTTL", self._key(node)), ("GET", self._connection(node))) for node in others)
        known, (seconds, micros), *told = await self._ask(("SMEMBERS", self._nodes), ("TIME",), *chain(*pairs))
        now = int(seconds) * 1000 + int(micros) // 1000
        found = zip(others, told[::2], told[1::2], strict=True)
        leases = {node: Lease(now + left, connection) for node, left, connection in found if left >= 0}
        absent = [node for node in others if node not in leases]
        if asyncio.get_running_loop().time() < self._calm_until:
            self._hangups.forget()
            return [node for node in absent if node.encode() not in known]
        return [*absent, *await self._hangups.among(leases)]

    async def registered(self) -> Collection[str]:
        """Return the nodes that are there, are gone, or have left, until they are struck.

        Raises:
            StorageUnavailable: Redis does not answer.
        """
        found = await self._ask(("SMEMBERS", self._nodes), ("SMEMBERS", self._left))
        return {node.decode() for nodes in found for node in nodes}

    async def address_of(self, node: str) -> str:
        """Return the address that a node has told; empty when it is gone, or has told none.

        Raises:
            StorageUnavailable: Redis does not answer.
        """
        (told,) = await self._ask(("GET", self._key(node)))
        words: list[str] = told.decode().split(" ") if told is not None else []
        if len(words) > 3 and words[0] == socket.gethostname():
            return words[3]
        return words[2] if len(words) > 2 else ""

    async def advertise(self, address: str) -> None:
        """Tell at which address of the network this node is reached.

        Raises:
            StorageUnavailable: Redis does not answer.
        """
        self._public = address
        await self.renew()

    async def strike(self, nodes: Sequence[str]) -> None:
        """Let nodes that are gone be known no more.

        Raises:
            StorageUnavailable: Redis does not answer.
        """
        if nodes:
            await self._ask(("SREM", self._nodes, *nodes), ("SREM", self._left, *nodes))

    async def _try_to_join(self) -> Sequence[Stranger]:
        """Join the nodes, or return those with another key that are there."""
        join = scripts()["join"].on(self._prefix, self.node, self._told, self._life, self._fingerprint)
        (found,) = await self._ask(join)
        return [Stranger(node.decode(), ends, lease.decode()) for node, ends, lease in found]

    @property
    def _told(self) -> str:
        """What the lease tells: host, process, and where this node is reached."""
        return " ".join((socket.gethostname(), str(os.getpid()), self._public, self._local)).rstrip()

    @property
    def _life(self) -> int:
        """How long a lease lasts, in milliseconds."""
        return int(self._seconds * 1000)

    @property
    def _nodes(self) -> str:
        return f"{self._prefix}:nodes"

    @property
    def _left(self) -> str:
        return f"{self._prefix}:left"

    def _key(self, node: str) -> str:
        return f"{self._prefix}:node:{node}"

    def _connection(self, node: str) -> str:
        return f"{self._prefix}:connection:{node}"

    def _calm(self, seconds: float) -> None:
        self._calm_until = max(self._calm_until, asyncio.get_running_loop().time() + seconds)

    async def _ask(self, *commands: Command) -> list[Any]:
        return await self._line.put(Call(*commands, read=list))

    async def _keep(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._seconds / _RENEWALS):
                    await self._hurry.wait()
            self._hurry.clear()
            try:
                await self.renew()
            except MoltBotError as error:
                log.debug("the lease of this node could not be renewed", extra={"problem": error.message})
