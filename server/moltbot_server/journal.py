"""Turns under way: their events in order, and everybody who follows them.

A turn outlives the connection that started it, so streams are followers of a recorded list, never its source. Followers
wait until the turn is stored, and read at their own pace; text that waited for a slow one is delivered merged.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence

from moltbot_server.errors import MoltBotError, NotServing, RequestIdReused, TurnNotFound
from moltbot_server.live_turn import LiveTurn
from moltbot_server.store import SEQUENCE_AFTER_CRASH, Store, StoredTurn
from moltbot_server.store.protocol import JournalEntry
from moltbot_server.ticker import Ticker
from moltbot_server.turns import (
    Accepted,
    Completed,
    Event,
    Failed,
    Principal,
    Reset,
    TextDelta,
    TurnInput,
    TurnKey,
    TurnState,
)

log = logging.getLogger(__name__)

_RECENT_REQUESTS = 4096


class Follower:
    """Reads a turn's events at its own pace: an iterator of lists, first of those there are, then of those that come.

    Close it, or leave its `with` block, to be counted among the followers no longer.
    """

    __slots__ = ("_after", "_journal", "_live", "_read", "_seeking", "_stored")

    def __init__(self, journal: Journal, turn: LiveTurn | StoredTurn, after: int) -> None:
        self._journal = journal
        self._after = after
        self._read = 0
        self._seeking = after > 0
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
                if live.successor is None:
                    await live._wait()
                else:
                    self._go_on_with(live.successor)
            elif live.refusal is not None:
                raise live.refusal
            elif live.duplicate_of is not None:
                self._turn_to(live.duplicate_of)
            elif self._read < live.visible:
                start, self._read = self._read, live.visible
                if self._seeking:
                    start = live.index_after(self._after)
                    if start >= live.visible:
                        continue
                    self._seeking = False
                batch = live.events[start : live.visible]
                after, self._after = self._after, batch[-1].sequence
                if start <= live.same_at < live.visible and after <= live.events[live.same_at - 1].sequence:
                    # It has all that was kept, or is told it now: nothing is to be taken back.
                    del batch[live.same_at - start]
                    if not batch:
                        continue
                return _merged(batch) if live._interval > 0 and len(batch) > 2 else batch
            elif live.ended:
                raise StopAsyncIteration
            else:
                await live._wait()
        stored, self._stored = self._stored, None
        events = list(_unheard(replay(stored), self._after)) if stored is not None else []
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
        running = self._journal.running(turn)
        if running is not None:
            self._go_on_with(running)
        else:
            self.close()
            self._stored = turn

    def _go_on_with(self, running: LiveTurn) -> None:
        running._followers += 1
        self.close()
        self._live = running
        self._read, self._seeking = 0, self._after > 0


class Journal:
    """The turns of this node: those under way, and where to find the others."""

    def __init__(self, store: Store) -> None:
        self.ticker = Ticker()
        self._store = store
        self._live: dict[TurnKey, LiveTurn] = {}
        self._recent: OrderedDict[tuple[str, str], LiveTurn | TurnKey] = OrderedDict()
        self._noted: dict[LiveTurn, None] = {}
        self._under_way: set[LiveTurn] = set()
        self._keeping = False
        self._is_refused = False
        self._elsewhere: OrderedDict[TurnKey, None] = OrderedDict()

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

    def note(self, live: LiveTurn) -> None:
        """Have what a turn recorded kept, with what others record now; its followers see it then."""
        if live.closing or live.is_guess:
            return
        self._noted[live] = None
        if not self._keeping and live not in self._under_way:
            self._keeping = True
            asyncio.get_running_loop().call_soon(self._keep)

    def hurry(self, live: LiveTurn) -> None:
        """Have a turn accepted now that has something to show: nobody sees it before."""
        self._store.hurry(live.key)

    def _keep(self) -> None:
        """Write down what was noted, in one go; what a turn of it notes meanwhile is written when this is."""
        self._keeping = False
        noted = [live for live in self._noted if live not in self._under_way]
        for live in noted:
            del self._noted[live]
        # What ends is kept with its end.
        batch = [(live, len(live.events), live.is_stored) for live in noted if not live.closing]
        if batch:
            self._under_way.update(live for live, _, _ in batch)
            entries = [
                JournalEntry(key=live.key, events=tuple(live.events[live.kept : count]), epoch=live.epoch)
                for live, count, _ in batch
            ]
            self._store.append(entries).then(lambda answer: self._kept(batch, answer))

    def _kept(self, batch: list[tuple[LiveTurn, int, bool]], answer: Collection[TurnKey] | MoltBotError) -> None:
        self._under_way.difference_update(live for live, _, _ in batch)
        if isinstance(answer, MoltBotError):
            # The store says why. It is tried again with what comes next, and with the end at the latest.
            if not self._is_refused:  # told once: there are many a second
                self._is_refused = True
                log.warning("what turns record cannot be kept now", extra={"error": answer.message})
        else:
            self._is_refused = False
            for live, count, was_stored in batch:
                if live.key not in answer:
                    live.kept = max(live.kept, count)
                    live.show(count)
                elif was_stored:
                    live.lose()
                elif live.is_stored:
                    # It was not there yet, because it had to take the place of another one. It is now.
                    self.note(live)
        if self._noted and not self._keeping:
            self._keep()

    def suspend(self, live: LiveTurn) -> None:
        """Forget what a turn was that is to be another one; whoever repeats its request_id finds it all the same."""
        self._let_go(live)
        self._noted.pop(live, None)

    def close(self, live: LiveTurn) -> None:
        """Let an ended turn go; it is found in the store from now on."""
        self._let_go(live)
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
        if isinstance(live.refusal, NotServing):
            self._elsewhere[live.key] = None
            if len(self._elsewhere) > _RECENT_REQUESTS:
                self._elsewhere.popitem(last=False)

    def _let_go(self, live: LiveTurn) -> None:
        if self._live.get(live.key) is live:  # one that another node had may have come meanwhile
            del self._live[live.key]

    def live(self, key: TurnKey) -> LiveTurn | None:
        """Return the turn if it is under way."""
        return self._live.get(key)

    def running(self, turn: StoredTurn) -> LiveTurn | None:
        """Return a turn of the store if it is under way here: its number alone may be another one's, not stored yet."""
        live = self._live.get(turn.key) if turn.state is TurnState.RUNNING else None
        return live if live is not None and live.input.request_id == turn.request_id else None

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
        # What the store has not taken yet may be refused: the request_id may be this one's, at another core.
        while (begun := self.begun(principal, turn.request_id)) and begun.digest != digest and not begun.is_stored:
            await begun.settled()
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
            NotServing: another core has it, and it has not ended.
        """
        if (live := self._told(key)) is not None:
            return live
        found = await self._store.find_turn(key)
        if found is None:
            raise TurnNotFound("there is no such turn in this workspace; its session may have been reset or deleted")
        if (live := self._told(key)) is not None:
            return live
        if found.state is TurnState.RUNNING and (self._store.shared or key in self._elsewhere):
            raise NotServing.elsewhere(found.node if found.node != self._store.node else "")
        return found

    def _told(self, key: TurnKey) -> LiveTurn | None:
        """Return the turn of which a caller may know: the number of one that is not stored may be another node's."""
        live = self._live.get(key)
        if live is None or live.is_stored:
            return live
        return None if self._store.shared or live.is_guess else live

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
            if turn.successor is not None:
                return await self.outcome(turn.successor)
            if turn.duplicate_of is None:
                raise TurnNotFound("the turn is gone")
            turn = turn.duplicate_of
            if (running := self.running(turn)) is not None:
                return await self.outcome(running)
        last = replay(turn)[-1]
        if not isinstance(last.kind, Completed | Failed):
            raise TurnNotFound("the turn was recorded without an end")
        return turn.key, last.sequence, last.kind


def content_error(earlier: bytes, digest: bytes) -> RequestIdReused | None:
    """Return the refusal of a request_id that stands for other content: the digests differ."""
    if earlier == digest:
        return None
    return RequestIdReused("this request_id was used before with other content; make a new one for a new message")


def same_content(earlier: bytes, digest: bytes) -> None:
    """Refuse a request_id that stands for other content.

    Raises:
        RequestIdReused: the digests differ.
    """
    if (error := content_error(earlier, digest)) is not None:
        raise error


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


def _unheard(events: Sequence[Event], after: int) -> Iterator[Event]:
    """Yield the events after a sequence number, but no reset to the very text that its reader has, or is told now.

    Such a one is where another core went on with an answer: for those who saw more than was kept of it.
    """
    text, last = "", 0
    for event in events:
        kind, before, last = event.kind, last, event.sequence
        if isinstance(kind, Reset):
            is_same, text = bool(text) and kind.text == text, kind.text
            if is_same and after <= before:
                continue
        elif isinstance(kind, TextDelta):
            text += kind.text
        if event.sequence > after:
            yield event


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
