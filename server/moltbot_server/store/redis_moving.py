"""What a Redis store holds, record by record."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from moltbot_server.store.damage import reading_delivery, reading_turn
from moltbot_server.store.moving import (
    NOWHERE,
    DeletedRecord,
    DeliveryRecord,
    Record,
    SessionRecord,
    TurnRecord,
    UsageRecord,
)
from moltbot_server.store.redis import RedisStore
from moltbot_server.store.redis_line import Argument, Command
from moltbot_server.store.redis_rows import key_of
from moltbot_server.store.redis_usage import packed, usage_row
from moltbot_server.store.sealed import Sealed
from moltbot_server.turns import Completed, Event, Failed, Part, TurnInput, TurnKey, TurnState, encode

_STEP = 200
_SCANNED = 1000
_SESSION = ("title", "user", "channel", "create", "update", "base", "ephemeral")
_DELIVERY = ("s", "c", "a", "t", "r", "v", "n", "k", "b", "e", "g", "m")
_TURN = ("r", "d", "s", "c", "e", "m", "f", "q", "a", "v", "x", "l", "p")

_parts: Sealed[tuple[Part, ...]] = Sealed(tuple[Part, ...])
_events: Sealed[tuple[Event, ...]] = Sealed(tuple[Event, ...])
_ending: Sealed[Completed | Failed] = Sealed(Completed | Failed)
_rest: Sealed[TurnInput] = Sealed(TurnInput)


class RedisRecords:
    """The records of an open store."""

    def __init__(self, store: RedisStore) -> None:
        self._store = store

    async def count(self) -> int:
        """Return about how many records there are."""
        total = 0
        for workspace in await self._store.workspaces():
            base = self._store.base(workspace)
            names = ("listed", "ephemeral", "delivered", "dead", "days")
            total += sum(
                await self._store.ask(*(("ZCARD", base + name) for name in names), ("HLEN", f"{base}requests"))
            )
        return total

    async def read(self) -> AsyncIterator[Record]:
        """Yield all records; each turn is as it is at one moment."""
        for workspace in await self._store.workspaces():
            async for session in self.names(workspace, "s:"):
                (found,) = await self._store.ask(("HMGET", f"{self._store.base(workspace)}s:{session}", *_SESSION))
                if found[0] is not None:
                    yield _session_of(workspace, session, found)
            async for session in self.names(workspace, "o:"):
                async for turn in self._turns(workspace, session):
                    yield turn
            async for request in self.names(workspace, "x:"):
                (left,) = await self._store.ask(("PTTL", f"{self._store.base(workspace)}x:{request}"))
                if left > 0:
                    yield DeletedRecord(workspace=workspace, request_id=request, until=time.time() + left / 1000)
            async for delivery in self._deliveries(workspace):
                yield delivery
            async for row in self._store.usage_rows(workspace, "", "\x7f"):
                yield UsageRecord(row=usage_row(workspace, row))

    async def names(self, workspace: str, kind: str) -> AsyncIterator[str]:
        """Yield the names of keys of one kind in a workspace, without what they all begin with."""
        begin, cursor = f"{self._store.base(workspace)}{kind}".encode(), b"0"
        seen: set[bytes] = set()
        while True:
            scan: Command = ("SCAN", cursor, "MATCH", begin + b"*", "COUNT", _SCANNED)
            ((cursor, found),) = await self._store.ask(scan)
            for name in found:
                if name not in seen:  # a scan may tell one twice
                    seen.add(name)
                    yield name.removeprefix(begin).decode()
            if cursor == b"0":
                return

    async def _turns(self, workspace: str, session: str) -> AsyncIterator[TurnRecord]:
        base, start = self._store.base(workspace), 0
        while True:
            (names,) = await self._store.ask(("ZRANGE", f"{base}o:{session}", start, start + _STEP - 1))
            for name in names:
                reading = self._store.run("export_turn", workspace, name, *_TURN)
                ((fields, entries),) = await self._store.ask(reading)
                if fields[0] is not None:
                    key = key_of(workspace, name)
                    with reading_turn(workspace, key.session.session, key.ordinal):
                        turn = _turn_of(key, fields, entries)
                    yield turn
            if len(names) < _STEP:
                return
            start += _STEP

    async def _deliveries(self, workspace: str) -> AsyncIterator[DeliveryRecord]:
        """Yield deliveries, those of a place in their order."""
        base = self._store.base(workspace)
        waiting = [("LRANGE", f"{base}q:{place}", 0, -1) async for place in self.names(workspace, "q:")]
        over = (("ZRANGE", f"{base}{kind}", 0, -1) for kind in ("delivered", "dead"))
        for found in await self._store.ask(*waiting, *over):
            for id in found:
                (fields,) = await self._store.ask(("HMGET", f"{base}d:{id.decode()}", *_DELIVERY))
                if fields[0] is not None:
                    with reading_delivery(workspace, id.decode()):
                        delivery = _delivery_of(workspace, id, fields)
                    yield delivery

    async def put(self, records: Sequence[Record]) -> int:
        """Store records that are not there yet."""
        commands: list[Command] = [
            ("SADD", f"{self._store.prefix}:workspaces", name) for name in {_workspace(record) for record in records}
        ]
        introduced = len(commands)
        for record in records:
            workspace = _workspace(record)
            if isinstance(record, SessionRecord):
                commands.append(self._store.run("restore_session", workspace, *_session_arguments(record)))
            elif isinstance(record, TurnRecord):
                commands.append(self._store.run("restore_turn", workspace, *_turn_arguments(record)))
            elif isinstance(record, DeletedRecord):
                place = f"{self._store.base(workspace)}x:{record.request_id}"
                commands.append(("SET", place, "", "NX", "PXAT", int(record.until * 1000)))
            elif isinstance(record, DeliveryRecord):
                commands.append(self._store.run("restore_delivery", workspace, *_delivery_arguments(record)))
            else:
                field, sums = packed(record.row)
                base, day = self._store.base(workspace), record.row.day
                commands += (("ZADD", f"{base}days", 0, day), ("HSETNX", f"{base}used:{day}", field, sums))
        replies = await self._store.write(*commands) if commands else []
        # Of the two commands for a row of usage, the second one says whether it is new.
        new, count = 0, introduced
        for record in records:
            count += 1 + isinstance(record, UsageRecord)
            new += bool(replies[count - 1])
        return new


def _workspace(record: Record) -> str:
    return record.row.workspace if isinstance(record, UsageRecord) else record.workspace


def _session_of(workspace: str, session: str, fields: Sequence[bytes]) -> SessionRecord:
    title, user, channel, create, update, base, ephemeral = (field.decode() for field in fields)
    return SessionRecord(
        workspace=workspace,
        session=session,
        title=title,
        user=user,
        channel=channel,
        create_time=float(create),
        update_time=float(update),
        base_ordinal=int(base),
        ephemeral=ephemeral == "1",
    )


def _session_arguments(record: SessionRecord) -> tuple[Argument, ...]:
    times = (record.create_time, record.update_time)
    told = (record.session, record.title, record.user, record.channel, *times, record.base_ordinal)
    return (*told, int(record.ephemeral))


def _turn_of(key: TurnKey, fields: Sequence[Any], entries: Sequence[Any]) -> TurnRecord:
    request, digest, state, create, end, model, finish, question, answer, events, rest, deadline, epoch = fields
    kept = {event.sequence: event for _, (_, entry) in entries for event in _events.decode(entry)}
    return TurnRecord(
        workspace=key.session.workspace,
        session=key.session.session,
        ordinal=key.ordinal,
        request_id=request.decode(),
        digest=digest,
        state=TurnState(state.decode()),
        create_time=float(create),
        end_time=float(end),
        model=model.decode(),
        finish=finish.decode(),
        question=_parts.decode(question) if question else (),
        answer=_parts.decode(answer) if answer else None,
        events=_events.decode(events) if events else (),
        rest=_rest.decode(rest) if rest else None,
        deadline=float(deadline or 0),
        epoch=int(epoch),
        kept=tuple(kept[sequence] for sequence in sorted(kept)),
    )


def _turn_arguments(record: TurnRecord) -> tuple[Argument, ...]:
    kept = record.kept
    return (
        NOWHERE, record.session, record.ordinal, record.request_id, record.digest, record.state.value,
        record.create_time, record.end_time, record.model, record.finish,
        encode(record.question) if record.question else b"",
        encode(record.answer) if record.answer is not None else b"",
        encode(record.events) if record.events else b"",
        encode(record.rest) if record.rest is not None else b"",
        record.deadline, record.epoch,
        f"{kept[0].sequence}-{len(kept)}" if kept else "",
        encode(kept) if kept else b"",
    )  # fmt: skip


def _delivery_of(workspace: str, id: bytes, fields: Sequence[Any]) -> DeliveryRecord:
    state, channel, address, turn, request, ending, created, attempt, spared, over, reason, message = fields
    key = key_of(workspace, turn)
    return DeliveryRecord(
        workspace=workspace,
        id=id.decode(),
        channel=channel.decode(),
        address=address.decode(),
        session=key.session.session,
        ordinal=key.ordinal,
        request_id=request.decode(),
        ending=_ending.decode(ending) if ending else None,
        create_time=int(created) / 1000,
        state=state.decode(),
        attempt=int(attempt),
        spared=int(spared),
        over_time=int(over or 0) / 1000,
        note=((message if state == b"delivered" else reason) or b"").decode(),
    )


def _delivery_arguments(record: DeliveryRecord) -> tuple[Argument, ...]:
    return (
        record.id, record.channel, record.address, f"{record.ordinal}:{record.session}", record.request_id,
        encode(record.ending) if record.ending is not None else b"", round(record.create_time * 1000), record.state,
        record.attempt, record.spared, round(record.over_time * 1000), record.note,
    )  # fmt: skip
