"""The outbox in Redis. Times are those of Redis' clock: nodes may disagree about theirs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from moltbot_server.errors import MoltBotError
from moltbot_server.store.outbox import (
    UNSAID,
    UNWANTED,
    Channel,
    DeadLetter,
    Delivery,
    Held,
    Leased,
    NewDelivery,
    lease_lost,
    never_leased,
    not_found,
)
from moltbot_server.store.redis_line import Argument, Call, Command, RedisLine
from moltbot_server.store.sealed import Sealed
from moltbot_server.turns import Completed, Failed, Place, SessionKey, TurnKey, encode

_STEP = 200
_TOGETHER = 500
_DEAD = ("e", "g", "k", "c", "a", "t", "r", "v", "n")

T = TypeVar("T")

_ending: Sealed[Completed | Failed] = Sealed(Completed | Failed)


class _Redis(Protocol):
    """What of the store the outbox needs."""

    def base(self, workspace: str) -> str: ...

    def run(self, script: str, workspace: str, *arguments: Argument) -> Command: ...

    async def workspaces(self) -> Sequence[str]: ...


def posting_arguments(delivery: NewDelivery | None) -> tuple[Argument, ...]:
    """Return what the script that ends a turn is told of its delivery."""
    if delivery is None:
        return ()
    place = delivery.place
    return delivery.id, place.channel, place.address, delivery.request_id, encode(delivery.ending)


class RedisOutbox:
    """An `Outbox` in the Redis of a store."""

    def __init__(self, store: _Redis, reading: RedisLine, writing: RedisLine) -> None:
        self._store = store
        self._reading, self._writing = reading, writing

    async def due(self, channels: Collection[Channel]) -> Collection[Channel]:
        """Return the channels in which something can be leased now."""
        asked = list(channels)
        commands = [
            ("ZRANGE", f"{self._store.base(workspace)}due:{channel}", 0, 0, "WITHSCORES")
            for workspace, channel in asked
        ]
        (seconds, micros), *firsts = await self._ask(("TIME",), *commands)
        now = int(seconds) * 1000 + int(micros) // 1000
        return [channel for channel, first in zip(asked, firsts, strict=True) if first and float(first[1]) <= now]

    async def lease(self, channel: Channel, *, limit: int, seconds: float, most_attempts: int) -> Leased:
        """Lease what can be leased, the longest due first."""
        workspace, name = channel
        command = self._store.run("outbox_lease", workspace, name, limit, _milliseconds(seconds), most_attempts, UNSAID)
        # Sent twice it would lease twice; leases of which nobody was told end by themselves.
        return await self._write(command, lambda reply: _leased(workspace, *reply), repeatable=False)

    async def renew(self, leases: Sequence[Held], seconds: float) -> Collection[Held]:
        """Let leases end later, and return those that have ended."""
        ended: list[Held] = []
        for workspace in {lease.workspace for lease in leases}:
            own = [lease for lease in leases if lease.workspace == workspace]
            told = [argument for lease in own for argument in (lease.id, lease.attempt)]
            command = self._store.run("outbox_renew", workspace, _milliseconds(seconds), *told)
            ended += [own[place] for place in await self._write(command, list)]
        return ended

    async def confirm(self, workspace: str, id: str, message: str) -> tuple[str, Place | None]:
        """Take note that a delivery was posted."""
        command = self._store.run("outbox_confirm", workspace, id, message)

        def read(reply: Any) -> tuple[str, Place | None] | MoltBotError:
            if isinstance(reply, int):
                return never_leased() if reply else not_found()
            kept, channel, address, news = reply
            return kept.decode(), _place(channel, address) if news else None

        return await self._write(command, read)

    async def reject(
        self, lease: Held, *, reason: str, delay: float, permanent: bool, most_attempts: int
    ) -> tuple[bool, Place | None]:
        """Give a lease back, or the delivery up."""
        later = "" if permanent else _milliseconds(delay)
        told = (lease.id, lease.attempt, reason, later, most_attempts)
        command = self._store.run("outbox_reject", lease.workspace, *told)

        def read(reply: Any) -> tuple[bool, Place | None] | MoltBotError:
            if isinstance(reply, int):
                return lease_lost() if reply else not_found()
            dead, channel, address, news = reply
            return bool(dead), _place(channel, address) if news else None

        return await self._write(command, read)

    async def list_dead(
        self, workspace: str, *, channel: str, before: tuple[float, str] | None, limit: int
    ) -> Sequence[DeadLetter]:
        """Return what was given up, the latest first."""
        base = self._store.base(workspace)
        lowest = "-inf" if before is None else -_milliseconds(before[0])
        found: list[DeadLetter] = []
        start = 0
        while len(found) < limit:
            step = ("ZRANGEBYSCORE", f"{base}dead", lowest, "+inf", "WITHSCORES", "LIMIT", start, _STEP)
            (place,) = await self._ask(step)
            after = [
                id.decode()
                for id, score in zip(place[::2], place[1::2], strict=True)
                if before is None or -float(score) < _milliseconds(before[0]) or id.decode() > before[1]
            ]
            found += [letter for letter in await self._letters(workspace, after) if _is_of(letter, channel)]
            if len(place) < 2 * _STEP:
                break
            start += _STEP
        return found[:limit]

    async def _letters(self, workspace: str, ids: Sequence[str]) -> list[DeadLetter]:
        if not ids:
            return []
        base = self._store.base(workspace)
        rows = await self._ask(*(("HMGET", f"{base}d:{id}", *_DEAD) for id in ids))
        return [
            DeadLetter(
                delivery=_delivery(workspace, id.encode(), *fields), reason=reason.decode(), dead_time=int(at) / 1000
            )
            for id, (at, reason, *fields) in zip(ids, rows, strict=True)
            if at is not None  # dropped meanwhile
        ]

    async def revive(self, workspace: str, id: str) -> Place | None:
        """Have a dead letter delivered after all, behind what waits for its place."""
        return await self._end(workspace, id, "revive")

    async def drop(self, workspace: str, id: str) -> bool:
        """Delete a dead letter."""
        return await self._end(workspace, id, "drop") is not None

    async def _end(self, workspace: str, id: str, what: str) -> Place | None:
        command = self._store.run("outbox_dead", workspace, id, what)
        return await self._write(command, lambda reply: _place(*reply) if reply else None, repeatable=False)

    async def count(self) -> Mapping[tuple[str, str], int]:
        """Return how many are open and dead, by channel and state."""
        counts: dict[tuple[str, str], int] = {}

        def add(channel: bytes, state: str, count: int) -> None:
            if count:
                place = (channel.decode(), state)
                counts[place] = counts.get(place, 0) + count

        for workspace in await self._store.workspaces():
            base = self._store.base(workspace)
            channels, buried = await self._ask(("SMEMBERS", f"{base}channels"), ("HGETALL", f"{base}buried"))
            for channel, dead in zip(buried[::2], buried[1::2], strict=True):
                add(channel, "dead", int(dead))
            sizes = await self._ask(*(("ZCARD", f"{base}open:".encode() + channel) for channel in channels))
            for channel, size in zip(channels, sizes, strict=True):
                add(channel, "open", size)
        return counts

    async def prune(self, *, keep: float, delivered: float) -> int:
        """Delete what is old, and give up what nobody took for long."""
        told = (_milliseconds(keep), _milliseconds(delivered), _TOGETHER, UNWANTED)
        pruned = 0
        for workspace in await self._store.workspaces():
            pruned += await self._write(self._store.run("outbox_prune", workspace, *told), int)
        return pruned

    async def _ask(self, *commands: Command) -> list[Any]:
        if not commands:
            return []
        return await self._reading.put(Call(*commands, read=list))

    async def _write(self, command: Command, read: Callable[[Any], T | MoltBotError], *, repeatable: bool = True) -> T:
        return await self._writing.put(Call(command, read=lambda replies: read(replies[0]), repeatable=repeatable))


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _place(channel: bytes, address: bytes) -> Place:
    return Place(channel=channel.decode(), address=address.decode())


def _leased(workspace: str, dead: int, rows: Sequence[Sequence[bytes]]) -> Leased:
    return Leased(deliveries=tuple(_delivery(workspace, *row) for row in rows), dead=dead)


def _is_of(letter: DeadLetter, channel: str) -> bool:
    return not channel or letter.delivery.place.channel == channel


def _delivery(
    workspace: str,
    id: bytes,
    attempt: bytes,
    channel: bytes,
    address: bytes,
    turn: bytes,
    request: bytes,
    ending: bytes,
    created: bytes,
) -> Delivery:
    ordinal, _, session = turn.decode().partition(":")
    return Delivery(
        id=id.decode(),
        turn=TurnKey(session=SessionKey(workspace=workspace, session=session), ordinal=int(ordinal)),
        place=_place(channel, address),
        request_id=request.decode(),
        ending=_ending.decode(ending),
        attempt=int(attempt),
        create_time=int(created) / 1000,
    )
