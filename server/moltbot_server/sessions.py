"""Conversations: what was said lately, kept at hand; and one turn at a time in each."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Generic, Protocol, TypeVar

from moltbot_server.errors import SessionBusy, SessionNotFound
from moltbot_server.journal import LiveTurn
from moltbot_server.store import Store
from moltbot_server.turns import Message, Queued, SessionKey

_SESSIONS_AT_HAND = 10_000
_TURNS_LOADED = 200


class History(Protocol):
    """What a session remembers of its messages."""

    def extend(self, messages: Iterable[Message]) -> None:
        """Add the messages of a turn that ended."""


H = TypeVar("H", bound=History)


class OpenSession(Generic[H]):
    """A session at hand: its history, its last ordinal, and the turns that wait for their place."""

    __slots__ = ("claims", "exists", "history", "key", "last_ordinal", "running", "waiting")

    def __init__(self, key: SessionKey, history: H, *, last_ordinal: int = 0, exists: bool = False) -> None:
        self.key = key
        self.history = history
        self.last_ordinal = last_ordinal
        self.exists = exists
        self.claims = 0
        self.running: LiveTurn | None = None
        self.waiting: deque[tuple[LiveTurn, asyncio.Future[None]]] = deque()

    def claim(self) -> int:
        """Return the number of the session's next turn, and keep the session at hand until `release`."""
        self.claims += 1
        self.last_ordinal += 1
        return self.last_ordinal

    def release(self) -> None:
        """Give a claim back: its turn has ended."""
        self.claims -= 1

    async def enter(self, live: LiveTurn) -> None:
        """Wait until the session is this turn's; those that came before go first, and the turn is told its position."""
        if self.running is None and not self.waiting:
            self.running = live
        else:
            await self._queue(live)

    def leave(self) -> None:
        """Give the session to the turn that waits longest, and tell the others how far they have come."""
        self.running = None
        while self.waiting:
            live, place = self.waiting.popleft()
            if not place.done():
                self.running = live
                place.set_result(None)
                break
        for position, (waiting, _) in enumerate(self.waiting, start=1):
            waiting.record(Queued(position=position))

    async def _queue(self, live: LiveTurn) -> None:
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.append((live, place))
        live.record(Queued(position=len(self.waiting)))
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.leave()
            else:
                self.waiting.remove((live, place))
            raise


class Sessions(Generic[H]):
    """The sessions of this node, the latest used at hand and the others in the store."""

    def __init__(self, store: Store, history: Callable[[], H]) -> None:
        self._store = store
        self._history = history
        self._open: OrderedDict[SessionKey, OpenSession[H]] = OrderedDict()
        self._loading: dict[SessionKey, asyncio.Task[OpenSession[H]]] = {}

    def __len__(self) -> int:
        """How many sessions are at hand."""
        return len(self._open)

    def at_hand(self, key: SessionKey) -> OpenSession[H] | None:
        """Return the session if it is at hand."""
        return self._open.get(key)

    async def open(self, key: SessionKey) -> OpenSession[H]:
        """Return a session, read from the store when it is not at hand, or a new one."""
        session = self._open.get(key)
        if session is not None:
            self._open.move_to_end(key)
            return session
        loading = self._loading.get(key)
        if loading is None:
            loading = self._loading[key] = asyncio.create_task(self._load(key))
            loading.add_done_callback(lambda _: self._loading.pop(key, None))
        return await asyncio.shield(loading)

    def create(self, key: SessionKey, *, keep: bool) -> OpenSession[H]:
        """Return a session that is known to be new; one that will see no second turn need not be kept at hand."""
        session = OpenSession(key, self._history())
        return self._keep(session) if keep else session

    async def reset(self, key: SessionKey) -> None:
        """Forget what was said in a session.

        Raises:
            SessionNotFound: there is no such session.
            SessionBusy: a turn runs in it.
        """
        session = await self.open(key)
        if not session.exists:
            self._open.pop(key, None)
            raise SessionNotFound("there is no such session in this workspace")
        if session.claims:
            raise SessionBusy("a turn runs in this session; wait for its end or cancel it", retry_after=1.0)
        await self._store.reset_session(key)
        self._keep(OpenSession(key, self._history(), last_ordinal=session.last_ordinal))

    async def delete(self, key: SessionKey) -> None:
        """Delete a session; turns that run or wait in it are cancelled first.

        Raises:
            SessionNotFound: there is no such session.
        """
        session = self._open.get(key)
        if session is not None:
            turns = [live for live, _ in session.waiting] + ([session.running] if session.running else [])
            for live in turns:
                live.cancel()
            for live in turns:
                await live.outcome()
        self._open.pop(key, None)
        if not await self._store.delete_session(key):
            raise SessionNotFound("there is no such session in this workspace")

    async def _load(self, key: SessionKey) -> OpenSession[H]:
        stored = await self._store.load_session(key, _TURNS_LOADED)
        history = self._history()
        if stored is None:
            return self._keep(OpenSession(key, history))
        history.extend(stored.messages)
        return self._keep(OpenSession(key, history, last_ordinal=stored.last_ordinal, exists=True))

    def _keep(self, session: OpenSession[H]) -> OpenSession[H]:
        self._open[session.key] = session
        while len(self._open) > _SESSIONS_AT_HAND:
            key, oldest = next(iter(self._open.items()))
            if oldest.claims:
                self._open.move_to_end(key)
                break
            del self._open[key]
        return session
