"""Conversations: what was said lately, kept at hand; and one turn at a time in each."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Generic, Protocol, TypeVar

from moltbot_server.errors import NotServing, SessionBusy, SessionNotFound
from moltbot_server.live_turn import LiveTurn
from moltbot_server.metrics import CacheCounts
from moltbot_server.store import GUESSED, Elsewhere, Store
from moltbot_server.turns import Message, Queued, SessionKey, TextPart, TurnInput, WhenBusy

_SESSIONS_AT_HAND = 10_000
_OVERHEAD = 1_000  # bytes of memory that a session at hand takes beside its messages
_TURNS_LOADED = 200
_TOLD_EACH_STEP = 32
_TITLE_LENGTH = 80
_GUESSED_FROM = 0.9
_LATELY = 0.05  # what the latest session counts among those before it
OURS = -1
"""The version of a session of which this node has accepted a turn: it is known as long as nobody else has it."""


def title_of(turn: TurnInput) -> str:
    """Return the title of a session that begins with a turn."""
    text = " ".join(part.text for part in turn.parts if isinstance(part, TextPart))
    line = " ".join(text.split())
    return line if len(line) <= _TITLE_LENGTH else line[: _TITLE_LENGTH - 1] + "…"


class History(Protocol):
    """What a session remembers of its messages."""

    def extend(self, messages: Iterable[Message]) -> None:
        """Add the messages of a turn that ended."""


H = TypeVar("H", bound=History)


class OpenSession(Generic[H]):
    """A session at hand: its history, its last ordinal, and the turns that wait for their place.

    `exists` is False while the session's row may be missing or untitled; `version` is as it was loaded, 0 when it is
    new, `GUESSED` while it is taken for new. `is_awaited`: the store has turns of it that this node runs, and that may
    not be at hand yet. `is_old`: others have had it since it was loaded; it may be at hand again as another object.
    """

    __slots__ = (
        "claims",
        "exists",
        "history",
        "is_awaited",
        "is_old",
        "key",
        "last_ordinal",
        "leader",
        "moved",
        "on_release",
        "running",
        "size",
        "used",
        "version",
        "waiting",
    )

    def __init__(self, key: SessionKey, history: H, *, last_ordinal: int = 0, exists: bool = False) -> None:
        """`size` is what it counts for, in bytes; `used` is when it was last asked for; both are `Sessions`' own."""
        self.key = key
        self.history = history
        self.last_ordinal = last_ordinal
        self.exists = exists
        self.version = 0
        self.is_awaited = self.is_old = False
        self.claims = 0
        self.size = 0
        self.used = 0.0
        self.on_release: Callable[[OpenSession[H]], None] | None = None
        self.running: LiveTurn | None = None
        self.leader: LiveTurn | None = None
        """The turn that answers those before it, which it joins; it waits."""
        self.waiting: dict[LiveTurn, Callable[[], None]] = {}
        self.moved: asyncio.Event | None = None

    def claim(self) -> int:
        """Return the number of the session's next turn, and keep the session at hand until `release`."""
        self.claims += 1
        self.last_ordinal += 1
        return self.last_ordinal

    def take_up(self, ordinal: int) -> None:
        """Claim the session for a turn that has a number already, of another core."""
        self.claims += 1
        self.last_ordinal = max(self.last_ordinal, ordinal)
        self.exists = True

    def release(self) -> None:
        """Give a claim back: its turn has ended."""
        self.claims -= 1
        self._tell_moved()
        if self.on_release is not None:
            self.on_release(self)

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

    def interrupt(self, live: LiveTurn) -> None:
        """Cancel the turns before this one: the one that runs, and those that wait."""
        if self.running is live:
            return
        before = itertools.takewhile(lambda other: other is not live, tuple(self.waiting))
        for other in (self.running, *before):
            if other is not None and other is not live:
                other.cancel()

    def joined_by(self, live: LiveTurn) -> LiveTurn | None:
        """Return the turn that answers this one too: the last of those that wait directly behind it to join.

        It is the same one for all that it answers, however many come behind it meanwhile. None: it answers by itself.
        """
        if live is self.leader or live.input.when_busy is not WhenBusy.JOIN:
            self.leader = None
            return None
        if self.leader not in self.waiting or self.leader.closing:
            self.leader = None
            for other in self.waiting:
                if other.closing:
                    continue  # it was cancelled, and goes when that is stored
                joins = other.input.when_busy is WhenBusy.JOIN and other.input.reply_to == live.input.reply_to
                if not joins or not other.is_stored:
                    break
                self.leader = other
        return self.leader

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
        staying = (live for live in self.waiting if not live.closing)  # the others have told their last
        for position, live in enumerate(itertools.islice(staying, _TOLD_EACH_STEP), start=1):
            live.record(Queued(position=position))


class _Loading:
    """A session that is being loaded: when that is over, and which other node was found to have it."""

    __slots__ = ("elsewhere", "over")

    def __init__(self) -> None:
        self.over = asyncio.Event()
        self.elsewhere = ""


class Sessions(Generic[H]):
    """The sessions of this node: the latest used at hand, with what their model reads, and the others in the store.

    What is at hand is a cache: bounded in number, bytes and time, counted, and cleared by `clear`.
    """

    name = "sessions"
    backend = "memory"
    failures = 0

    def __init__(
        self,
        store: Store,
        history: Callable[[Sequence[Message]], H],
        *,
        size_of: Callable[[H], int] = lambda history: 0,
        max_bytes: int = 1 << 40,
        ttl: float = float("inf"),
        clock: Callable[[], float] = time.monotonic,
        guessed_from: float = _GUESSED_FROM,
    ) -> None:
        """`history` makes what a session remembers from the messages that are stored, oldest first.

        `size_of` tells what that takes, in bytes. A session is at hand for `ttl` seconds after its last use; `clock`
        tells seconds that only grow. A session is taken for new from the share of `guessed_from` on that were, lately.
        """
        self._store = store
        self._history = history
        self._size_of, self.max_bytes, self.ttl, self._clock = size_of, max_bytes, ttl, clock
        self.counts = CacheCounts()
        self.size = 0
        self._open: OrderedDict[SessionKey, OpenSession[H]] = OrderedDict()
        self._loading: dict[SessionKey, _Loading] = {}
        self._changes: dict[SessionKey, asyncio.Event] = {}
        self._carried: set[asyncio.Task[None]] = set()
        self._guessed_from, self._new = guessed_from, 0.5

    def __len__(self) -> int:
        """How many sessions are at hand."""
        return len(self._open)

    @property
    def entries(self) -> int:
        """How many sessions are at hand."""
        return len(self._open)

    def forget_idle(self) -> None:
        """Let go the sessions without a turn: what is remembered of them is read from the store again."""
        self._forget([key for key, session in self._open.items() if not session.claims])

    async def clear(self, workspace: str) -> int:
        """Let go the sessions of a workspace without a turn, and return how many that were."""
        found = [key for key, session in self._open.items() if key.workspace == workspace and not session.claims]
        self._forget(found)
        return len(found)

    def at_hand(self, key: SessionKey) -> OpenSession[H] | None:
        """Return the session if it is at hand."""
        return self._open.get(key)

    def ready(self, key: SessionKey) -> OpenSession[H] | None:
        """Return a session that can be had without waiting, or None: see `open`."""
        session = self._open.get(key)
        if session is None or key in self._changes:
            return None
        return self._use(session)

    async def open(self, key: SessionKey) -> OpenSession[H]:
        """Return a session, read from the store when it is not at hand, or a new one.

        A session that is being reset or deleted is waited for. Whoever gets it claims it before anything else runs.

        Raises:
            NotServing: another node runs turns of it.
        """
        looked = False
        while True:
            if (change := self._changes.get(key)) is not None:
                await change.wait()
            elif (session := self._open.get(key)) is not None and (used := self._use(session, counted=looked)):
                return used
            elif (loading := self._loading.get(key)) is not None:
                self.counts.joined += not looked
                looked = True
                await loading.over.wait()
                if loading.elsewhere:
                    raise NotServing.elsewhere(loading.elsewhere)
            else:
                self.counts.misses += not looked
                looked = True
                await self._load(key)

    def create(self, key: SessionKey, *, keep: bool) -> OpenSession[H]:
        """Return a session that is known to be new; one that will see no second turn need not be kept at hand."""
        session = OpenSession(key, self._history(()))
        return self._keep(session) if keep else session

    def may_be_new(self, key: SessionKey) -> bool:
        """Tell whether a session that is not at hand is worth being taken for new: nearly all were, lately.

        To be right saves the time to look; to be wrong costs what is done in vain until the store says so.
        """
        is_busy = key in self._open or key in self._changes or key in self._loading
        return self._new >= self._guessed_from and not is_busy

    def guess(self, key: SessionKey) -> OpenSession[H]:
        """Return a session as a new one; others that want it wait until `settle` says whether it is."""
        self.counts.misses += 1
        session = OpenSession(key, self._history(()))
        session.version = GUESSED
        self._loading[key] = _Loading()
        return session

    def settle(self, session: OpenSession[H], *, is_new: bool | None) -> None:
        """Keep a session that was taken for new if it is; otherwise, or where nobody knows, it is loaded."""
        if is_new:
            session.version = 0
            self._keep(session)
        if is_new is not None:
            self._learn(is_new=is_new)
        self._loading.pop(session.key).over.set()

    def _learn(self, *, is_new: bool) -> None:
        self._new += _LATELY * (is_new - self._new)

    def forget(self, key: SessionKey) -> None:
        """Let a session go that others have had: what its turns here still do with it counts no more."""
        self._forget([key])

    async def renew(self, key: SessionKey) -> None:
        """Have a session loaded anew by whoever opens it next: what was read up to now may be old."""
        while (loading := self._loading.get(key)) is not None:
            await loading.over.wait()
        self._forget([key])

    async def reset(self, key: SessionKey) -> None:
        """Forget what was said in a session.

        Raises:
            NotServing: another node runs turns of it.
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
            done = await self._store.reset_session(key)
            self._forget([key])
            if isinstance(done, Elsewhere):
                raise NotServing.elsewhere(done.node)

    async def delete(self, key: SessionKey) -> None:
        """Delete a session; turns that run or wait in it are cancelled first.

        Raises:
            NotServing: another node runs turns of it.
            SessionNotFound: there is no such session.
        """
        await self._carry_through(self._delete(key))

    async def _delete(self, key: SessionKey) -> None:
        async with self._change(key):
            session = self._open.get(key)
            if session is not None:
                await session.clear()
            self._forget([key])
            done = await self._store.delete_session(key)
            if isinstance(done, Elsewhere):
                raise NotServing.elsewhere(done.node)
            if not done:
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
                await loading.over.wait()
            yield
        finally:
            del self._changes[key]
            change.set()

    async def _load(self, key: SessionKey) -> None:
        """Bring a session to hand; others that want it wait meanwhile, and try themselves if this fails or is left."""
        loading = self._loading[key] = _Loading()
        try:
            stored = await self._store.load_session(key, _TURNS_LOADED)
            self._learn(is_new=stored is None)
            if stored is not None and self._store.shared and stored.running_on not in ("", self._store.node):
                loading.elsewhere = stored.running_on
                raise NotServing.elsewhere(stored.running_on)
            session = OpenSession(key, self._history(stored.messages if stored else ()))
            if stored is not None:
                session.version, session.is_awaited = stored.version, bool(stored.running_on)
                session.last_ordinal = stored.last_ordinal
                session.exists = bool(stored.messages)  # without any it may have been reset, and waits for a title
            self._keep(session)
        finally:
            del self._loading[key]
            loading.over.set()

    def _use(self, session: OpenSession[H], *, counted: bool = False) -> OpenSession[H] | None:
        """Return a session at hand as the latest used one; None when it was at hand for too long."""
        now = self._clock()
        if now - session.used > self.ttl and not session.claims:
            self._forget([session.key])
            return None
        self.counts.hits += not counted
        session.used = now
        self._open.move_to_end(session.key)
        return session

    def _keep(self, session: OpenSession[H]) -> OpenSession[H]:
        self._open[session.key] = session
        session.used = self._clock()
        session.on_release = self._weigh
        self._weigh(session)
        return session

    def _weigh(self, session: OpenSession[H]) -> None:
        """Take note of what the latest used session has become, and let go others that are too old or too much."""
        if self._open.get(session.key) is not session:
            return  # it was let go while it was used
        size = _OVERHEAD + self._size_of(session.history)
        self.size += size - session.size
        session.size, session.used = size, self._clock()
        self._open.move_to_end(session.key)
        too_old = session.used - self.ttl
        while (oldest := next(iter(self._open.values()))) is not session:
            if len(self._open) <= _SESSIONS_AT_HAND and self.size <= self.max_bytes and oldest.used >= too_old:
                break
            if oldest.claims:
                oldest.used = session.used
                self._open.move_to_end(oldest.key)
                break
            self._forget([oldest.key])

    def _forget(self, keys: Iterable[SessionKey]) -> None:
        for key in keys:
            session = self._open.pop(key, None)
            if session is not None:
                self.size -= session.size
                session.size = 0
