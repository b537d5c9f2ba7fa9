"""Turns of nodes that are gone, taken over in Redis."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import msgspec

from moltbot_server.errors import MoltBotError
from moltbot_server.store.protocol import Orphan
from moltbot_server.store.redis_line import Call, Command, RedisLine
from moltbot_server.store.redis_nodes import NodeLease
from moltbot_server.store.redis_rows import ORPHAN_FIELDS, base_of, key_of, orphan_from
from moltbot_server.store.redis_scripts import scripts

log = logging.getLogger(__name__)

_SWEEP_EVERY = 60.0
"""Seconds after which all nodes that have turns are looked at, also those that are not known any more."""
_TOGETHER = 64
_DAMAGED = (msgspec.MsgspecError, ValueError, TypeError, AttributeError)
"""What is raised by rows of which something is missing, or is not what it should be."""


class Takeover:
    """Looks for nodes that are gone, and makes their turns this node's."""

    def __init__(self, lease: NodeLease, reading: RedisLine, writing: RedisLine, prefix: str) -> None:
        self._lease = lease
        self._reading, self._writing = reading, writing
        self._prefix = prefix
        self._sweep_at = 0.0
        self._unfinished = False
        self._handed: dict[tuple[str, bytes], int] = {}

    async def take_over(self) -> Sequence[Orphan]:
        """Return the turns that are this node's from now on, in the order in which they were accepted.

        What breaks off half way is gone on with at the next call; no turn is returned twice.

        Raises:
            StorageUnavailable: Redis does not answer.
        """
        known = await self._lease.registered()
        gone = await self._lease.gone(known)
        now = asyncio.get_running_loop().time()
        sweeps = now >= self._sweep_at
        if not gone and not sweeps and not self._unfinished:
            return []
        self._unfinished = True
        found: list[tuple[float, Orphan]] = []
        try:
            for workspace in await self._ask(("SMEMBERS", f"{self._prefix}:workspaces")):
                found += await self._of_workspace(workspace.decode())
            await self._lease.strike(gone)
        except MoltBotError:
            if not found:
                raise
        else:
            self._unfinished = False
            if sweeps:
                self._sweep_at = now + _SWEEP_EVERY
        found.sort(key=lambda pair: pair[0])
        return [orphan for _, orphan in found]

    async def _of_workspace(self, workspace: str) -> Sequence[tuple[float, Orphan]]:
        base = base_of(self._prefix, workspace)
        there = {node.decode() for node in await self._ask(("SMEMBERS", f"{base}nodes"))}
        gone = await self._lease.gone(there)
        node = self._lease.node
        command = scripts()["take_over"].on(base, node, *gone)
        taken = await self._writing.put(Call(command, read=lambda replies: replies[0]))
        fresh = [
            (float(place), name, int(epoch))
            for place, name, epoch in taken
            if self._handed.get((workspace, name)) != int(epoch)
        ]
        orphans = []
        for start in range(0, len(fresh), _TOGETHER):
            orphans += await self._read(workspace, fresh[start : start + _TOGETHER])
        self._handed.update({(workspace, name): epoch for _, name, epoch in fresh})
        if taken:
            names = [name for _, name, _ in taken]
            with contextlib.suppress(MoltBotError):  # else they are told again, and known then
                await self._writing.put(Call(("ZREM", f"{base}taken:{node}", *names), read=lambda _: None))
                for name in names:
                    self._handed.pop((workspace, name), None)
        return orphans

    async def _read(self, workspace: str, turns: Sequence[tuple[float, bytes, int]]) -> list[tuple[float, Orphan]]:
        base = base_of(self._prefix, workspace).encode()
        commands: list[Command] = []
        for _, name, _ in turns:
            commands += (("HMGET", base + b"t:" + name, *ORPHAN_FIELDS), ("XRANGE", base + b"j:" + name, "-", "+"))

        def read(replies: list[Any]) -> list[tuple[float, Orphan]]:
            found = []
            for (place, name, epoch), fields, entries in zip(turns, replies[::2], replies[1::2], strict=True):
                try:
                    found.append((place, orphan_from(key_of(workspace, name), epoch, fields, entries)))
                except _DAMAGED:
                    # It keeps no other one waiting; whoever repeats its call starts it again.
                    told = {"workspace": workspace, "turn": name.decode(errors="replace")}
                    log.exception("a turn of a core that is gone cannot be read and is not carried on", extra=told)
            return found

        return await self._reading.put(Call(*commands, read=read))

    async def _ask(self, command: Command) -> Any:
        return await self._reading.put(Call(command, read=lambda replies: replies[0]))
