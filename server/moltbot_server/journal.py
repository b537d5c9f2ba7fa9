"""Turns under way: their events in order, and everybody who follows them.

A turn outlives the connection that started it, so streams are followers of a recorded list, never its source. Followers
wait until the turn is stored, and read at their own pace; text that waited for a slow one is delivered merged.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable

from moltbot_server.errors import MoltBotError, RequestIdReused, TurnNotFound
from moltbot_server.store import SEQUENCE_AFTER_CRASH, Store, StoredTurn
from moltbot_server.ticker import Ticker, timer_at
from moltbot_server.turns import (
    Accepted,
    Completed,
    Event,
    Failed,
    Kind,
    Principal,
    Reset,
    TextDelta,
    TurnInput,
    TurnKey,
)

_RECENT_REQUESTS = 4096


class LiveTurn:
    """A turn under way. Belongs to the event loop's thread."""

    __slots__ = (
        "_end_waiters",
        "_followers",
        "_held",
        "_interval",
        "_spoke",
        "_stored",
        "_ticker",
        "_timer",
        "_waiters",
        "accepted_after",
        "arrived",
        "cancelling",
        "closing",
        "digest",
        "duplicate_of",
        "ended",
        "events",
        "halt",
        "input",
        "key",
        "late",
        "principal",
        "refusal",
    )

    def __init__(
        self,
        *,
        key: TurnKey,
        turn: TurnInput,
        principal: Principal,
        digest: bytes,
        arrived: float,
        interval: float = 0.0,
        ticker: Ticker | None = None,
    ) -> None:
        """`arrived` is on `time.perf_counter`; text waits up to `interval` seconds to be recorded together."""
        self.key = key
        self.input = turn
        self.principal = principal
        self.digest = digest
        self.arrived = arrived
        self.accepted_after = 0.0
        self.events: list[Event] = []
        self.ended = self.cancelling = self.closing = self.late = False
        self.halt: Callable[[], None] = _nobody_to_stop
        self.duplicate_of: StoredTurn | None = None
        self.refusal: MoltBotError | None = None
        self._stored = False
        self._followers = 0
        self._waiters: list[asyncio.Future[None]] = []
        self._end_waiters: list[asyncio.Future[None]] = []
        self._interval = interval
        self._ticker = ticker or Ticker()
        self._held: list[str] = []
        self._spoke = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def text(self) -> str:
        """The text recorded so far."""
        pieces: list[str] = []
        for event in self.events:
            if isinstance(event.kind, TextDelta):
                pieces.append(event.kind.text)
            elif isinstance(event.kind, Reset):
                pieces = [event.kind.text]
        return "".join(pieces)

    def say(self, text: str) -> None:
        """Record more text of the answer: the first at once, the rest together with what comes within the interval."""
        if self._interval <= 0 or not self._spoke:
            self._spoke = True
            events = self.events
            events.append(Event(sequence=len(events) + 1, at=time.time(), kind=TextDelta(text=text)))
            if self._stored and self._waiters:
                self._wake()
            return
        if not self._held:
            self._ticker.call_within(self._interval, self._flush)
        self._held.append(text)

    def record(self, kind: Kind) -> None:
        """Record what happened as the next event, after the text that still waits."""
        if self._held:
            self._flush()
        self._append(kind)

    def close(self, kind: Completed | Failed) -> tuple[Event, ...]:
        """Return all events with `kind` as the last one, not yet recorded: it is stored before it is seen."""
        if self._held:
            self._flush()
        self.closing = True
        return (*self.events, Event(sequence=len(self.events) + 1, at=time.time(), kind=kind))

    def end(self, last: Event) -> None:
        """Record the last event; followers end after it."""
        self.ended = True
        if self._timer is not None:
            self._timer.cancel()
        self.events.append(last)
        self._wake()
        self._wake_at_end()

    def stored(self, *, refusal: MoltBotError | None = None, duplicate_of: StoredTurn | None = None) -> None:
        """Let followers go on: the turn is on the disk, or was refused, or another turn stands in its place."""
        self.refusal, self.duplicate_of = refusal, duplicate_of
        self._stored = True
        self._wake()
        if refusal is not None or duplicate_of is not None:
            self._wake_at_end()

    @property
    def is_stored(self) -> bool:
        """True when the store has answered."""
        return self._stored

    async def outcome(self) -> Completed | Failed | None:
        """Wait for the end and return the last event's kind; None when the turn was refused or is a duplicate."""
        self._followers += 1
        try:
            while not (self.ended or self.refusal or self.duplicate_of):
                waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._end_waiters.append(waiter)
                await waiter
            last = self.events[-1].kind if self.ended else None
            return last if isinstance(last, Completed | Failed) else None
        finally:
            self._left()

    def cancel(self) -> bool:
        """Ask the turn to end now and keep its text; answer False when it has ended or is ending already."""
        if self.closing or self.cancelling or self.late:
            return False
        self.cancelling = True
        self.stop()
        return True

    def stop(self) -> None:
        """Interrupt the turn: whoever carries it out ends it now."""
        self.halt()

    def let_go(self) -> None:
        """Forget who carried the turn out, so that both are freed at once and not by the garbage collector."""
        self.halt = _nobody_to_stop
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def expire_at(self, deadline: float | None) -> None:
        """End the turn at a time of the event loop's clock, if it has not ended by then."""
        if deadline is not None and not self.closing:
            self._timer = timer_at(deadline, self._expire)

    def allow_until(self, deadline: float | None) -> None:
        """Let the turn go on until a later deadline, or without one: somebody with more time follows it too."""
        if self._timer is None or (deadline is not None and deadline <= self._timer.when()):
            return
        self._timer.cancel()
        self._timer = None
        self.expire_at(deadline)

    def _expire(self) -> None:
        if not self.closing and not self.cancelling:
            self.late = True
            self.stop()

    def _flush(self) -> None:
        """Record the text that was held back."""
        self._ticker.forget(self._flush)
        text = "".join(self._held)
        self._held.clear()
        self._append(TextDelta(text=text))

    def _append(self, kind: Kind) -> None:
        self.events.append(Event(sequence=len(self.events) + 1, at=time.time(), kind=kind))
        if self._stored and self._waiters:
            self._wake()

    def _wait(self) -> asyncio.Future[None]:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        return waiter

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _wake_at_end(self) -> None:
        for waiter in self._end_waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._end_waiters.clear()

    def _left(self) -> None:
        self._followers -= 1
        if self._followers == 0 and self.input.cancel_on_disconnect and not self.ended:
            self.cancel()


def _nobody_to_stop() -> None:
    """Stand in for whoever carries a turn out, before there is anybody."""


class Follower:
    """Reads a turn's events at its own pace: an iterator of lists, first of those there are, then of those that come.

    Close it, or leave its `with` block, to be counted among the followers no longer.
    """

    __slots__ = ("_after", "_journal", "_live", "_stored")

    def __init__(self, journal: Journal, turn: LiveTurn | StoredTurn, after: int) -> None:
        self._journal = journal
        self._after = after
        self._live: LiveTurn | None = None
        self._stored: StoredTurn | None = None
        if isinstance(turn, LiveTurn):
            self._live = turn
            turn._followers += 1
        else:
            self._stored = turn

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *failed: object) -> None:
        self.close()

    def __aiter__(self) -> Follower:
        return self

    async def __anext__(self) -> list[Event]:
        """Return the next events.

        Raises:
            MoltBotError: the turn was not accepted.
            StopAsyncIteration: the turn has ended, and all was read.
        """
        while (live := self._live) is not None:
            if not live.is_stored:
                await live._wait()
            elif live.refusal is not None:
                raise live.refusal
            elif live.duplicate_of is not None:
                self._turn_to(live.duplicate_of)
            elif self._after < len(live.events):
                batch = live.events[self._after :]
                self._after = len(live.events)
                return _merged(batch) if live._interval > 0 and len(batch) > 2 else batch
            elif live.ended:
                raise StopAsyncIteration
            else:
                await live._wait()
        stored, self._stored = self._stored, None
        events = [event for event in replay(stored) if event.sequence > self._after] if stored is not None else []
        if not events:
            raise StopAsyncIteration
        return events

    def close(self) -> None:
        """Follow no longer. A turn that was started so is cancelled when nobody follows it any more."""
        live, self._live, self._stored = self._live, None, None
        if live is not None:
            live._left()

    def _turn_to(self, turn: StoredTurn) -> None:
        """Follow the turn in whose place the first one stands."""
        running = self._journal.live(turn.key)
        self.close()
        if running is None:
            self._stored = turn
        else:
            self._live = running
            running._followers += 1


class Journal:
    """The turns of this node: those under way, and where to find the others."""

    def __init__(self, store: Store) -> None:
        self.ticker = Ticker()
        self._store = store
        self._live: dict[TurnKey, LiveTurn] = {}
        self._recent: OrderedDict[tuple[str, str], LiveTurn | TurnKey] = OrderedDict()

    def __len__(self) -> int:
        """How many turns are under way."""
        return len(self._live)

    def under_way(self) -> list[LiveTurn]:
        """Return the turns under way."""
        return list(self._live.values())

    def begin(self, live: LiveTurn) -> None:
        """Take a turn in."""
        self._live[live.key] = live
        self._recent[(live.principal.workspace, live.input.request_id)] = live
        if len(self._recent) > _RECENT_REQUESTS:
            self._recent.popitem(last=False)

    def close(self, live: LiveTurn) -> None:
        """Let an ended turn go; it is found in the store from now on."""
        self._live.pop(live.key, None)
        request = (live.principal.workspace, live.input.request_id)
        if self._recent.get(request) is live:
            last = live.events[-1].kind if live.events else None
            if (
                live.duplicate_of is not None
                or live.refusal is not None
                or (isinstance(last, Failed) and last.retryable)
            ):
                del self._recent[request]
            else:
                self._recent[request] = live.key

    def live(self, key: TurnKey) -> LiveTurn | None:
        """Return the turn if it is under way."""
        return self._live.get(key)

    def begun(self, principal: Principal, request_id: str) -> LiveTurn | None:
        """Return the turn under way that a request_id started, or None."""
        found = self._recent.get((principal.workspace, request_id))
        return found if isinstance(found, LiveTurn) else None

    def knows(self, principal: Principal, request_id: str) -> bool:
        """Tell whether a request_id started a turn lately."""
        return (principal.workspace, request_id) in self._recent

    async def repeated(self, principal: Principal, turn: TurnInput, digest: bytes) -> LiveTurn | StoredTurn | None:
        """Return the turn that the same request_id started lately, or None.

        Raises:
            RequestIdReused: the request_id was used with other content.
        """
        found = self._recent.get((principal.workspace, turn.request_id))
        if found is None:
            return None
        earlier = found if isinstance(found, LiveTurn) else await self._store.find_turn(found)
        if earlier is not None:
            same_content(earlier.digest, digest)
        return earlier

    async def find(self, key: TurnKey) -> LiveTurn | StoredTurn:
        """Return a turn, under way or ended.

        Raises:
            TurnNotFound: the workspace has no such turn.
        """
        found = self._live.get(key) or await self._store.find_turn(key)
        if found is None:
            raise TurnNotFound("there is no such turn in this workspace; its session may have been reset or deleted")
        return self._live.get(key) or found

    def follow(self, turn: LiveTurn | StoredTurn, after: int = 0) -> Follower:
        """Return the way to read a turn's events after a sequence number, to its end."""
        return Follower(self, turn, after)

    async def outcome(self, turn: LiveTurn | StoredTurn) -> tuple[TurnKey, int, Completed | Failed]:
        """Wait for a turn's end; return its name, its last sequence number and how it ended.

        Raises:
            MoltBotError: the turn was not accepted.
        """
        if isinstance(turn, LiveTurn):
            ended = await turn.outcome()
            if ended is not None:
                return turn.key, turn.events[-1].sequence, ended
            if turn.refusal is not None:
                raise turn.refusal
            if turn.duplicate_of is None:
                raise TurnNotFound("the turn is gone")
            turn = turn.duplicate_of
            if (running := self._live.get(turn.key)) is not None:
                return await self.outcome(running)
        last = replay(turn)[-1]
        if not isinstance(last.kind, Completed | Failed):
            raise TurnNotFound("the turn was recorded without an end")
        return turn.key, last.sequence, last.kind


def same_content(earlier: bytes, digest: bytes) -> None:
    """Refuse a request_id that stands for other content.

    Raises:
        RequestIdReused: the digests differ.
    """
    if earlier != digest:
        raise RequestIdReused("this request_id was used before with other content; make a new one for a new message")


def replay(turn: StoredTurn) -> tuple[Event, ...]:
    """Return the events of a turn that is not under way; one that a crash cut gets a last event that says so."""
    if turn.events:
        return turn.events
    accepted = Accepted(session=turn.key.session.session, ordinal=turn.key.ordinal, request_id=turn.request_id)
    cut = Failed(
        status=14,
        reason="TURN_INTERRUPTED",
        message="the core stopped while this turn ran; repeat it with the same request_id",
        retryable=True,
    )
    return (
        Event(sequence=1, at=turn.create_time, kind=accepted),
        Event(sequence=SEQUENCE_AFTER_CRASH, at=turn.end_time or turn.create_time, kind=cut),
    )


def _merged(batch: list[Event]) -> list[Event]:
    """Return the events with neighbouring text made one, under the last one's number."""
    merged: list[Event] = []
    for event in batch:
        last = merged[-1] if merged else None
        if last is not None and isinstance(event.kind, TextDelta) and isinstance(last.kind, TextDelta):
            text = TextDelta(text=last.kind.text + event.kind.text)
            merged[-1] = Event(sequence=event.sequence, at=event.at, kind=text)
        else:
            merged.append(event)
    return merged
