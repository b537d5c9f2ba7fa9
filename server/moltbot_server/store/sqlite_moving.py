"""What a SQLite store holds, record by record."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moltbot_server.errors import StorageDamaged
from moltbot_server.store.damage import is_damage, reading_delivery, reading_turn
from moltbot_server.store.moving import (
    NOWHERE,
    DeletedRecord,
    DeliveryRecord,
    Record,
    SessionRecord,
    TurnRecord,
    UsageRecord,
)
from moltbot_server.store.protocol import KEEP_REQUESTS, UsageRow
from moltbot_server.store.sealed import Sealed, seal
from moltbot_server.store.sqlite_damage import first_lost, remedy
from moltbot_server.store.sqlite_journal_files import folder_of, recorded
from moltbot_server.store.sqlite_rows import IS_DELETED, MARK, names_of
from moltbot_server.store.writer import storage_error
from moltbot_server.turns import Completed, Event, Failed, Part, TurnInput, TurnState, encode

_SESSION = "workspace, id, title, user, channel, create_time, update_time, base_ordinal, ephemeral"
_TURN = (
    "workspace, session, ordinal, request_id, digest, state, create_time, end_time, model, finish, question, answer, "
    "events, rest, deadline, epoch"
)
_USAGE = tuple(UsageRow.__struct_fields__)
_DELIVERY = tuple(DeliveryRecord.__struct_fields__)
_EMPTY = encode(())
_DELETED = f"SELECT workspace, request_id, create_time FROM turns WHERE {IS_DELETED} AND create_time > ?"

_parts: Sealed[tuple[Part, ...]] = Sealed(tuple[Part, ...])
_events: Sealed[tuple[Event, ...]] = Sealed(tuple[Event, ...])
_ending: Sealed[Completed | Failed] = Sealed(Completed | Failed)
_rest: Sealed[TurnInput] = Sealed(TurnInput)


class SqliteRecords:
    """The records of a database that has been opened as a store before, at its present schema."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def schema(self) -> int:
        """Return the version of the database's schema; 0 when nothing was ever stored. Nothing is changed."""
        with self._connected() as connection:
            return int(connection.execute("PRAGMA user_version").fetchone()[0])

    async def count(self) -> int:
        """Return how many records there are."""
        with self._connected() as connection:
            tables = ("sessions", f"turns WHERE NOT ({IS_DELETED})", "outbox", "usage")
            return sum(connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in tables)

    async def read(self) -> AsyncIterator[Record]:
        """Yield all records as they are at one moment."""
        with self._connected() as connection:
            connection.execute("BEGIN")
            kept = _recorded(self._path)
            for row in connection.execute(f"SELECT {_SESSION} FROM sessions"):
                yield _session_of(row)
            for row in connection.execute(f"SELECT {_TURN}, node FROM turns WHERE NOT ({IS_DELETED}) ORDER BY rowid"):
                with reading_turn(*row[:3]):
                    turn = _turn_of(connection, row, kept)
                yield turn
            for workspace, request, accepted in connection.execute(_DELETED, (time.time() - KEEP_REQUESTS,)):
                yield DeletedRecord(workspace=workspace, request_id=request, until=accepted + KEEP_REQUESTS)
            for row in connection.execute(f"SELECT {', '.join(_DELIVERY)} FROM outbox ORDER BY number"):
                with reading_delivery(*row[:2]):
                    delivery = _delivery_of(row)
                yield delivery
            for row in connection.execute(f"SELECT {', '.join(_USAGE)} FROM usage"):
                yield UsageRecord(row=UsageRow(**dict(zip(_USAGE, row, strict=True))))

    async def put(self, records: Sequence[Record]) -> int:
        """Store records that are not there yet, in one transaction."""
        with self._connected() as connection:
            connection.execute("BEGIN IMMEDIATE")
            new = sum(_put(connection, record) for record in records)
            connection.execute("COMMIT")
        return new

    @contextlib.contextmanager
    def _connected(self) -> Any:
        try:
            with contextlib.closing(sqlite3.connect(self._path, isolation_level=None, timeout=5.0)) as connection:
                yield connection
        except sqlite3.Error as error:
            raise (self._damaged(error) if is_damage(error) else storage_error(error)) from error

    def _damaged(self, error: sqlite3.Error) -> StorageDamaged:
        """Return what to say of a database that cannot be read whole: a turn that cannot be, and what to do."""
        lost = ""
        with (
            contextlib.suppress(sqlite3.Error),
            contextlib.closing(sqlite3.connect(self._path, isolation_level=None, timeout=5.0)) as connection,
        ):
            lost = first_lost(connection)
        told = f"{self._path} is damaged" + (f": {lost}" if lost else "")
        return StorageDamaged(f"{told}. `moltbot store check` names all that is lost; {remedy(error)}")


def _session_of(row: Sequence[Any]) -> SessionRecord:
    workspace, session, title, user, channel, create, update, base, ephemeral = row
    return SessionRecord(
        workspace=workspace,
        session=session,
        title=title,
        user=user,
        channel=channel,
        create_time=create,
        update_time=update,
        base_ordinal=base,
        ephemeral=bool(ephemeral),
    )


_Recorded = Mapping[tuple[Any, ...], Mapping[int, tuple[Event, ...]]]


def _recorded(path: Path) -> _Recorded:
    """Return what is in files beside the database: events by turn, node and epoch, and by the first one's number."""
    found: dict[tuple[Any, ...], dict[int, tuple[Event, ...]]] = {}
    for node, entry in recorded(folder_of(path)):
        found.setdefault((*names_of(entry.key), entry.epoch, node), {})[entry.events[0].sequence] = entry.events
    return found


def _turn_of(connection: sqlite3.Connection, row: Sequence[Any], recorded: _Recorded) -> TurnRecord:
    workspace, session, ordinal, request, digest, state, create, end, model, finish, *blobs, deadline, epoch, node = row
    question, answer, events, rest = blobs
    kept: dict[int, tuple[Event, ...]] = {}
    if state == TurnState.RUNNING:
        query = "SELECT sequence, events FROM journal WHERE workspace = ? AND session = ? AND ordinal = ?"
        names = (workspace, session, ordinal)
        kept = {first: _events.decode(entry) for first, entry in connection.execute(query, names)}
        kept |= recorded.get((*names, epoch, node), {})
    return TurnRecord(
        workspace=workspace,
        session=session,
        ordinal=ordinal,
        request_id=request.partition(MARK)[0],
        digest=digest,
        state=TurnState(state),
        create_time=create,
        end_time=end,
        model=model,
        finish=finish,
        question=_parts.decode(question),
        answer=None if answer is None else _parts.decode(answer),
        events=_events.decode(events) if events else (),
        rest=_rest.decode(rest) if rest else None,
        deadline=deadline,
        epoch=epoch,
        kept=tuple(event for first in sorted(kept) for event in kept[first]),
    )


def _put(connection: sqlite3.Connection, record: Record) -> int:
    """Store a record if it is not there; return 1 if it was not."""
    if isinstance(record, SessionRecord):
        return _put_session(connection, record)
    if isinstance(record, TurnRecord):
        return _put_turn(connection, record)
    if isinstance(record, DeletedRecord):
        return _put_deleted(connection, record)
    if isinstance(record, DeliveryRecord):
        return _put_delivery(connection, record)
    values = [getattr(record.row, name) for name in _USAGE]
    places = ", ".join("?" * len(_USAGE))
    return connection.execute(
        f"INSERT INTO usage ({', '.join(_USAGE)}) VALUES ({places}) ON CONFLICT DO NOTHING", values
    ).rowcount


def _put_session(connection: sqlite3.Connection, record: SessionRecord) -> int:
    names = (record.workspace, record.session)
    values = (*names, record.title, record.user, record.channel, record.create_time, record.update_time)
    new = connection.execute(
        f"INSERT INTO sessions ({_SESSION}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
        (*values, record.base_ordinal, int(record.ephemeral)),
    ).rowcount
    connection.execute(
        "UPDATE sessions SET base_ordinal = max(base_ordinal, ?) WHERE workspace = ? AND id = ?",
        (record.base_ordinal, *names),
    )
    return new


def _put_turn(connection: sqlite3.Connection, record: TurnRecord) -> int:
    names = (record.workspace, record.session, record.ordinal)
    # Of several turns with one request_id, the one with the question has it.
    request = record.request_id if record.question else f"{record.request_id}{MARK}{record.session}:{record.ordinal}"
    values = (*names, request, record.digest, record.state.value, record.create_time, record.end_time)
    answer = None if record.answer is None else seal(record.answer)
    blobs = (seal(record.question) if record.question else _EMPTY, answer)
    rest = None if record.rest is None else seal(record.rest)
    node = NOWHERE if record.state is TurnState.RUNNING else ""
    new = connection.execute(
        f"INSERT INTO turns ({_TURN}, node) VALUES ({', '.join('?' * 17)}) ON CONFLICT DO NOTHING",
        (*values, record.model, record.finish, *blobs, seal(record.events) if record.events else None, rest,
         record.deadline, record.epoch, node),
    ).rowcount  # fmt: skip
    if new and record.kept:
        connection.execute(
            "INSERT INTO journal (workspace, session, ordinal, sequence, events) VALUES (?, ?, ?, ?, ?)",
            (*names, record.kept[0].sequence, seal(record.kept)),
        )
    return new


def _put_deleted(connection: sqlite3.Connection, record: DeletedRecord) -> int:
    """Store an empty turn that has the request_id, in a session of its own that nobody can have."""
    values = (record.workspace, f"{MARK}{record.request_id}", record.request_id, record.until - KEEP_REQUESTS, _EMPTY)
    return connection.execute(
        "INSERT INTO turns (workspace, session, ordinal, request_id, digest, state, create_time, question) "
        "VALUES (?, ?, 0, ?, x'', 'failed', ?, ?) ON CONFLICT DO NOTHING",
        values,
    ).rowcount


def _delivery_of(row: Sequence[Any]) -> DeliveryRecord:
    fields = dict(zip(_DELIVERY, row, strict=True))
    ending = fields.pop("ending")
    return DeliveryRecord(ending=_ending.decode(ending) if ending else None, **fields)


def _put_delivery(connection: sqlite3.Connection, record: DeliveryRecord) -> int:
    """Store a delivery behind those of its place; what was leased can be leased anew."""
    fields = {name: getattr(record, name) for name in _DELIVERY}
    fields["ending"] = b"" if record.ending is None else seal(record.ending)
    place = (record.workspace, record.channel, record.address)
    waits = connection.execute(
        "SELECT 1 FROM outbox WHERE workspace = ? AND channel = ? AND address = ? AND state = 'open' LIMIT 1", place
    ).fetchone()
    due = record.create_time if record.state == "open" and not waits else None
    return connection.execute(
        f"INSERT INTO outbox ({', '.join(fields)}, due) VALUES ({', '.join('?' * len(fields))}, ?) "
        "ON CONFLICT DO NOTHING",
        (*fields.values(), due),
    ).rowcount
