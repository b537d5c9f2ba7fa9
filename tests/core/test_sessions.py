"""Sessions at hand: one turn at a time, in order, and no turn on what is being changed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest
from kept_turns import known
from moltbot_server.errors import SessionBusy, SessionNotFound
from moltbot_server.live_turn import LiveTurn
from moltbot_server.sessions import OpenSession, Sessions
from moltbot_server.store import NewTurn, Store
from moltbot_server.turns import Message, Principal, Queued, SessionKey, TextPart, TurnInput, TurnKey

KEY = SessionKey(workspace="w", session="s")
CALLER = Principal(workspace="w", key_id="k", role="owner")


class Remembered:
    """A history that is a list."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def extend(self, messages: Iterable[Message]) -> None:
        """Add messages."""
        self.messages.extend(messages)


@pytest.fixture
def sessions(store: Store) -> Sessions[Remembered]:
    """Sessions over an empty store."""

    def remember(messages: Iterable[Message] = ()) -> Remembered:
        made = Remembered()
        made.extend(messages)
        return made

    return Sessions(store, remember)


def spoken(session: OpenSession[Remembered]) -> LiveTurn:
    key = TurnKey(session=session.key, ordinal=session.claim())
    said = TurnInput(parts=(TextPart(text="x"),), request_id=f"r{key.ordinal}")
    return LiveTurn(key=key, turn=said, principal=CALLER, digest=b"d", arrived=0.0)


async def entered(session: OpenSession[Remembered], live: LiveTurn) -> None:
    """Wait until the session is a turn's."""
    place = asyncio.Event()
    if not session.enter(live, place.set):
        await place.wait()


def never() -> None:
    raise AssertionError("a turn that has the session is not called")


def told(live: LiveTurn) -> list[int]:
    return [event.kind.position for event in live.events if isinstance(event.kind, Queued)]


async def test_turns_take_a_session_one_after_the_other_in_the_order_they_came(sessions: Sessions[Remembered]) -> None:
    session = await sessions.open(KEY)
    running: list[int] = []
    done: list[int] = []

    async def turn(live: LiveTurn) -> None:
        await entered(session, live)
        running.append(live.key.ordinal)
        assert len(running) == 1
        await asyncio.sleep(0.001)
        done.append(running.pop())
        session.leave()
        session.release()

    lives = [spoken(session) for _ in range(20)]
    await asyncio.gather(*(turn(live) for live in lives))

    assert done == list(range(1, 21))
    assert [told(live) for live in lives] == [list(range(place, 0, -1)) for place in range(20)]
    assert (session.running, session.claims, len(session.waiting)) == (None, 0, 0)


async def test_a_waiting_turn_that_withdraws_leaves_the_queue_and_the_others_move_up(
    sessions: Sessions[Remembered],
) -> None:
    session = await sessions.open(KEY)
    first, second, third = (spoken(session) for _ in range(3))
    called = asyncio.Event()
    assert session.enter(first, never)
    assert not session.enter(second, never)
    assert not session.enter(third, called.set)
    session.withdraw(second)
    assert told(third) == [2, 1]
    session.leave()

    await asyncio.wait_for(called.wait(), 1)
    assert session.running is third


async def test_a_turn_that_withdraws_in_the_moment_that_it_gets_the_session_gives_it_on(
    sessions: Sessions[Remembered],
) -> None:
    session = await sessions.open(KEY)
    first, second, third = (spoken(session) for _ in range(3))
    called = asyncio.Event()
    assert session.enter(first, never)
    assert not session.enter(second, lambda: None)
    assert not session.enter(third, called.set)
    session.leave()
    assert session.running is second
    session.withdraw(second)

    await asyncio.wait_for(called.wait(), 1)
    assert session.running is third


async def test_many_who_open_one_session_get_the_same_one(sessions: Sessions[Remembered], store: Store) -> None:
    opened = await asyncio.gather(*(sessions.open(KEY) for _ in range(50)))

    assert len(set(map(id, opened))) == 1
    assert len(sessions) == 1
    assert sessions.at_hand(KEY) is opened[0]


async def stored(store: Store, ordinal: int = 1) -> None:
    key = TurnKey(session=KEY, ordinal=ordinal)
    row = NewTurn(key=key, request_id=f"r{ordinal}", digest=b"d", create_time=1.0, question=(TextPart(text="x"),))
    assert await store.accept(await known(store, row)) is None


async def test_numbers_go_on_where_the_store_left_off(sessions: Sessions[Remembered], store: Store) -> None:
    await stored(store, 7)

    assert (await sessions.open(KEY)).claim() == 8


async def test_a_session_that_is_deleted_is_opened_only_afterwards_and_as_a_new_one(
    sessions: Sessions[Remembered], store: Store
) -> None:
    await stored(store, 7)
    before = await sessions.open(KEY)
    deleting = asyncio.create_task(sessions.delete(KEY))
    await asyncio.sleep(0)
    opening = [asyncio.create_task(sessions.open(KEY)) for _ in range(5)]
    await deleting
    after = await asyncio.gather(*opening)

    assert before not in after
    assert len(set(map(id, after))) == 1
    assert after[0].claim() == 1


async def test_a_change_of_one_session_holds_no_other_back(sessions: Sessions[Remembered], store: Store) -> None:
    await stored(store)
    other = await sessions.open(SessionKey(workspace="w", session="other"))
    changed = await sessions.open(KEY)
    changed.claim()
    deleting = asyncio.create_task(sessions.delete(KEY))  # waits for the turn that has claimed
    await asyncio.sleep(0)  # lets it begin
    await asyncio.sleep(0)
    assert sessions.ready(KEY) is None

    assert sessions.ready(other.key) is other
    changed.release()
    await deleting
    assert sessions.ready(KEY) is None
    assert sessions.ready(other.key) is other


async def test_deleting_waits_for_a_turn_that_has_claimed_and_not_begun(
    sessions: Sessions[Remembered], store: Store
) -> None:
    await stored(store)
    session = await sessions.open(KEY)
    live = spoken(session)
    deleting = asyncio.create_task(sessions.delete(KEY))
    await asyncio.sleep(0.01)
    assert not deleting.done()
    assert session.enter(live, never)
    await asyncio.sleep(0.01)
    assert live.cancelling
    session.leave()
    session.release()

    await asyncio.wait_for(deleting, 1)


async def test_a_session_that_there_is_not_can_be_neither_reset_nor_deleted(sessions: Sessions[Remembered]) -> None:
    for change in (sessions.reset, sessions.delete):
        with pytest.raises(SessionNotFound):
            await change(KEY)
    assert len(sessions) == 0


async def test_a_session_is_busy_from_the_moment_that_a_turn_claims_it(
    sessions: Sessions[Remembered], store: Store
) -> None:
    await stored(store)
    session = await sessions.open(KEY)
    session.claim()
    with pytest.raises(SessionBusy):
        await sessions.reset(KEY)
    session.release()
    await sessions.reset(KEY)
    await sessions.reset(KEY)

    assert (await sessions.open(KEY)).claim() == 3 - 1


async def test_only_so_many_sessions_are_kept_at_hand_and_none_that_is_in_use(
    sessions: Sessions[Remembered], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moltbot_server.sessions._SESSIONS_AT_HAND", 10)
    used = await sessions.open(KEY)
    used.claim()
    for number in range(100):
        await sessions.open(SessionKey(workspace="w", session=str(number)))

    assert sessions.at_hand(KEY) is used
    assert len(sessions) <= 11


@pytest.mark.parametrize("change", ["reset", "delete"])
async def test_a_change_whose_caller_leaves_is_seen_by_store_and_memory_alike(
    sessions: Sessions[Remembered], store: Store, change: str
) -> None:
    left = 0
    for ticks in range(40):
        await stored(store, ticks + 1)
        session = await sessions.open(KEY)
        asking = asyncio.create_task(getattr(sessions, change)(KEY))
        for _ in range(ticks % 20):
            await asyncio.sleep(0 if ticks < 20 else 0.0001)
        asking.cancel()
        await asyncio.wait({asking})
        left += asking.cancelled()
        remembered = await sessions.open(KEY) is session
        known = await store.find_turn(TurnKey(session=KEY, ordinal=ticks + 1)) is not None
        assert remembered == known
    assert left


async def test_a_caller_that_leaves_while_its_session_is_read_does_not_take_it_from_the_others(
    sessions: Sessions[Remembered],
) -> None:
    callers = [asyncio.create_task(sessions.open(KEY)) for _ in range(3)]
    await asyncio.sleep(0)
    if callers[0].done():
        pytest.skip("nothing is read: this store has it in memory")
    callers[0].cancel()

    first, second, third = await asyncio.gather(*callers, return_exceptions=True)

    assert isinstance(first, asyncio.CancelledError)
    assert isinstance(second, OpenSession)
    assert third is second
