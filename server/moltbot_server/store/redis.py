"""The shared store: all nodes of a workspace keep their turns in one Redis.

Whatever changes more than one key is a script, so each step happens whole or not at all; what the event loop gathered
goes to Redis together. A turn belongs to the node that it names, at the epoch that it names; scripts check both. What
the names of keys mean is in docs/store.md.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Any

from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from moltbot_server.config import is_loopback
from moltbot_server.errors import MoltBotError, StorageFull, StorageUnavailable, TurnInterrupted
from moltbot_server.store.findings import Finding
from moltbot_server.store.pending import Pending
from moltbot_server.store.protocol import (
    KEEP_REQUESTS,
    Away,
    Deleted,
    Elsewhere,
    EndedTurn,
    JournalEntry,
    Moved,
    NewTurn,
    Orphan,
    StoredSession,
    StoredTurn,
    Taken,
    UsagePage,
    UsagePlace,
    UsageQuery,
    UsageRow,
)
from moltbot_server.store.redis_line import Argument, Call, Command, RedisLine
from moltbot_server.store.redis_listing import list_sessions
from moltbot_server.store.redis_nodes import LEASE, NodeLease
from moltbot_server.store.redis_outbox import RedisOutbox
from moltbot_server.store.redis_owners import fingerprint
from moltbot_server.store.redis_presence import Presence
from moltbot_server.store.redis_probe import WriteProbe
from moltbot_server.store.redis_rows import (
    SESSION_FIELDS,
    TURN_FIELDS,
    accept_arguments,
    base_of,
    finish_arguments,
    key_of,
    loaded_from,
    messages_from,
    name_of,
    session_from,
    turn_from,
)
from moltbot_server.store.redis_scripts import loading, scripts
from moltbot_server.store.redis_settings import Fitness, claim, judge, refusals
from moltbot_server.store.redis_takeover import Takeover
from moltbot_server.store.redis_usage import REMEMBERED, Row, addition, list_usage, row_of
from moltbot_server.turns import Message, Session, SessionKey, TurnKey, encode

log = logging.getLogger(__name__)

_TAKEN: dict[int, Taken] = {1: None, 0: Moved(), -1: Deleted()}  # by what the scripts that accept turns answer
_STEP = 1000
"""Turns that one script deletes at most: Redis does nothing else meanwhile."""
_PRUNED = 100
_START = 5.0
"""Seconds that Redis may take to be there when the store is opened."""
_TAKEN_OVER = TurnInterrupted("another core has taken this turn over; follow it there")


class RedisStore:
    """A `Store` in Redis, for several nodes."""

    shared = True

    def __init__(
        self,
        *,
        host: str,
        port: int,
        password: str = "",
        database: int = 0,
        prefix: str = "moltbot",
        tls: bool = False,
        advertised: str = "",
        lease: float = LEASE,
        key: str = "",
    ) -> None:
        """`advertised` is where nodes of this machine reach this one, if by a way of their own; `lease` is in seconds.

        `key` opens this node, which is refused where others know another one. Nothing is connected before `open`.
        """
        self.node = ""
        self._advertised = advertised
        self.address = f"{host}:{port}"
        self.prefix = prefix
        self._lease_seconds = lease
        self._key = key
        self._options: dict[str, Any] = {
            "host": host,
            "port": port,
            "password": password or None,
            "db": database,
            "protocol": 2,
            "socket_timeout": None,
            "socket_connect_timeout": None,
            "client_name": "moltbot",
            # Lines try again by themselves, and know what may be sent twice.
            "retry": Retry(NoBackoff(), 0),
        }
        self._tls = tls
        self._presence = Presence(self.address)
        self._scripts = scripts()
        self._known: set[str] = set()
        self._closed = True

    async def open(self, *, fit: bool = True, join: bool = True) -> None:
        """Connect, make sure that Redis is set up to keep things, and be among its nodes.

        Without `fit`, one that is not set up well is opened too, to be looked at. Without `join`, nothing is written,
        so one that takes no writes can be read.

        Raises:
            StorageUnavailable: Redis cannot be reached, is set up so that it would lose what it is given, or has nodes
                that know another key.
        """
        self.node = secrets.token_hex(8)
        if not self._tls and not is_loopback(self._options["host"]):
            log.warning("conversations pass the network to Redis unencrypted", extra={"at": self.address})
        self._presence = Presence(self.address)
        self._writing, self._reading = (
            RedisLine(self.connection, scripts=loading(), presence=self._presence) for _ in range(2)
        )
        for line in (self._writing, self._reading):
            line.when_connected(self._known.clear)
        self._probe = WriteProbe(self._writing, self._presence, self.prefix)
        self._fitness = Fitness(self._reading, self.prefix, self.address)
        try:
            await self._writing.open(_START)
            await self._reading.open(_START)
            if fit:
                await self._fitness.require()
            data = await claim(self._reading, self.prefix, self.address) if join else ""
            self._lease = NodeLease(
                self._reading,
                prefix=self.prefix,
                node=self.node,
                address=self._advertised,
                seconds=self._lease_seconds,
                fingerprint=await fingerprint(self.ask, self.prefix, self._key) if join else "",
                redis=self.address,
            )
            if join:
                await self._lease.join()
                self._fitness.watch(data)
        except BaseException as problem:
            self._probe.end()
            await self._reading.close()
            await self._writing.close()
            if isinstance(problem, StorageUnavailable | StorageFull):
                raise self._not_opened(problem) from None
            raise
        self.outbox = RedisOutbox(self, self._reading, self._writing)
        self._takeover = Takeover(self._lease, self._reading, self._writing, self.prefix)
        self._closed = False

    def _not_opened(self, problem: StorageUnavailable | StorageFull) -> MoltBotError:
        """Return what to say to whoever starts a core: where Redis is, and what to do."""
        away = self._presence.away
        if away is not None and not self._presence.is_lost:
            return type(problem)(
                f"{away.where} cannot be the store now: {away.problem}", retry_after=problem.retry_after
            )
        if problem.retry_after is not None:
            text = f"Redis at {self.address} does not answer ({problem.message})"
            return StorageUnavailable(
                f"{text}: start it, or correct store.host, store.port and store.tls", retry_after=problem.retry_after
            )
        if self.address in problem.message:
            return problem
        return StorageUnavailable(f"{problem.message}: Redis at {self.address}")

    @property
    def away(self) -> Away | None:
        """Why Redis cannot be reached, or takes no writes, now; None while all is well, as far as is known."""
        return self._presence.away

    @property
    def warnings(self) -> Sequence[str]:
        """That Redis has come back empty, and what it is set to that may lose turns."""
        return self._fitness.warnings

    async def close(self) -> None:
        """Write what waits, then leave."""
        if self._closed:
            return
        self._closed = True
        self._probe.end()
        await self._fitness.end()
        # What waits is still this node's; after the lease it is anybody's.
        await self._writing.close()
        await self._lease.leave()
        await self._reading.close()

    async def address_of(self, node: str) -> str:
        """Return the address at which a node is reached; empty when it is gone."""
        return await self._lease.address_of(node)

    async def advertise(self, address: str) -> None:
        """Tell other nodes at which address of the network this one is reached."""
        await self._lease.advertise(address)

    def connection(self) -> AbstractConnection:
        """Return a connection that is not open yet."""
        return SSLConnection(**self._options) if self._tls else Connection(**self._options)

    # --- writing -------------------------------------------------------------------------------------------------

    def accept(self, turn: NewTurn) -> Pending[Taken]:
        """Store a turn; answer None, or the earlier turn of the same request_id, or who has the session."""
        return self._accept("accept", turn)

    def reaccept(self, turn: NewTurn) -> Pending[Taken]:
        """Store a turn in the place of a failed one with its request_id; one that another node runs stays."""
        return self._accept("reaccept", turn)

    def _accept(self, script: str, turn: NewTurn) -> Pending[Taken]:
        workspace, session = turn.key.session.workspace, turn.key.session.session
        withdrawal = self.run("withdraw", workspace, self.node, session, turn.key.ordinal, turn.request_id)

        def read(replies: list[Any]) -> Taken:
            reply = replies[-1]
            if isinstance(reply, int):
                return _TAKEN[reply]
            if isinstance(reply, bytes):
                return Elsewhere(node=reply.decode())
            return turn_from(key_of(workspace, reply[0]), reply[1:])

        command = self.run(script, workspace, *accept_arguments(self.node, turn))
        return self._writing.put(Call(*self._introduce(workspace), command, read=read, undo=(withdrawal,)))

    def hurry(self, key: TurnKey) -> None:
        """Do nothing: nothing waits."""

    def append(self, entries: Sequence[JournalEntry]) -> Pending[Collection[TurnKey]]:
        """Keep what happened in turns that run, and answer which of them do not, or not here any more."""
        by_workspace: dict[str, list[JournalEntry]] = {}
        for entry in entries:
            if entry.events:
                by_workspace.setdefault(entry.key.session.workspace, []).append(entry)
        commands = []
        for workspace, group in by_workspace.items():
            told: list[str | bytes | int] = [self.node]
            for entry in group:
                first = entry.events[0].sequence
                # What is sent again with more behind it has a higher id than before, and is kept beside it.
                told += (name_of(entry.key), entry.epoch, f"{first}-{len(entry.events)}", encode(entry.events))
            commands.append(self.run("append", workspace, *told))

        def read(replies: list[Any]) -> Collection[TurnKey]:
            groups = zip(by_workspace.values(), replies, strict=True)
            return [group[place].key for group, lost in groups for place in lost]

        return self._writing.put(Call(*commands, read=read, patient=True), gathered=True)

    async def take_over(self) -> Sequence[Orphan]:
        """Take over the turns of nodes that are gone."""
        return await self._takeover.take_over()

    def finish(self, turn: EndedTurn) -> Pending[None]:
        """Store how a turn ended."""
        workspace = turn.key.session.workspace
        command = self.run("finish", workspace, *finish_arguments(self.node, turn))
        return self._writing.put(
            Call(command, read=lambda replies: None if replies[0] == 1 else _TAKEN_OVER, patient=True)
        )

    async def reset_session(self, key: SessionKey) -> Elsewhere | None:
        """Delete a session's turns; its ordinals go on."""
        done = await self._forget(key, "reset")
        return done if isinstance(done, Elsewhere) else None

    async def delete_session(self, key: SessionKey) -> Elsewhere | bool:
        """Delete a session and its turns."""
        done = await self._forget(key, "delete")
        return done if isinstance(done, Elsewhere) else done > 0

    async def _forget(self, key: SessionKey, what: str) -> Elsewhere | int:
        lately = time.time() - KEEP_REQUESTS
        command = self.run("forget", key.workspace, key.session, _STEP, what, self.node, lately, int(KEEP_REQUESTS))
        while (done := await self._writing.put(Call(command, read=_only, repeatable=what != "delete"))) == 2:
            continue
        return Elsewhere(node=done.decode()) if isinstance(done, bytes) else int(done)

    async def prune(self, before: float, *, ephemeral: bool = True) -> int:
        """Delete sessions last used before a time: those of stateless callers, or the others."""
        pruned = 0
        for workspace in await self.workspaces():
            index = self.base(workspace) + ("ephemeral" if ephemeral else "listed")
            old = await self._ask(("ZRANGEBYSCORE", index, f"({-before!r}", "+inf", "LIMIT", 0, _PRUNED))
            for session in old:
                key = SessionKey(workspace=workspace, session=session.decode())
                pruned += await self._forget(key, repr(before)) == 1
        return pruned

    def add_usage(self, rows: Sequence[UsageRow]) -> Pending[None]:
        """Add rows to what was used."""
        adding, taking_back = [], []
        for workspace in {row.workspace for row in rows}:
            name, told = addition(row for row in rows if row.workspace == workspace)
            adding += [*self._introduce(workspace), self.run("add_usage", workspace, name, 1, REMEMBERED, *told)]
            taking_back.append(self.run("add_usage", workspace, name, -1, REMEMBERED, *told))
        return self._writing.put(Call(*adding, read=lambda _: None, patient=True, undo=taking_back))

    async def forget_usage(self, before: str) -> None:
        """Delete the usage of days before one."""
        for workspace in await self.workspaces():
            base = self.base(workspace)
            days = await self._ask(("ZRANGEBYLEX", f"{base}days", "-", f"({before}"))
            commands: list[Command] = [("UNLINK", f"{base}used:{day.decode()}") for day in days]
            commands += [("ZREM", f"{base}days", day) for day in days]
            if commands:
                await self._writing.put(Call(*commands, read=lambda _: None))

    # --- reading -------------------------------------------------------------------------------------------------

    async def find_turn(self, key: TurnKey) -> StoredTurn | None:
        """Return a turn with its events, or None."""
        command = ("HMGET", f"{self.base(key.session.workspace)}t:{name_of(key)}", *TURN_FIELDS)
        return await self._reading.put(Call(command, read=lambda replies: turn_from(key, replies[0])))

    async def load_session(self, key: SessionKey, limit: int) -> StoredSession | None:
        """Return what a session needs to go on, or None."""
        command = self.run("load", key.workspace, key.session, limit, self.node)
        return await self._reading.put(Call(command, read=lambda replies: loaded_from(key, replies[0])))

    async def get_session(self, key: SessionKey) -> Session | None:
        """Return a session as it is listed, or None."""
        command = ("HMGET", f"{self.base(key.workspace)}s:{key.session}", *SESSION_FIELDS)
        return await self._reading.put(Call(command, read=lambda replies: session_from(key, replies[0])))

    async def list_sessions(
        self, workspace: str, *, user: str, channel: str, before: tuple[float, str] | None, limit: int
    ) -> Sequence[Session]:
        """Return sessions, last used first."""
        base = self.base(workspace)
        return await list_sessions(
            self._reading, base, workspace, user=user, channel=channel, before=before, limit=limit
        )

    async def list_messages(self, key: SessionKey, *, after: tuple[int, int], limit: int) -> Sequence[Message]:
        """Return a session's messages, oldest first."""
        command = self.run("messages", key.workspace, key.session, after[0], limit + 1)

        def read(replies: list[Any]) -> list[Message]:
            messages = [message for turn in replies[0] for message in messages_from(key, turn)]
            first = f"{after[0]}.{after[1]}"
            start = next((i + 1 for i, message in enumerate(messages) if message.id == first), 0)
            return messages[start : start + limit]

        return await self._reading.put(Call(command, read=read))

    async def list_usage(self, query: UsageQuery, *, after: UsagePlace | None, limit: int) -> UsagePage:
        """Return what was used."""

        def rows(workspace: str) -> AsyncIterator[Row]:
            return self.usage_rows(workspace, query.first, query.last)

        return await list_usage(query, self.workspaces, rows, after=after, limit=limit)

    async def usage_rows(self, workspace: str, first: str, last: str) -> AsyncIterator[Row]:
        """Yield the usage of a workspace in the days from one to another."""
        base = self.base(workspace)
        for day in await self._ask(("ZRANGEBYLEX", f"{base}days", f"[{first}", f"[{last}")):
            cursor = b"0"
            seen: set[bytes] = set()
            while True:
                cursor, found = await self._ask(("HSCAN", f"{base}used:{day.decode()}", cursor, "COUNT", 1000))
                for field, sums in zip(found[::2], found[1::2], strict=True):
                    if field not in seen:  # a scan may tell one twice
                        seen.add(field)
                        yield row_of(day.decode(), field, sums)
                if cursor == b"0":
                    break

    # --- inside --------------------------------------------------------------------------------------------------

    async def workspaces(self) -> Sequence[str]:
        """Return the workspaces that have anything."""
        return sorted(name.decode() for name in await self._ask(("SMEMBERS", f"{self.prefix}:workspaces")))

    def base(self, workspace: str) -> str:
        """Return how the keys of a workspace begin."""
        return base_of(self.prefix, workspace)

    async def ask(self, *commands: Command) -> list[Any]:
        """Return what Redis replies to commands that change nothing.

        Raises:
            StorageUnavailable: Redis does not answer, or refuses.
        """
        return await self._reading.put(Call(*commands, read=list))

    async def write(self, *commands: Command) -> list[Any]:
        """Return what Redis replies to commands that may be carried out twice.

        Raises:
            StorageUnavailable: Redis does not answer, or refuses.
        """
        return await self._writing.put(Call(*commands, read=list))

    async def judge(self) -> list[Finding]:
        """Return what is wrong with how Redis is set up, and why it takes no writes, where it takes none.

        Raises:
            StorageUnavailable: Redis does not answer.
        """
        findings = await judge(self._reading, self.prefix)
        if not any(finding.weight == "grave" for finding in findings):
            findings += await refusals(self._reading, self.prefix)
        return findings

    async def _ask(self, command: Command) -> Any:
        return (await self.ask(command))[0]

    def run(self, script: str, workspace: str, *arguments: Argument) -> Command:
        """Return the command that runs a script on a workspace."""
        return self._scripts[script].on(self.base(workspace), *arguments)

    def _introduce(self, workspace: str) -> Sequence[Command]:
        """Return what makes a workspace known, for whoever goes through all of them."""
        if workspace in self._known:
            return ()
        self._known.add(workspace)
        return (("SADD", f"{self.prefix}:workspaces", workspace),)


def _only(replies: list[Any]) -> Any:
    return replies[0]
