"""The embedded store: one SQLite file in WAL mode, one thread that writes in groups, one that reads.

A turn is one row: its question is written when it is accepted, its answer and events when it has ended. What it records
meanwhile is in files beside the database.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import sqlite3
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import msgspec

from moltbot_server.errors import StorageFull, StorageUnavailable
from moltbot_server.store import (
    Elsewhere,
    EndedTurn,
    NewTurn,
    Pending,
    StoredSession,
    StoredTurn,
    Taken,
    UsagePage,
    UsagePlace,
    UsageQuery,
    UsageRow,
)
from moltbot_server.store.patience import Patience
from moltbot_server.store.protocol import KEEP_REQUESTS, Away, JournalEntry, Orphan
from moltbot_server.store.reader import GroupReader
from moltbot_server.store.sqlite_at_once import Row, set_up
from moltbot_server.store.sqlite_journal import take_over
from moltbot_server.store.sqlite_journal_files import JournalFiles, folder_of
from moltbot_server.store.sqlite_lock import DatabaseLock
from moltbot_server.store.sqlite_nodes import Pen, SqliteNodes
from moltbot_server.store.sqlite_outbox import SqliteOutbox
from moltbot_server.store.sqlite_presence import WritePresence
from moltbot_server.store.sqlite_pruning import prune_requests, prune_sessions
from moltbot_server.store.sqlite_rows import TURN_COLUMNS, read_messages, session_of, turn_of
from moltbot_server.store.sqlite_schema import SCHEMA, SCHEMA_VERSION, STEPS, unknown_schema
from moltbot_server.store.sqlite_sessions import CATCH_UP, Places
from moltbot_server.store.sqlite_turns import TAKEN_OVER, TurnWriter
from moltbot_server.store.sqlite_usage import add_usage, forget_usage, read_usage
from moltbot_server.store.sqlite_use import LastUse
from moltbot_server.store.writer import GroupWriter, storage_error, unusable
from moltbot_server.turns import Message, Session, SessionKey, TextDelta, TurnKey

_LOAD = """
SELECT base_ordinal, (SELECT max(ordinal) FROM turns WHERE workspace = ?1 AND session = ?2), version
FROM sessions WHERE workspace = ?1 AND id = ?2
"""
_MESSAGE_COLUMNS = "ordinal, question, answer, model, create_time, end_time, finish"
_SESSION_COLUMNS = """s.workspace, s.id, s.title, s.user, s.channel, s.create_time, s.update_time,
(SELECT count(*) + count(answer) FROM turns t
 WHERE t.workspace = s.workspace AND t.session = s.id AND t.question <> x'90')"""


class SqliteStore:
    """A `Store` in one file."""

    warnings: Sequence[str] = ()

    def __init__(self, path: Path, *, address: str = "") -> None:
        """With an `address`, at which others reach this node, several processes share the file."""
        self._path = path
        self.nodes = SqliteNodes(path.parent / "run" / "nodes", address=address)
        self.shared = self.nodes.shared
        self._lock = DatabaseLock(path, alone=not self.shared)
        self._presence = WritePresence(path)
        self._places = Places(self.nodes.node, shared=self.shared)
        self._pen: Pen | None = None
        self._files = JournalFiles(folder_of(path), self.nodes.node)
        self._patience = Patience()
        self._used = LastUse()
        self._looked = False
        self._closed = False

    async def open(self) -> None:
        """Open the file, bring its schema up to date, and close the turns that a crash left running."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        reading, self._writing = await asyncio.to_thread(self._join)
        self._reader = GroupReader(reading)
        self._turns = TurnWriter(self.node, self._places, self._used)
        self._writer = GroupWriter(
            self._writing,
            self._turns.write,
            answered=self._answered,
            over=self._turns.over,
            at_once=self._turns.at_once,
            pen=self._pen,
            presence=self._presence,
        )
        self.outbox = SqliteOutbox(self._reader.read, self._writer.submit)

    async def close(self) -> None:
        """Write what waits, then close the file."""
        if self._closed:
            return
        if self._used:
            # A full disk cannot keep the store from closing; the next one to open it tells these times from the turns.
            await asyncio.gather(self._writer.submit(self._used.write), return_exceptions=True)
        await self._writer.close()
        await self._reader.close()
        self._let_go()
        self._closed = True

    @property
    def node(self) -> str:
        """The name of this node."""
        return self.nodes.node

    @property
    def away(self) -> Away | None:
        """Why the file takes no writes now; None while it does, as far as is known."""
        return self._presence.away

    async def address_of(self, node: str) -> str:
        """Return the address at which a node is reached; empty when it is gone."""
        return self.nodes.address_of(node)

    async def advertise(self, address: str) -> None:
        """Do nothing: nodes of a file are on one machine, and have told their sockets when they opened it."""

    # --- writing -------------------------------------------------------------------------------------------------

    def accept(self, turn: NewTurn) -> Pending[Taken]:
        """Store a turn; answer None, or the earlier turn of the same request_id, or who has the session."""
        self._files.begin(turn.key)
        return self._writer.submit_row(turn, patience=self._patience.begin(turn.key, len(self._files)))

    def reaccept(self, turn: NewTurn) -> Pending[Taken]:
        """Store a turn in the place of a failed one with its request_id; one that another node runs stays."""
        self._files.begin(turn.key)
        return self._writer.submit(lambda connection: self._turns.rewrite(connection, turn), row=turn)

    def hurry(self, key: TurnKey) -> None:
        """Let a turn that is being accepted wait no longer for others to be stored with: it has something to show."""
        self._patience.told(key)
        self._writer.hurry()

    def append(self, entries: Sequence[JournalEntry]) -> Pending[Collection[TurnKey]]:
        """Keep what happened in turns that run, and answer which of them do not, or not here any more."""
        told = tuple(entry for entry in entries if entry.events)
        for entry in told:
            if any(isinstance(event.kind, TextDelta) for event in entry.events):
                self._patience.told(entry.key)
        if told and not self._files.append(told):
            return self._writer.submit_row(told)
        kept: Pending[Collection[TurnKey]] = Pending()
        kept.settle(())
        return kept

    async def take_over(self) -> Sequence[Orphan]:
        """Take over the turns that cores which are gone left running."""
        left = self.nodes.left()
        if self._looked and self.shared and not left:
            if self._used.is_late:
                await self._flush_used()  # nothing was stored since; the other nodes list sessions too
            return ()
        found: tuple[list[Orphan], Collection[str]] = await self._writer.submit(
            lambda connection: take_over(connection, self.node, self.nodes.gone, self._files)
        )
        orphans, taken = found
        self._looked = True
        self.nodes.strike(left)
        self._files.forget(taken)
        for orphan in orphans:
            self._files.begin(orphan.turn.key, orphan.epoch)
            self._turns.kept_in_table(orphan.turn.key)
        return orphans

    def finish(self, turn: EndedTurn) -> Pending[None]:
        """Store how a turn ended."""
        return self._writer.submit_row(turn)

    async def reset_session(self, key: SessionKey) -> Elsewhere | None:
        """Delete a session's turns; its ordinals go on."""
        names = (key.workspace, key.session)
        answer: Elsewhere | None = await self._writer.submit(lambda connection: self._places.reset(connection, names))
        return answer

    async def delete_session(self, key: SessionKey) -> Elsewhere | bool:
        """Delete a session and its turns."""
        names = (key.workspace, key.session)

        def write(connection: sqlite3.Connection) -> Elsewhere | bool:
            self._used.forget(names)
            return self._places.delete(connection, names)

        answer: Elsewhere | bool = await self._writer.submit(write)
        return answer

    async def prune(self, before: float, *, ephemeral: bool = True) -> int:
        """Delete sessions last used before a time: those of stateless callers, or the others."""

        def write(connection: sqlite3.Connection) -> int:
            self._used.write(connection)
            return prune_sessions(connection, before, ephemeral=ephemeral)

        if ephemeral:
            oldest = time.time() - KEEP_REQUESTS
            while await self._writer.submit(lambda connection: prune_requests(connection, oldest)):
                continue
        return int(await self._writer.submit(write))

    def add_usage(self, rows: Sequence[UsageRow]) -> Pending[None]:
        """Add rows to what was used."""
        return self._writer.submit(lambda connection: add_usage(connection, rows))

    async def forget_usage(self, before: str) -> None:
        """Delete the usage of days before one."""
        await self._writer.submit(lambda connection: forget_usage(connection, before))

    # --- reading -------------------------------------------------------------------------------------------------

    async def find_turn(self, key: TurnKey) -> StoredTurn | None:
        """Return a turn with its events, or None."""
        return await self._reader.read(
            lambda connection: turn_of(
                connection.execute(
                    f"SELECT {TURN_COLUMNS} FROM turns WHERE workspace = ? AND session = ? AND ordinal = ?",
                    (key.session.workspace, key.session.session, key.ordinal),
                ).fetchone()
            ),
            of=key.session,
        )

    async def load_session(self, key: SessionKey, limit: int) -> StoredSession | None:
        """Return what a session needs to go on, or None."""
        names = (key.workspace, key.session)

        def read(connection: sqlite3.Connection) -> StoredSession | None:
            row = connection.execute(_LOAD, names).fetchone()
            if row is None:
                return None
            base, last, version = row
            last = max(base, last or 0)
            runs = self._places.runs(connection, names)
            loaded = StoredSession(last_ordinal=last, messages=(), version=version + last, running_on=runs)
            if self.shared and runs not in ("", self.node):
                return loaded
            turns = connection.execute(
                f"SELECT {_MESSAGE_COLUMNS} FROM turns WHERE workspace = ? "
                "AND session = ? AND state IN ('completed', 'cancelled') "
                "AND (answer IS NOT NULL OR finish = 'joined') "
                "ORDER BY ordinal DESC LIMIT ?",
                (*names, limit),
            ).fetchall()
            messages = [message for turn in reversed(turns) for message in read_messages(*names, turn)]
            return msgspec.structs.replace(loaded, messages=tuple(messages))

        return await self._reader.read(read, of=key)

    async def get_session(self, key: SessionKey) -> Session | None:
        """Return a session as it is listed, or None."""

        def read(connection: sqlite3.Connection) -> Session | None:
            row = connection.execute(
                f"SELECT {_SESSION_COLUMNS} FROM sessions s WHERE workspace = ? AND id = ? AND ephemeral = 0",
                (key.workspace, key.session),
            ).fetchone()
            if row is None:
                return None
            session = session_of(*row)
            used = self._used.of((key.workspace, key.session))
            return msgspec.structs.replace(session, update_time=max(session.update_time, used))

        return await self._reader.read(read, of=key)

    async def list_sessions(
        self, workspace: str, *, user: str, channel: str, before: tuple[float, str] | None, limit: int
    ) -> Sequence[Session]:
        """Return sessions, last used first."""
        await self._flush_used()
        where, values = ["workspace = ?", "ephemeral = 0"], [workspace]
        for column, value in (("user", user), ("channel", channel)):
            if value:
                where.append(f"{column} = ?")
                values.append(value)
        if before is not None:
            where.append("(update_time < ? OR (update_time = ? AND id > ?))")
        arguments = [*values, *((before[0], before[0], before[1]) if before else ()), limit]
        chosen = " AND ".join(where)
        query = f"SELECT {_SESSION_COLUMNS} FROM sessions s WHERE {chosen} ORDER BY update_time DESC, id LIMIT ?"
        return await self._reader.read(
            lambda connection: [session_of(*row) for row in connection.execute(query, arguments).fetchall()]
        )

    async def list_messages(self, key: SessionKey, *, after: tuple[int, int], limit: int) -> Sequence[Message]:
        """Return a session's messages, oldest first."""

        def read(connection: sqlite3.Connection) -> list[Message]:
            rows = connection.execute(
                f"SELECT {_MESSAGE_COLUMNS} FROM turns WHERE workspace = ? "
                "AND session = ? AND ordinal >= ? AND question <> x'90' ORDER BY ordinal LIMIT ?",
                (key.workspace, key.session, after[0], limit + 1),
            ).fetchall()
            messages = [message for row in rows for message in read_messages(key.workspace, key.session, row)]
            first = f"{after[0]}.{after[1]}"
            start = next((i + 1 for i, message in enumerate(messages) if message.id == first), 0)
            return messages[start : start + limit]

        return await self._reader.read(read, of=key)

    async def list_usage(self, query: UsageQuery, *, after: UsagePlace | None, limit: int) -> UsagePage:
        """Return what was used."""
        if self._closed:
            raise StorageUnavailable("the store is closed")
        try:
            return await asyncio.to_thread(read_usage, self._path, query, after=after, limit=limit)
        except sqlite3.Error as error:
            raise storage_error(error) from None

    # --- inside --------------------------------------------------------------------------------------------------

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, isolation_level=None, check_same_thread=False, timeout=5.0, cached_statements=256
        )
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if not 0 <= version <= SCHEMA_VERSION:
            connection.close()
            newer = f"{self._path} was written by a newer release (schema {version}, this one reads {SCHEMA_VERSION})"
            raise StorageUnavailable(
                f"{newer}: start that release, or put a backup from before the upgrade in its place"
                if version > 0
                else f"{self._path} cannot be used: {unknown_schema(version)}"
            )
        connection.executescript(
            # Turns of many sessions touch pages all over the file; small pages halve what a commit writes.
            "PRAGMA page_size = 2048; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;"
            "PRAGMA wal_autocheckpoint = 8000;"
            "PRAGMA trusted_schema = OFF; PRAGMA cell_size_check = ON;"
        )
        return connection

    def _join(self) -> tuple[sqlite3.Connection, sqlite3.Connection]:
        """Be among the nodes of the file, or its only one, and prepare it while none of them does."""
        try:
            self._lock.take()
            if self.shared:
                self.nodes.join()
                self._pen = Pen(self._path.parent / "run")
            self._files.open()
        except OSError as error:
            self._let_go()
            place = error.filename or self._path.parent / "run"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageFull(f"{place} cannot be used: the disk is full", retry_after=5.0) from error
            raise StorageUnavailable(f"{place} cannot be used: {error.strerror}") from error
        try:
            with self._pen or contextlib.nullcontext():
                return self._prepare()
        except BaseException:
            self._let_go()
            raise

    def _let_go(self) -> None:
        pen, self._pen = self._pen, None
        if pen is not None:
            pen.close()
        self._files.close()
        self.nodes.leave()
        self._lock.release()

    def _prepare(self) -> tuple[sqlite3.Connection, sqlite3.Connection]:
        """Return a connection to read with and one to write with."""
        try:
            # SQLite gives the files beside the database its mode, so it has to be right before they are made.
            self._path.touch(mode=0o600)
            self._path.chmod(0o600)
            connection, writing = self._connect(), self._connect()
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            steps = "".join(STEPS[step] for step in range(version, SCHEMA_VERSION)) if version else SCHEMA
            if version != SCHEMA_VERSION:
                connection.executescript(f"BEGIN; {steps} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
            connection.execute(CATCH_UP)
            set_up(writing)
        except sqlite3.Error as error:
            raise unusable(self._path, error) from error
        return connection, writing

    def _answered(self, row: Row, outcome: Any) -> None:
        """Let go what a turn recorded that was not stored, or whose end is; runs on the loop's thread."""
        if isinstance(row, EndedTurn) or (isinstance(row, NewTurn) and outcome is not None):
            self._patience.end(row.key)
        if outcome is TAKEN_OVER:
            self._files.look()
        elif isinstance(row, EndedTurn) and outcome is None:
            self._files.end(row.key)
        elif isinstance(row, NewTurn) and outcome is not None:
            self._files.end_soon(row.key)

    async def _flush_used(self) -> None:
        if self._used:
            await self._writer.submit(self._used.write)
