"""A turn under way: its events in order, and who waits for them."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_right
from collections.abc import Callable
from typing import Protocol

from moltbot_server.errors import MoltBotError
from moltbot_server.store import SEQUENCE_AFTER_CRASH, StoredTurn
from moltbot_server.store.protocol import Orphan
from moltbot_server.ticker import Ticker, timer_at
from moltbot_server.turns import (
    Accepted,
    Completed,
    Event,
    Failed,
    Kind,
    Principal,
    Queued,
    Reset,
    Routed,
    TextDelta,
    TurnInput,
    TurnKey,
)


class Keeper(Protocol):
    """Has what turns record kept, and says when that is so: `LiveTurn.show`."""

    ticker: Ticker

    def note(self, live: LiveTurn) -> None:
        """Have what a turn has recorded kept."""

    def hurry(self, live: LiveTurn) -> None:
        """Have a turn accepted now that has something to show: nobody sees it before."""


class LiveTurn:
    """A turn under way. Belongs to the event loop's thread."""

    __slots__ = (
        "_end_waiters",
        "_expires_at",
        "_followers",
        "_held",
        "_hurried",
        "_interval",
        "_journal",
        "_spoke",
        "_stored",
        "_ticker",
        "_timer",
        "_waiters",
        "accepted_after",
        "age",
        "arrived",
        "cancelling",
        "closing",
        "digest",
        "duplicate_of",
        "ended",
        "epoch",
        "events",
        "halt",
        "input",
        "is_guess",
        "kept",
        "key",
        "late",
        "lost",
        "moves",
        "principal",
        "refusal",
        "same_at",
        "successor",
        "visible",
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
        journal: Keeper | None = None,
        taken: Orphan | None = None,
        is_guess: bool = False,
    ) -> None:
        """`arrived` is on `time.perf_counter`; text waits up to `interval` seconds to be recorded together.

        What is recorded is seen by followers when the `journal` has had it kept; without one, at once. `taken` is the
        turn as another core left it, with the `age` in seconds that it had by then: it goes on after the events that
        were kept. What is a guess may have another one's number, until it is accepted: nothing that it records is kept
        before.
        """
        self.key = key
        self.input = turn
        self.principal = principal
        self.digest = digest
        self.arrived = arrived
        self.age = max(0.0, time.time() - taken.turn.create_time) if taken else 0.0
        self.accepted_after = 0.0
        self.events: list[Event] = list(taken.turn.events) if taken else []
        self.epoch = taken.epoch if taken else 1
        self.is_guess = is_guess
        self.visible = self.kept = len(self.events)
        self.same_at = -1
        self.ended = self.cancelling = self.closing = self.late = self.lost = False
        self.halt: Callable[[], None] = _nobody_to_stop
        self.duplicate_of: StoredTurn | None = None
        self.refusal: MoltBotError | None = None
        self.successor: LiveTurn | None = None
        self.moves = 0
        self._stored = False
        self._followers = 0
        self._waiters: list[asyncio.Future[None]] = []
        self._end_waiters: list[asyncio.Future[None]] = []
        self._interval = interval
        self._journal = journal
        self._ticker = Ticker() if journal is None else journal.ticker  # an empty journal is false
        self._held: list[str] = []
        self._spoke = self._hurried = False
        self._timer: asyncio.TimerHandle | None = None
        self._expires_at: float | None = None

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
            self._append(TextDelta(text=text))
            return
        if not self._held:
            self._ticker.call_within(self._interval, self._flush)
        self._held.append(text)

    def record(self, kind: Kind) -> None:
        """Record what happened as the next event, after the text that still waits."""
        if self._held:
            self._flush()
        self._append(kind)

    def go_on_with(self, text: str, reason: str) -> None:
        """Record that the text so far stays, for whom it is another than what was shown: who saw less is spared it."""
        self.same_at = len(self.events)
        self.record(Reset(text=text, reason=reason))

    def close(self, kind: Completed | Failed) -> tuple[Event, ...]:
        """Return all events with `kind` as the last one, not yet recorded: it is stored before it is seen."""
        if self._held:
            self._flush()
        if self._journal is not None and not (self._stored or self._hurried):
            self._hurry(self._journal)
        self.closing = True
        return (*self.events, self._event(kind))

    def end(self, last: Event) -> None:
        """Record the last event; followers end after it."""
        self.ended = True
        if self._timer is not None:
            self._timer.cancel()
        self.events.append(last)
        self.visible = len(self.events)
        self._wake()
        self._wake_at_end()

    def stored(self, *, refusal: MoltBotError | None = None, duplicate_of: StoredTurn | None = None) -> None:
        """Let followers go on: the turn is on the disk, or was refused, or another turn stands in its place."""
        self.refusal, self.duplicate_of = refusal, duplicate_of
        self._stored = True
        self._wake()
        if refusal is not None or duplicate_of is not None:
            self._wake_at_end()

    def give_way(self, successor: LiveTurn) -> None:
        """Let another turn stand in this one's place: nothing of this one was stored or seen."""
        self.successor = successor
        self._wake()
        self._wake_at_end()

    @property
    def latest(self) -> LiveTurn:
        """The turn that stands in this one's place, or this one."""
        live = self
        while live.successor is not None:
            live = live.successor
        return live

    @property
    def is_followed(self) -> bool:
        """True when somebody follows it."""
        return self._followers > 0

    @property
    def is_stored(self) -> bool:
        """True when the store has answered."""
        return self._stored

    async def settled(self) -> None:
        """Wait for the store's word on this turn, or on the one that stands in its place."""
        live = self
        while not live.is_stored:
            if live.successor is None:
                await live._wait()
            live = live.latest

    async def outcome(self) -> Completed | Failed | None:
        """Wait for the end and return the last event's kind; None when it was refused or another has its place."""
        self._followers += 1
        try:
            while not (self.ended or self.refusal or self.duplicate_of or self.successor):
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

    def lose(self) -> None:
        """Interrupt the turn because another core has it: nothing more of it is seen here."""
        if not self.closing:
            self.lost = True
            self.stop()

    def let_go(self) -> None:
        """Forget who carried the turn out, so that both are freed at once and not by the garbage collector."""
        self.halt = _nobody_to_stop
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def expires_at(self) -> float | None:
        """When the turn is ended, on the event loop's clock; None for never."""
        return self._expires_at

    def expire_at(self, deadline: float | None) -> None:
        """End the turn at a time of the event loop's clock, if it has not ended by then."""
        self._expires_at = deadline  # also of one that has its answer already: it may have to be begun again
        if deadline is not None and not self.closing:
            self._timer = timer_at(deadline, self._expire)

    def allow_until(self, deadline: float | None) -> None:
        """Let the turn go on until a later deadline, or without one: somebody with more time follows it too."""
        if self._expires_at is None or (deadline is not None and deadline <= self._expires_at):
            return
        if self._timer is not None:
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
        if not self._held:
            return
        text = "".join(self._held)
        self._held.clear()
        self._append(TextDelta(text=text))

    def _append(self, kind: Kind) -> None:
        events = self.events
        events.append(self._event(kind))
        if self._journal is None or (type(kind) in _UNKEPT and self.visible == len(events) - 1):
            # Where a turn stands is told anew by whoever takes it over: nothing of it need be kept first.
            self.show(len(events))
        else:
            if not (self._stored or self._hurried):
                self._hurry(self._journal)
            self._journal.note(self)

    def _hurry(self, journal: Keeper) -> None:
        self._hurried = True
        journal.hurry(self)

    def _event(self, kind: Kind) -> Event:
        # After a take-over, beyond all that could have been seen before.
        number = len(self.events) + 1 + SEQUENCE_AFTER_CRASH * (self.epoch - 1)
        return Event(sequence=number, at=time.time(), kind=kind)

    def index_after(self, sequence: int) -> int:
        """Return how many events, from the first, have been seen by who saw this number last."""
        return bisect_right(self.events, sequence, key=_sequence)

    def show(self, count: int) -> None:
        """Let followers see so many events, from the first."""
        if count > self.visible:
            self.visible = count
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

    def cancel_unfollowed(self) -> None:
        """Cancel the turn if it is to end with its last follower and has none."""
        if self.successor is not None:
            self.successor.cancel_unfollowed()
        elif self._followers == 0 and self.input.cancel_on_disconnect and not self.ended:
            self.cancel()

    def _left(self) -> None:
        self._followers -= 1
        self.cancel_unfollowed()


# Kinds that say where a turn stands, and nothing of its answer.
_UNKEPT = frozenset({Accepted, Queued, Routed})


def _sequence(event: Event) -> int:
    return event.sequence


def _nobody_to_stop() -> None:
    """Stand in for whoever carries a turn out, before there is anybody."""
