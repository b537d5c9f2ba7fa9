"""Turns under way: events in order, readers at their own pace, an end for everybody who waits."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Collection, Sequence
from typing import Any, cast

import pytest
import uvloop
from moltbot_server.errors import NotServing, RequestIdReused, StorageFull, TurnNotFound
from moltbot_server.journal import Follower, Journal, replay
from moltbot_server.live_turn import LiveTurn
from moltbot_server.store import SEQUENCE_AFTER_CRASH, NewTurn, Pending, Store, StoredTurn
from moltbot_server.store.memory import MemoryStore
from moltbot_server.store.protocol import JournalEntry
from moltbot_server.ticker import Ticker
from moltbot_server.turns import (
    Accepted,
    Completed,
    Event,
    Failed,
    FinishReason,
    Notice,
    Principal,
    Queued,
    Reset,
    SessionKey,
    TextDelta,
    TextPart,
    Timings,
    TurnInput,
    TurnKey,
    TurnState,
    Usage,
)

CALLER = Principal(workspace="w", key_id="k", role="owner")
ACCEPTED = Accepted(session="s", ordinal=1, request_id="r")
END = Completed(text="", finish_reason=FinishReason.STOP, usage=Usage(), timings=Timings())


def begun(
    *,
    interval: float = 0.0,
    ordinal: int = 1,
    stored: bool = True,
    journal: Journal | None = None,
    is_guess: bool = False,
    **fields: Any,
) -> LiveTurn:
    key = TurnKey(session=SessionKey(workspace="w", session="s"), ordinal=ordinal)
    spoken = TurnInput(parts=(TextPart(text="x"),), **{"request_id": f"r{ordinal}", **fields})
    live = LiveTurn(
        key=key,
        turn=spoken,
        principal=CALLER,
        digest=b"d",
        arrived=0.0,
        interval=interval,
        journal=journal,
        is_guess=is_guess,
    )
    live.record(Accepted(session="s", ordinal=ordinal, request_id=spoken.request_id))
    if stored:
        live.stored()
    return live


def finish(live: LiveTurn, kind: Completed | Failed = END) -> None:
    live.end(live.close(kind)[-1])


def follow(live: LiveTurn, after: int = 0) -> Follower:
    """Follow a turn of a journal that never asks its store."""
    return Journal(cast("Store", None)).follow(live, after)


async def read(live: LiveTurn, after: int = 0) -> list[Event]:
    with follow(live, after) as batches:
        return [event async for batch in batches for event in batch]


def text(events: list[Event]) -> str:
    return "".join(event.kind.text for event in events if isinstance(event.kind, TextDelta))


async def test_every_reader_sees_everything_in_order_whenever_it_comes() -> None:
    live = begun()
    readers = [asyncio.create_task(read(live))]
    for number in range(20):
        live.say(f"{number} ")
        await asyncio.sleep(0)
        readers.append(asyncio.create_task(read(live)))
    finish(live)
    readers.append(asyncio.create_task(read(live)))

    for events in await asyncio.gather(*readers):
        assert events == live.events
    assert [event.sequence for event in live.events] == list(range(1, 23))


async def test_a_reader_from_any_place_sees_the_rest() -> None:
    live = begun()
    for number in range(10):
        live.say(str(number))
    finish(live)

    for place in range(14):
        assert await read(live, place) == live.events[place:]


async def test_nobody_is_told_anything_before_the_turn_is_stored() -> None:
    live = begun(stored=False)
    reader = asyncio.create_task(read(live))
    live.say("early")
    finish(live)
    await asyncio.sleep(0.01)
    assert not reader.done()
    live.stored()

    assert text(await reader) == "early"


async def test_a_turn_that_is_refused_lets_all_go_and_tells_them_why(store: Store) -> None:
    journal, live = Journal(store), begun(stored=False)
    journal.begin(live)
    follower = asyncio.ensure_future(anext(journal.follow(live), None))
    outcome = asyncio.create_task(journal.outcome(live))
    await asyncio.sleep(0)
    live.stored(refusal=NotServing("leaving"))

    for waiting in (follower, outcome):
        with pytest.raises(NotServing):
            await asyncio.wait_for(waiting, 1)
    journal.close(live)
    assert len(journal) == 0


async def test_text_is_gathered_within_the_interval_and_the_first_piece_goes_at_once() -> None:
    live = begun(interval=0.05)
    for piece in "abcdef":
        live.say(piece)
    assert [event.kind for event in live.events[1:]] == [TextDelta(text="a")]
    await asyncio.sleep(0.1)
    assert [event.kind for event in live.events[2:]] == [TextDelta(text="bcdef")]
    live.say("g")
    live.record(Notice(code="X", origin="", target="", reason=""))

    assert [type(event.kind) for event in live.events[3:]] == [TextDelta, Notice]
    assert live.text == "abcdefg"
    finish(live)
    assert text(await read(live)) == "abcdefg"


async def test_the_first_of_all_turns_shares_the_one_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(MemoryStore())
    live = begun(interval=10.0, journal=journal)  # nothing is under way yet, so the journal is empty
    asked: list[Any] = []
    monkeypatch.setattr(journal.ticker, "call_within", lambda *what: asked.append(what))
    live.say("first")
    live.say("held back")
    assert len(asked) == 1


async def test_text_that_waits_is_part_of_the_end() -> None:
    live = begun(interval=10.0)
    for piece in "abc":
        live.say(piece)
    events = live.close(END)

    assert text(list(events)) == "abc"
    assert isinstance(events[-1].kind, Completed)
    sequences = [event.sequence for event in events]
    assert all(one < other for one, other in itertools.pairwise(sequences))


async def test_a_slow_reader_gets_what_waited_as_one_under_the_last_number() -> None:
    live = begun(interval=0.001)
    stream = follow(live)
    first = await anext(stream)
    for piece in "abcdefgh":
        live.record(TextDelta(text=piece))
    live.record(Notice(code="X", origin="", target="", reason=""))
    live.record(TextDelta(text="i"))
    late = await anext(stream)
    stream.close()

    assert [event.sequence for event in (*first, *late)] == [1, 9, 10, 11]
    assert [type(event.kind) for event in late] == [TextDelta, Notice, TextDelta]
    assert text(late) == "abcdefghi"
    assert [event.sequence for event in await _rest(live, 9)] == [10, 11, 12]


async def _rest(live: LiveTurn, after: int) -> list[Event]:
    finish(live)
    return await read(live, after)


async def test_each_delta_stays_an_event_when_no_interval_is_wanted() -> None:
    live = begun(interval=0.0)
    for piece in "abcd":
        live.say(piece)
    finish(live)

    assert len(await read(live)) == 6


async def test_the_last_follower_that_leaves_cancels_the_turn_if_that_was_asked_for() -> None:
    for wanted in (True, False):
        live = begun(cancel_on_disconnect=wanted)
        one, other = follow(live), follow(live)
        await anext(one)
        await anext(other)
        one.close()
        assert not live.cancelling
        other.close()
        assert live.cancelling is wanted


async def test_followers_that_leave_at_the_end_cancel_nothing() -> None:
    live = begun(cancel_on_disconnect=True)
    finish(live)
    await read(live)

    assert not live.cancelling


async def test_a_turn_that_is_ending_cannot_be_cancelled() -> None:
    live = begun()
    live.close(END)

    assert live.cancel() is False


async def test_the_outcome_is_the_last_event_for_all_who_wait() -> None:
    live = begun()
    waiting = [asyncio.create_task(live.outcome()) for _ in range(10)]
    await asyncio.sleep(0)
    finish(live)

    assert await asyncio.gather(*waiting) == [END] * 10
    assert await live.outcome() == END


async def test_a_follower_that_is_cancelled_disturbs_no_other() -> None:
    live = begun()
    gone, stays = asyncio.create_task(read(live)), asyncio.create_task(read(live))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.wait({gone})
    live.say("x")
    finish(live)

    assert text(await stays) == "x"


async def test_a_request_id_is_known_while_its_turn_runs_and_after_its_end(store: Store) -> None:
    journal, live = Journal(store), begun()
    row = NewTurn(key=live.key, request_id="r1", digest=b"d", create_time=1.0, question=(TextPart(text="x"),))
    await store.accept(row)
    journal.begin(live)
    assert await journal.repeated(CALLER, live.input, b"d") is live
    with pytest.raises(RequestIdReused):
        await journal.repeated(CALLER, live.input, b"other")
    finish(live)
    journal.close(live)

    found = await journal.repeated(CALLER, live.input, b"d")
    assert isinstance(found, StoredTurn)
    with pytest.raises(RequestIdReused):
        await journal.repeated(CALLER, live.input, b"other")
    stranger = Principal(workspace="other", key_id="k", role="owner")
    assert await journal.repeated(stranger, live.input, b"other") is None


async def test_a_turn_that_may_be_started_again_is_forgotten_at_its_end(store: Store) -> None:
    journal, live = Journal(store), begun()
    journal.begin(live)
    finish(live, Failed(status=14, reason="X", message="x", retryable=True))
    journal.close(live)

    assert await journal.repeated(CALLER, live.input, b"d") is None


async def test_a_turn_that_stands_in_for_another_is_followed_while_it_runs_and_after(store: Store) -> None:
    journal = Journal(store)
    first, second = begun(), begun(ordinal=2, stored=False)
    journal.begin(first)
    journal.begin(second)
    stands_in = StoredTurn(key=first.key, request_id="r1", digest=b"d", state=TurnState.RUNNING, create_time=1.0)
    second.stored(duplicate_of=stands_in)
    follower = asyncio.create_task(_all(journal, second))
    outcome = asyncio.create_task(journal.outcome(second))
    await asyncio.sleep(0)
    first.say("hello")
    finish(first)

    assert text(await asyncio.wait_for(follower, 1)) == "hello"
    assert await asyncio.wait_for(outcome, 1) == (first.key, first.events[-1].sequence, END)


async def _all(journal: Journal, turn: LiveTurn | StoredTurn) -> list[Event]:
    with journal.follow(turn) as batches:
        return [event async for batch in batches for event in batch]


async def test_a_turn_that_a_crash_cut_is_told_with_an_end_beyond_all_that_was_seen(store: Store) -> None:
    cut = StoredTurn(
        key=TurnKey(session=SessionKey(workspace="w", session="s"), ordinal=3),
        request_id="r",
        digest=b"d",
        state=TurnState.FAILED,
        create_time=5.0,
        retryable=True,
    )
    accepted, last = replay(cut)

    assert accepted.kind == Accepted(session="s", ordinal=3, request_id="r")
    assert isinstance(last.kind, Failed)
    assert (last.sequence, last.kind.reason, last.kind.retryable) == (SEQUENCE_AFTER_CRASH, "TURN_INTERRUPTED", True)


@pytest.mark.parametrize("after", [0, 1, 2, 3])
async def test_whoever_saw_no_more_than_was_kept_hears_of_no_take_over_after_the_end(store: Store, after: int) -> None:
    reader = Journal(store).follow(taken_over(Reset(text="one two", reason="gone")), after)
    kinds = [event.kind for batch in [batch async for batch in reader] for event in batch]
    assert kinds == [ACCEPTED, TextDelta(text="one"), TextDelta(text=" two"), TextDelta(text=" three"), END][after:]


@pytest.mark.parametrize("after", [4, SEQUENCE_AFTER_CRASH])
async def test_whoever_saw_more_than_was_kept_hears_what_counts_also_after_the_end(store: Store, after: int) -> None:
    reset = Reset(text="one two", reason="gone")
    reader = Journal(store).follow(taken_over(reset), after)
    assert [event.kind for batch in [batch async for batch in reader] for event in batch] == [
        reset,
        TextDelta(text=" three"),
        END,
    ]


@pytest.mark.parametrize("text", ["", "one"])
async def test_an_answer_that_was_begun_anew_says_so_after_the_end(store: Store, text: str) -> None:
    reader = Journal(store).follow(taken_over(Reset(text=text, reason="anew")), 3)
    kinds = [event.kind for batch in [batch async for batch in reader] for event in batch]
    assert kinds == [Reset(text=text, reason="anew"), TextDelta(text=" three"), END]


def taken_over(reset: Reset) -> StoredTurn:
    """Return a turn that has ended, and that another core took over when two words of it were kept."""
    first = SEQUENCE_AFTER_CRASH + 1
    kinds = (ACCEPTED, TextDelta(text="one"), TextDelta(text=" two"), reset, TextDelta(text=" three"), END)
    numbers = (1, 2, 3, first, first + 1, first + 2)
    return StoredTurn(
        key=TurnKey(session=SessionKey(workspace="w", session="s"), ordinal=1),
        request_id="r",
        digest=b"",
        state=TurnState.COMPLETED,
        create_time=1.0,
        events=tuple(Event(sequence=number, at=1.0, kind=kind) for number, kind in zip(numbers, kinds, strict=True)),
    )


async def test_an_unknown_turn_is_not_found(store: Store) -> None:
    with pytest.raises(TurnNotFound):
        await Journal(store).find(TurnKey(session=SessionKey(workspace="w", session="s"), ordinal=1))


def test_a_time_that_has_come_already_is_known_to_the_loop_that_a_core_runs_on() -> None:
    async def late() -> tuple[list[str], bool]:
        ticker, called, over = Ticker(), list[str](), asyncio.Event()
        ticker.call_within(0, lambda: called.append("now"))
        ticker.call_within(-1, over.set)
        live = begun()
        live.expire_at(asyncio.get_running_loop().time() - 1)
        live.allow_until(asyncio.get_running_loop().time() + 60)
        await over.wait()
        live.let_go()
        return called, live.late

    assert uvloop.run(late()) == (["now"], False)


async def test_a_turn_that_has_its_answer_before_its_deadline_is_set_still_knows_the_deadline() -> None:
    # The store may say that the answer came of old memory: the turn that is begun again ends by the same deadline.
    deadline = asyncio.get_running_loop().time() + 60
    live = begun(stored=False)
    live.close(END)
    live.expire_at(deadline)
    assert live.expires_at == deadline

    live.allow_until(deadline + 60)
    assert live.expires_at == deadline + 60
    live.let_go()


class SlowStore:
    """Takes what turns record, and answers when it is told to."""

    shared = False

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], Pending[Collection[TurnKey]]]] = []
        self.hurried: list[int] = []

    def hurry(self, key: TurnKey) -> None:
        self.hurried.append(key.ordinal)

    def append(self, entries: Sequence[JournalEntry]) -> Pending[Collection[TurnKey]]:
        answer: Pending[Collection[TurnKey]] = Pending()
        self.asked.append(([entry.key.ordinal for entry in entries], answer))
        return answer


async def test_what_a_turn_records_waits_for_its_own_writes_and_not_for_those_of_others() -> None:
    store: Any = SlowStore()
    journal = Journal(store)
    first, second = (begun(ordinal=number, journal=journal) for number in (1, 2))
    first.say("a")
    await asyncio.sleep(0)
    first.say("b")
    second.say("c")
    await asyncio.sleep(0)

    assert [ordinals for ordinals, _ in store.asked] == [[1], [2]]
    store.asked[1][1].settle(())
    assert (text(first.events[: first.visible]), text(second.events[: second.visible])) == ("", "c")
    store.asked[0][1].settle(())
    assert text(first.events[: first.visible]) == "a"
    assert [ordinals for ordinals, _ in store.asked] == [[1], [2], [1]]
    store.asked[2][1].settle(())
    assert text(first.events[: first.visible]) == "ab"


async def test_nothing_of_a_turn_that_is_a_guess_is_written_before_it_is_accepted() -> None:
    store: Any = SlowStore()
    journal = Journal(store)
    live = begun(journal=journal, is_guess=True)
    live.say("a")
    await asyncio.sleep(0)
    assert not store.asked

    live.is_guess = False
    journal.note(live)
    await asyncio.sleep(0)
    assert [ordinals for ordinals, _ in store.asked] == [[1]]


@pytest.mark.parametrize("is_guess", [False, True])
async def test_a_turn_that_has_something_to_show_is_accepted_now(is_guess: bool) -> None:
    store: Any = SlowStore()
    live, stored = (
        begun(ordinal=number, journal=Journal(store), is_guess=is_guess, stored=number == 2) for number in (1, 2)
    )
    for turn in (live, stored):
        turn.record(Queued(position=1))
    assert not store.hurried, "where it stands is seen at once"

    for turn in (live, stored):
        turn.say("a")
    assert store.hurried == [1]
    live.stored()
    live.say("b")
    live.close(END)
    begun(ordinal=3, journal=Journal(store), stored=False).close(END)
    assert store.hurried == [1, 3]


class Refusing(MemoryStore):
    """A store that keeps nothing while `refuses` says so."""

    refuses = True

    def append(self, entries: Sequence[JournalEntry]) -> Pending[Collection[TurnKey]]:
        """Refuse, or keep it."""
        answer: Pending[Collection[TurnKey]] = Pending()
        answer.settle(StorageFull("the disk is full") if self.refuses else ())
        return answer


async def test_a_store_that_keeps_nothing_is_said_once_until_it_keeps_something(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = Refusing()
    journal = Journal(store)
    live = begun(journal=journal)
    journal.begin(live)
    for store.refuses in (True, False, True):
        caplog.clear()
        for piece in "abc":
            live.say(piece)
            journal.note(live)
            await asyncio.sleep(0.01)
        told = [record.message for record in caplog.records]
        assert told == ["what turns record cannot be kept now"] * store.refuses
