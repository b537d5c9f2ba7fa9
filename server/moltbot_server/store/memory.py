"""A store that keeps nothing: sessions and turns in the memory of one core, gone when it ends.

For trials, for tests, and to measure what the stores that keep cost. All else is promised as by the others.
"""

from __future__ import annotations

import itertools
import secrets
import sqlite3
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TypeVar

from moltbot_server.errors import StorageUnavailable, TurnInterrupted
from moltbot_server.store.memory_rows import Conversation, KeptTurn
from moltbot_server.store.pending import Pending
from moltbot_server.store.protocol import (
    GUESSED,
    KEEP_REQUESTS,
    Deleted,
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
from moltbot_server.store.sqlite_outbox import OUTBOX_SCHEMA, SqliteOutbox, post, withdraw
from moltbot_server.store.sqlite_usage import USAGE_SCHEMA, add_usage, forget_usage, usage_page
from moltbot_server.turns import Message, Session, SessionKey, TurnKey, TurnState

T = TypeVar("T")

_PRUNED = 1000
_ENDED_WELL = (TurnState.COMPLETED, TurnState.CANCELLED)


class MemoryStore:
    """A `Store` that is lost with its process."""

    shared = False
    away = None
    warnings: Sequence[str] = ()

    def __init__(self) -> None:
        self.node = secrets.token_hex(8)
        self._sessions: dict[SessionKey, Conversation] = {}
        self._requests: dict[tuple[str, str], KeptTurn] = {}
        self._deleted: dict[tuple[str, str], float] = {}  # until when these requests are known, the oldest first
        self._database = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self._database.executescript(USAGE_SCHEMA + OUTBOX_SCHEMA)
        self.outbox = SqliteOutbox(self._run, self._run)
        self._is_open = False

    async def open(self) -> None:
        """Open the store; what it had when it was closed is there again."""
        self._is_open = True

    async def close(self) -> None:
        """Take nothing more."""
        self._is_open = False

    async def address_of(self, node: str) -> str:
        """Return nothing: there are no other nodes."""
        return ""

    async def advertise(self, address: str) -> None:
        """Do nothing: there are no other nodes."""

    # --- writing -------------------------------------------------------------------------------------------------

    def accept(self, turn: NewTurn) -> Pending[Taken]:
        """Store a turn; answer None, or the earlier turn of the same request_id."""
        return self._answered(self._accept(turn))

    def reaccept(self, turn: NewTurn) -> Pending[Taken]:
        """Store a turn in the place of a failed one with its request_id."""
        earlier = self._requests.get((turn.key.session.workspace, turn.request_id))
        if earlier is not None and earlier.state not in _ENDED_WELL and not self._is_old(turn):
            earlier.give_way()
            withdraw(self._database, turn.key.session.workspace, turn.request_id, turn.create_time)
            del self._requests[turn.key.session.workspace, turn.request_id]
        return self._answered(self._accept(turn))

    def _accept(self, turn: NewTurn) -> Taken:
        request = (turn.key.session.workspace, turn.request_id)
        earlier = self._requests.get(request)
        if earlier is not None:
            same = (earlier.row.key, earlier.row.create_time) == (turn.key, turn.create_time)
            return None if same else earlier.stored()
        if self._deleted.get(request, 0.0) > time.time():
            return Deleted()
        if self._is_old(turn):
            return Moved()
        session = self._sessions.get(turn.key.session)
        if session is None:
            session = self._sessions[turn.key.session] = Conversation(turn)
        elif turn.opens_session and not session.title:
            session.title = turn.title
        self._requests[request] = session.turns[turn.key.ordinal] = KeptTurn(turn)
        session.update_time = max(session.update_time, turn.create_time)
        return None

    def _is_old(self, turn: NewTurn) -> bool:
        """Tell whether a turn is of a session that is not there any more, or has a number that another turn has."""
        session = self._sessions.get(turn.key.session)
        if session is None:
            return turn.version not in (0, GUESSED)
        return turn.version == GUESSED or turn.key.ordinal in session.turns

    def hurry(self, key: TurnKey) -> None:
        """Do nothing: nothing waits."""

    def append(self, entries: Sequence[JournalEntry]) -> Pending[Collection[TurnKey]]:
        """Keep what happened in turns that run, and answer which of them do not, or not here any more."""
        left_out = []
        for entry in entries:
            turn = self._find(entry.key)
            if turn is None or turn.state is not TurnState.RUNNING or turn.epoch != entry.epoch:
                left_out.append(entry.key)
            elif entry.events:
                turn.journal[entry.events[0].sequence] = entry.events
        return self._answered(left_out)

    async def take_over(self) -> Sequence[Orphan]:
        """Take over the turns that run."""
        self._check_open()
        return [orphan for turn in list(self._requests.values()) if (orphan := turn.take_over()) is not None]

    def finish(self, turn: EndedTurn) -> Pending[None]:
        """Store how a turn ended."""
        found = self._find(turn.key)
        if found is None:
            return self._answered(None)
        if found.epoch != turn.epoch:
            taken = TurnInterrupted("another core has taken this turn over; follow it there")
            return self._answered(None, refusal=taken)
        found.finish(turn)
        post(self._database, turn)
        session = self._sessions[turn.key.session]
        session.update_time = max(session.update_time, turn.end_time)
        return self._answered(None)

    async def reset_session(self, key: SessionKey) -> None:
        """Delete a session's turns; its ordinals go on."""
        self._check_open()
        if (session := self._sessions.get(key)) is not None:
            self._delete_requests(session)
            session.reset()

    async def delete_session(self, key: SessionKey) -> bool:
        """Delete a session and its turns."""
        self._check_open()
        session = self._sessions.pop(key, None)
        if session is not None:
            self._delete_requests(session)
        return session is not None

    async def prune(self, before: float, *, ephemeral: bool = True) -> int:
        """Delete sessions last used before a time: those of stateless callers, or the others."""
        old = (
            key
            for key, session in self._sessions.items()
            if session.ephemeral is ephemeral and session.update_time < before
        )
        found = list(itertools.islice(old, _PRUNED))
        for key in found:
            self._forget_requests(self._sessions.pop(key))
        return len(found)

    def add_usage(self, rows: Sequence[UsageRow]) -> Pending[None]:
        """Add rows to what was used."""
        if self._is_open:
            add_usage(self._database, rows)
        return self._answered(None)

    async def forget_usage(self, before: str) -> None:
        """Delete the usage of days before one."""
        forget_usage(self._database, before)

    # --- reading -------------------------------------------------------------------------------------------------

    async def find_turn(self, key: TurnKey) -> StoredTurn | None:
        """Return a turn with its events, or None."""
        self._check_open()
        turn = self._find(key)
        return None if turn is None else turn.stored()

    async def load_session(self, key: SessionKey, limit: int) -> StoredSession | None:
        """Return what a session needs to go on, or None."""
        self._check_open()
        session = self._sessions.get(key)
        if session is None:
            return None
        turns = (turn for turn in reversed(session.in_order()) if turn.state in _ENDED_WELL and turn.is_told)
        latest = list(itertools.islice(turns, limit))
        messages = tuple(message for turn in reversed(latest) for message in turn.messages())
        runs = any(turn.state is TurnState.RUNNING for turn in session.turns.values())
        return StoredSession(last_ordinal=session.last_ordinal, messages=messages, running_on=self.node if runs else "")

    async def get_session(self, key: SessionKey) -> Session | None:
        """Return a session as it is listed, or None."""
        self._check_open()
        session = self._sessions.get(key)
        return None if session is None or session.ephemeral else session.listed()

    async def list_sessions(
        self, workspace: str, *, user: str, channel: str, before: tuple[float, str] | None, limit: int
    ) -> Sequence[Session]:
        """Return sessions, last used first."""
        self._check_open()

        def place(session: Conversation) -> tuple[float, str]:
            return -session.update_time, session.key.session

        asked = (
            session
            for session in self._sessions.values()
            if session.key.workspace == workspace
            and not session.ephemeral
            and user in ("", session.user)
            and channel in ("", session.channel)
            and (before is None or place(session) > (-before[0], before[1]))
        )
        return [session.listed() for session in sorted(asked, key=place)[:limit]]

    async def list_messages(self, key: SessionKey, *, after: tuple[int, int], limit: int) -> Sequence[Message]:
        """Return a session's messages, oldest first."""
        self._check_open()
        session = self._sessions.get(key)

        def said() -> Iterator[Message]:
            for turn in session.in_order() if session is not None else ():
                if turn.row.key.ordinal >= after[0] and not turn.gave_way:
                    yield from enumerated(turn)

        def enumerated(turn: KeptTurn) -> Iterator[Message]:
            for index, message in enumerate(turn.messages()):
                if (turn.row.key.ordinal, index) > after:
                    yield message

        return list(itertools.islice(said(), limit))

    async def list_usage(self, query: UsageQuery, *, after: UsagePlace | None, limit: int) -> UsagePage:
        """Return what was used."""
        self._check_open()
        return usage_page(self._database, query, after=after, limit=limit)

    # --- inside --------------------------------------------------------------------------------------------------

    async def _run(self, what: Callable[[sqlite3.Connection], T]) -> T:
        self._check_open()
        return what(self._database)

    def _find(self, key: TurnKey) -> KeptTurn | None:
        session = self._sessions.get(key.session)
        return None if session is None else session.turns.get(key.ordinal)

    def _delete_requests(self, session: Conversation) -> None:
        """Let the requests of a session's turns be known as those of deleted ones, for as long as that is kept."""
        now = time.time()
        while self._deleted and next(iter(self._deleted.values())) <= now:
            del self._deleted[next(iter(self._deleted))]
        for turn in session.turns.values():
            if not turn.gave_way and turn.row.create_time > now - KEEP_REQUESTS:
                self._deleted[session.key.workspace, turn.row.request_id] = now + KEEP_REQUESTS
        self._forget_requests(session)

    def _forget_requests(self, session: Conversation) -> None:
        for turn in session.turns.values():
            if not turn.gave_way:
                del self._requests[session.key.workspace, turn.row.request_id]

    def _check_open(self) -> None:
        if not self._is_open:
            raise StorageUnavailable("the store is closed")

    def _answered(self, answer: T, *, refusal: TurnInterrupted | None = None) -> Pending[T]:
        pending: Pending[T] = Pending()
        if not self._is_open:
            pending.settle(StorageUnavailable("the store is closed"))
        else:
            pending.settle(answer if refusal is None else refusal)
        return pending
