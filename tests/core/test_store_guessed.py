"""Sessions that are taken for new without a look: every store refuses their turns if there is such a session."""

from __future__ import annotations

import msgspec
from kept_turns import ended, keep, key, known, new, said, texts
from moltbot_server.store import GUESSED, Moved, NewTurn, Store, StoredTurn
from moltbot_server.turns import TurnInput, TurnState

ASKED = TurnInput(parts=said("question"))


def guess(ordinal: int = 1, **fields: object) -> NewTurn:
    return new(ordinal, version=GUESSED, rest=ASKED, **fields)


async def test_a_session_that_is_taken_for_new_is_made_if_there_is_none(store: Store) -> None:
    turn = guess()

    assert await store.accept(turn) is None
    assert await store.finish(ended(turn)) is None
    assert await texts(store) == ["question", "answer"]
    loaded = await store.load_session(key(), 10)
    assert loaded is not None
    assert loaded.last_ordinal == 1


async def test_a_session_that_there_is_is_not_taken_for_new_not_even_by_its_own_node(store: Store) -> None:
    await keep(store, new(1))

    for turn in (guess(1, request_id="other"), guess(2, request_id="another")):
        assert await store.accept(turn) == Moved()
        assert await store.reaccept(turn) == Moved()
    assert await texts(store) == ["question", "answer"]


async def test_a_session_in_which_a_turn_runs_is_not_taken_for_new(store: Store) -> None:
    assert await store.accept(new(1, rest=ASKED)) is None

    assert await store.accept(guess(1, request_id="other")) == Moved()


async def test_a_session_that_was_reset_is_not_new_and_one_that_was_deleted_is(store: Store) -> None:
    await keep(store, new(1))
    await store.reset_session(key())
    assert await store.accept(guess(request_id="after")) == Moved()
    await keep(store, new(2))
    assert await store.accept(guess(request_id="after")) == Moved(), "its number is free, and the session is not new"

    assert await store.delete_session(key())
    assert await store.accept(guess(request_id="after")) is None


async def test_a_guess_is_told_of_the_turn_that_its_request_id_started(store: Store) -> None:
    turn = guess()
    assert await store.accept(turn) is None
    await store.finish(ended(turn, state=TurnState.FAILED))

    again = msgspec.structs.replace(turn, create_time=turn.create_time + 0.5)
    earlier = await store.accept(again)

    assert isinstance(earlier, StoredTurn)
    assert (earlier.state, earlier.create_time) == (TurnState.FAILED, turn.create_time)


async def test_a_guess_that_is_sent_twice_is_one_turn(store: Store) -> None:
    turn = guess()

    assert await store.accept(turn) is None
    assert await store.accept(turn) is None
    assert await texts(store) == ["question"]


async def test_the_next_turns_of_a_guessed_session_need_no_second_look(store: Store) -> None:
    assert await store.accept(guess()) is None

    for number in (2, 3):
        assert await store.accept(await known(store, new(number))) is None
        assert await store.accept(new(number + 10, version=-1)) is None
