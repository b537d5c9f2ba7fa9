"""Conversations: what was said lately, kept at hand; and one turn at a time in each."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

from moltbot_server.errors import SessionBusy, SessionNotFound
from moltbot_server.journal import LiveTurn
from moltbot_server.store import Store
from moltbot_server.turns import Message, Queued, SessionKey

_SESSIONS_AT_HAND = 10_000
_TURNS_LOADED = 200
_TOLD_EACH_STEP = 32


class History(Protocol):
    """What a session remembers of its messages."""

    def extend(self, messages: Iterable[Message]) -> None:
        """Add the messages of a turn that ended."""


H = TypeVar("H", bound=History)


class OpenSession(Generic[H]):
    """A session at hand: its history, its last ordinal, and the turns that wait for their place.

    `exists` is False while the session's row may be missing or untitled.
    """

    __slots__ = ("claims", "exists", "history", "key", "last_ordinal", "moved", "running", "waiting")

    def __init__(self, key: SessionKey, history: H, *, last_ordinal: int = 0, exists: bool = False) -> None:
        self.key = key
        self.history = history
        self.last_ordinal = last_ordinal
        self.exists = exists
        self.claims = 0
        self.running: LiveTurn | None = None
        self.waiting: dict[LiveTurn, Callable[[], None]] = {}
        self.moved: asyncio.Event | None = None

    def claim(self) -> int:
        """Return the number of the session's next turn, and keep the session at hand until `release`."""
        self.claims += 1
        self.last_ordinal += 1
        return self.last_ordinal

    def release(self) -> None:
        """Give a claim back: its turn has ended."""
        self.claims -= 1
        self._tell_moved()

    def enter(self, live: LiveTurn, go: Callable[[], None]) -> bool:
        """Tell whether the session is this turn's now; if not, `go` is called when it is.

        Those that came before go first, and the turn is told its position.
        """
        self._tell_moved()
        if self.running is None and not self.waiting:
            self.running = live
            return True
        self.waiting[live] = go
        live.record(Queued(position=len(self.waiting)))
        return False

    def leave(self) -> None:
        """Give the session to the turn that waits longest, and tell the others how far they have come."""
        self.running = None
        if self.waiting:
            self.running = live = next(iter(self.waiting))
            asyncio.get_running_loop().call_soon(self.waiting.pop(live))
            self._tell_positions()

    def withdraw(self, live: LiveTurn) -> None:
        """Take a turn out that waits, or that was given the session and has not set out."""
        if self.running is live:
            self.leave()
        elif self.waiting.pop(live, None) is not None:
            self._tell_positions()

    async def clear(self) -> None:
        """Cancel the turns that run or wait, and those that are about to; return when all have ended."""
        self.moved = asyncio.Event()
        while self.claims:
            self.moved.clear()
            for live in ([self.running] if self.running else []) + [*self.waiting]:
                live.cancel()
            await self.moved.wait()

    def _tell_moved(self) -> None:
        if self.moved is not None:
            self.moved.set()

    def _tell_positions(self) -> None:
        """Tell the turns that are nearly there; to tell all of a long queue each step would cost its square."""
        for position, live in enumerate(islice(self.waiting, _TOLD_EACH_STEP), start=1):
            live.record(Queued(position=position))


class Sessions(Generic[H]):
    """The sessions of this node, the latest used at hand and the others in the store."""

    def __init__(self, store: Store, history: Callable[[Sequence[Message]], H]) -> None:
        """`history` makes what a session remembers from the messages that are stored, oldest first."""
        self._store = store
        self._history = history
        self._open: OrderedDict[SessionKey, OpenSession[H]] = OrderedDict()
        self._loading: dict[SessionKey, asyncio.Event] = {}
        self._changes: dict[SessionKey, asyncio.Event] = {}
        self._carried: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """How many sessions are at hand."""
        return len(self._open)

    def forget_idle(self) -> None:
        """Let go the sessions without a turn: what is remembered of them is read from the store again."""
        for key in [key for key, session in self._open.items() if not session.claims]:
            del self._open[key]

    def at_hand(self, key: SessionKey) -> OpenSession[H] | None:
        """Return the session if it is at hand."""
        return self._open.get(key)

    def ready(self, key: SessionKey) -> OpenSession[H] | None:
        """Return a session that can be had without waiting, or None: see `open`."""
        session = self._open.get(key)
        if session is None or key in self._changes:
            return None
        self._open.move_to_end(key)
        return session

    async def open(self, key: SessionKey) -> OpenSession[H]:
        """Return a session, read from the store when it is not at hand, or a new one.

        A session that is being reset or deleted is waited for. Whoever gets it claims it before anything else runs.
        """
        while True:
            if (change := self._changes.get(key)) is not None:
                await change.wait()
            elif (session := self._open.get(key)) is not None:
                self._open.move_to_end(key)
                return session
            elif (loading := self._loading.get(key)) is not None:
                await loading.wait()
            else:
                await self._load(key)

    def create(self, key: SessionKey, *, keep: bool) -> OpenSession[H]:
        """Return a session that is known to be new; one that will see no second turn need not be kept at hand."""
        session = OpenSession(key, self._history(()))
        return self._keep(session) if keep else session

    async def reset(self, key: SessionKey) -> None:
        """Forget what was said in a session.

        Raises:
            SessionNotFound: there is no such session.
            SessionBusy: a turn runs in it.
        """
        await self._carry_through(self._reset(key))

    async def _reset(self, key: SessionKey) -> None:
        async with self._change(key):
            session = self._open.get(key)
            if session is not None and session.claims:
                raise SessionBusy("a turn runs in this session; wait for its end or cancel it", retry_after=1.0)
            if await self._store.get_session(key) is None:
                raise SessionNotFound("there is no such session in this workspace")
            await self._store.reset_session(key)
            self._open.pop(key, None)

    async def delete(self, key: SessionKey) -> None:
        """Delete a session; turns that run or wait in it are cancelled first.

        Raises:
            SessionNotFound: there is no such session.
        """
        await self._carry_through(self._delete(key))

    async def _delete(self, key: SessionKey) -> None:
        async with self._change(key):
            session = self._open.get(key)
            if session is not None:
                await session.clear()
            self._open.pop(key, None)
            if not await self._store.delete_session(key):
                raise SessionNotFound("there is no such session in this workspace")

    async def _carry_through(self, change: Coroutine[Any, Any, None]) -> None:
        """Wait for a change that goes on when its caller leaves: the store carries it out in any case.

        What is at hand would otherwise remember what the store has forgotten.
        """
        task = asyncio.create_task(change)
        self._carried.add(task)
        task.add_done_callback(self._carried_out)
        await asyncio.shield(task)

    def _carried_out(self, task: asyncio.Task[None]) -> None:
        self._carried.discard(task)
        if not task.cancelled():
            task.exception()  # told to the caller, if it is still there

    @asynccontextmanager
    async def _change(self, key: SessionKey) -> AsyncGenerator[None, None]:
        """Hold a session back while the store changes it, so that no turn begins on what is about to be gone."""
        while (earlier := self._changes.get(key)) is not None:
            await earlier.wait()
        change = self._changes[key] = asyncio.Event()
        try:
            if (loading := self._loading.get(key)) is not None:
                await loading.wait()
            yield
        finally:
            del self._changes[key]
            change.set()

    async def _load(self, key: SessionKey) -> None:
        """Bring a session to hand; others that want it wait meanwhile, and try themselves if this fails or is left."""
        loading = self._loading[key] = asyncio.Event()
        try:
            stored = await self._store.load_session(key, _TURNS_LOADED)
            session = OpenSession(key, self._history(stored.messages if stored else ()))
            if stored is not None:
                session.last_ordinal = stored.last_ordinal
                session.exists = bool(stored.messages)  # without any it may have been reset, and waits for a title
            self._keep(session)
        finally:
            del self._loading[key]
            loading.set()

    def _keep(self, session: OpenSession[H]) -> OpenSession[H]:
        self._open[session.key] = session
        while len(self._open) > _SESSIONS_AT_HAND:
            key, oldest = next(iter(self._open.items()))
            if oldest.claims:
                self._open.move_to_end(key)
                break
            del self._open[key]
        return session
