"""What every store promises, whichever keeps the sessions: see `moltbot_server.store.Store`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
from kept_turns import TIMES, Reopen, ended, everything, keep, key, new, said, texts
from moltbot_server.errors import StorageUnavailable, TurnInterrupted
from moltbot_server.store import NewTurn, Store, StoredSession, StoredTurn
from moltbot_server.store.protocol import JournalEntry
from moltbot_server.store.sqlite import SqliteStore
from moltbot_server.turns import Event, FinishReason, Message, TextDelta, TurnInput, TurnState


async def test_a_turn_is_found_as_it_ended(store: Store, reopen: Reopen) -> None:
    turn = new()
    end = await keep(store, turn)
    expected = StoredTurn(
        key=turn.key,
        request_id=turn.request_id,
        digest=turn.digest,
        state=TurnState.COMPLETED,
        create_time=turn.create_time,
        end_time=end.end_time,
        events=end.events,
    )

    assert await store.find_turn(turn.key) == expected
    assert await (await reopen()).find_turn(turn.key) == expected


async def test_an_unknown_turn_or_session_is_none(store: Store) -> None:
    assert await store.find_turn(new().key) is None
    assert await store.load_session(key(), 10) is None
    assert await store.get_session(key()) is None
    assert await store.list_messages(key(), after=(0, 0), limit=10) == []
    assert await store.delete_session(key()) is False


async def test_a_running_turn_has_no_events_and_its_question_is_listed(store: Store) -> None:
    turn = new()
    await store.accept(turn)

    found = await store.find_turn(turn.key)
    assert found is not None
    assert (found.state, found.events, found.retryable, found.end_time) == (TurnState.RUNNING, (), False, 0.0)
    assert await texts(store) == ["question"]


async def test_a_turn_of_which_too_little_was_kept_has_failed_and_may_be_started_again(
    store: Store, reopen: Reopen
) -> None:
    turn = new()
    await store.accept(turn)
    store = await reopen()
    assert await store.take_over() == []

    found = await store.find_turn(turn.key)
    assert found is not None
    assert (found.state, found.events, found.retryable) == (TurnState.FAILED, (), True)
    assert await texts(store) == ["question"]


def wrote(turn: NewTurn, *words: str, first: int = 1, epoch: int = 1) -> JournalEntry:
    events = (Event(sequence=first + place, at=1.0, kind=TextDelta(text=word)) for place, word in enumerate(words))
    return JournalEntry(key=turn.key, events=tuple(events), epoch=epoch)


async def test_a_turn_whose_core_is_gone_is_taken_over_with_all_that_was_kept_of_it(
    store: Store, reopen: Reopen
) -> None:
    asked = TurnInput(parts=said("question"), model="m", system_prompt="Be brief.", user="ann", flush_interval=0.5)
    first, second = (new(number, rest=asked, deadline=99.5) for number in (1, 2))
    for turn in (first, second):
        await store.accept(turn)
    await store.append([wrote(first, "one", "two")])
    await store.append([wrote(first, "three", first=3), wrote(second)])
    store = await reopen()

    orphans = await store.take_over()
    assert [(orphan.turn.key, orphan.epoch, orphan.deadline) for orphan in orphans] == [
        (first.key, 2, 99.5), (second.key, 2, 99.5),
    ]  # fmt: skip
    assert [orphan.input for orphan in orphans] == [asked, asked]
    assert [event.kind for event in orphans[0].turn.events] == [
        TextDelta(text=word) for word in ("one", "two", "three")
    ]
    assert orphans[1].turn.events == ()
    assert orphans[0].turn.digest == first.digest


async def test_nothing_is_taken_from_a_core_that_has_lost_its_turn(store: Store, reopen: Reopen) -> None:
    asked = TurnInput(parts=said("question"))
    turn = new(rest=asked)
    await store.accept(turn)
    store = await reopen()
    await store.take_over()

    assert list(await store.append([wrote(turn, "stale")])) == [turn.key]
    assert list(await store.append([wrote(turn, "fresh", first=7, epoch=2)])) == []
    with pytest.raises(TurnInterrupted):
        await store.finish(ended(turn))
    await store.finish(msgspec.structs.replace(ended(turn, answer="right"), epoch=2))
    assert await texts(store) == ["question", "right"]
    store = await reopen()
    assert await store.take_over() == []


async def test_what_is_kept_of_a_turn_is_gone_when_it_has_ended_or_its_session_is(store: Store, reopen: Reopen) -> None:
    asked = TurnInput(parts=said("question"))
    whole, deleted = new(rest=asked), new(session="gone", rest=asked)
    for turn in (whole, deleted):
        await store.accept(turn)
        await store.append([wrote(turn, "word")])
    await store.finish(ended(whole))
    await store.append([wrote(whole, "late", first=2)])
    await store.delete_session(deleted.key.session)
    store = await reopen()

    assert await store.take_over() == []
    assert await texts(store) == ["question", "answer"]


async def test_a_request_id_belongs_to_one_turn_of_a_workspace(store: Store) -> None:
    first, second = new(request_id="r"), new(2, request_id="r", digest=b"other")
    end = await keep(store, first)

    earlier = await store.accept(second)
    assert earlier is not None
    assert (earlier.key, earlier.digest, earlier.events) == (first.key, b"d", end.events)
    assert await store.find_turn(second.key) is None
    assert await store.accept(new(workspace="other", request_id="r")) is None
    assert await texts(store) == ["question", "answer"]


async def test_many_turns_of_one_request_id_at_once_are_one(store: Store) -> None:
    turns = [new(ordinal, request_id="r") for ordinal in range(1, 201)]
    answers = await asyncio.gather(*(store.accept(turn) for turn in turns))

    assert answers.count(None) == 1
    winner = turns[answers.index(None)].key
    assert {answer.key for answer in answers if answer is not None} == {winner}
    assert await texts(store) == ["question"]


async def test_a_turn_that_is_accepted_twice_is_the_same_turn(store: Store) -> None:
    turn = new()
    await store.accept(turn)

    assert await store.accept(turn) is None
    assert await texts(store) == ["question"]


@pytest.mark.parametrize("waits", [True, False], ids=["after it", "together with it"])
async def test_an_end_may_be_stored_before_the_store_has_answered(store: Store, waits: bool) -> None:
    turn = new()
    accepted = store.accept(turn)
    if waits:
        await accepted
    finished = store.finish(ended(turn))

    assert await accepted is None
    await finished
    found = await store.find_turn(turn.key)
    assert found is not None
    assert found.state == TurnState.COMPLETED
    assert await texts(store) == ["question", "answer"]


async def test_the_end_of_a_turn_that_was_not_taken_changes_nothing(store: Store) -> None:
    first = new(request_id="r")
    end = await keep(store, first)
    second = new(2, request_id="r")
    accepted, finished = store.accept(second), store.finish(ended(second, answer="another"))

    assert await accepted is not None
    await finished
    assert await store.find_turn(second.key) is None
    found = await store.find_turn(first.key)
    assert found is not None
    assert found.events == end.events


async def test_a_failed_turn_gives_its_request_id_and_its_question_to_the_next(store: Store, reopen: Reopen) -> None:
    first, second = new(request_id="r"), new(2, request_id="r")
    end = await keep(store, first, state=TurnState.FAILED)
    earlier = await store.accept(second)
    assert earlier is not None
    assert earlier.retryable
    assert await store.reaccept(second) is None
    await store.finish(ended(second))

    for again in (False, True):
        current = await reopen() if again else store
        assert await texts(current) == ["question", "answer"]
        session = await current.get_session(key())
        assert session is not None
        assert session.message_count == 2
        old = await current.find_turn(first.key)
        assert old is not None
        assert (old.request_id, old.events) == ("r", end.events)
        answered = await current.accept(new(3, request_id="r"))
        assert answered is not None
        assert answered.key == second.key


async def test_a_turn_is_started_again_as_often_as_it_fails(store: Store) -> None:
    await keep(store, new(1, request_id="r"), state=TurnState.FAILED)
    for ordinal in range(2, 6):
        turn = new(ordinal, request_id="r")
        assert await store.reaccept(turn) is None
        await store.finish(ended(turn, state=TurnState.FAILED))

    assert await texts(store) == ["question"]


async def test_a_turn_that_ended_well_does_not_give_its_request_id_away(store: Store) -> None:
    first, second = new(request_id="r"), new(2, request_id="r")
    await keep(store, first)

    earlier = await store.reaccept(second)
    assert earlier is not None
    assert earlier.key == first.key


@pytest.mark.parametrize(("retryable", "expected"), [(True, True), (False, False)])
async def test_a_failed_turn_is_retryable_if_its_last_event_says_so(
    store: Store, retryable: bool, expected: bool
) -> None:
    turn = new()
    await keep(store, turn, state=TurnState.FAILED, retryable=retryable)

    found = await store.find_turn(turn.key)
    assert found is not None
    assert found.retryable is expected


async def test_a_session_is_loaded_with_its_latest_answered_turns_oldest_first(store: Store) -> None:
    for ordinal in range(1, 8):
        state = TurnState.FAILED if ordinal == 4 else TurnState.CANCELLED if ordinal == 6 else TurnState.COMPLETED
        await keep(store, new(ordinal, text=f"q{ordinal}"), answer=f"a{ordinal}", state=state)
    await keep(store, new(8, text="q8"), answer="", state=TurnState.CANCELLED)
    await store.accept(new(9, text="q9"))

    loaded = await store.load_session(key(), 4)
    assert loaded is not None
    assert loaded.last_ordinal == 9
    assert [message.text for message in loaded.messages] == ["q3", "a3", "q5", "a5", "q6", "a6", "q7", "a7"]


async def test_a_question_that_another_turn_answered_too_is_loaded_with_the_session(store: Store) -> None:
    await keep(store, new(1, text="q1"), answer="a1")
    for ordinal in (2, 3):
        turn = new(ordinal, text=f"q{ordinal}")
        await store.accept(turn)
        joined = {"answer": (), "model": "", "finish_reason": FinishReason.JOINED}
        await store.finish(msgspec.structs.replace(ended(turn, answer=""), **joined))
    await keep(store, new(4, text="q4"), answer="a4")

    loaded = await store.load_session(key(), 10)
    assert isinstance(loaded, StoredSession)
    assert [message.text for message in loaded.messages] == ["q1", "a1", "q2", "q3", "q4", "a4"]
    assert await texts(store) == ["q1", "a1", "q2", "q3", "q4", "a4"]
    listed = await store.get_session(key())
    assert listed is not None
    assert listed.message_count == 6


async def test_messages_are_listed_after_any_place(store: Store) -> None:
    for ordinal in (1, 2, 4):
        await keep(store, new(ordinal, text=f"q{ordinal}"), answer=f"a{ordinal}")
    await store.accept(new(7, text="q7"))
    whole = list(await store.list_messages(key(), after=(0, 0), limit=100))

    assert [message.id for message in whole] == ["1.0", "1.1", "2.0", "2.1", "4.0", "4.1", "7.0"]
    for start, message in enumerate(whole, start=1):
        place = (message.turn, int(message.id.partition(".")[2]))
        for limit in (1, 2, 3, 10):
            assert list(await store.list_messages(key(), after=place, limit=limit)) == whole[start : start + limit]
    assert await store.list_messages(key(), after=(3, 1), limit=100) == whole[4:]
    assert await store.list_messages(key(), after=(9, 0), limit=100) == []


async def test_a_message_is_kept_whole(store: Store) -> None:
    text = "\x00 \N{GRINNING FACE} 你好 \ud7ff\ue000" + "x" * 300_000
    turn = new(text=text, title="a\x00b", user="\u202euser", channel="web")
    end = await keep(store, turn, answer=text[::-1])

    asked, answered = await store.list_messages(key(), after=(0, 0), limit=10)
    assert asked == Message(role=asked.role, parts=said(text), id="1.0", turn=1, create_time=turn.create_time)
    assert (answered.text, answered.model, answered.create_time) == (text[::-1], "m", end.end_time)
    session = await store.get_session(key())
    assert session is not None
    assert (session.title, session.user, session.channel) == ("a\x00b", "\u202euser", "web")


async def test_sessions_are_listed_last_used_first_and_in_pages(store: Store, reopen: Reopen) -> None:
    for name in "abcdefg":
        await keep(
            store, new(session=name, title=name, user=f"u{ord(name) % 2}", channel="web" if name < "d" else "cli")
        )
    await keep(store, new(2, session="b", opens_session=False))

    for again in (False, True):
        current = await reopen() if again else store
        whole = list(await current.list_sessions("w", user="", channel="", before=None, limit=100))
        assert [session.key.session for session in whole] == list("bgfedca")
        for place, session in enumerate(whole, start=1):
            before = (session.update_time, session.key.session)
            page = await current.list_sessions("w", user="", channel="", before=before, limit=2)
            assert list(page) == whole[place : place + 2]
        by_user = await current.list_sessions("w", user="u0", channel="web", before=None, limit=100)
        assert [session.key.session for session in by_user] == ["b"]
        assert list(await current.list_sessions("other", user="", channel="", before=None, limit=100)) == []


async def test_the_order_of_sessions_survives_a_store_that_was_not_closed(
    store: Store, make_store: Any, tmp_path: Path
) -> None:
    for number, name in enumerate("abc"):
        turn = new(session=name, create_time=5000 + number * 0.01)
        await store.accept(turn)
    for ordinal, name in enumerate("ab", start=2):
        await store.accept(new(ordinal, session=name, create_time=5000.1 + ordinal * 0.01))
    if isinstance(store, SqliteStore):
        # The system takes a lock away when its process is killed; this process is alive.
        (tmp_path / "run" / "moltbot.db.lock").unlink()
    crashed = make_store()
    await crashed.open()

    found = await crashed.list_sessions("w", user="", channel="", before=None, limit=10)
    assert [session.key.session for session in found] == ["b", "a", "c"]
    await crashed.close()


async def test_a_session_keeps_its_first_title_user_and_channel(store: Store) -> None:
    await keep(store, new(1, title="first", user="ada", channel="web"))
    await keep(store, new(2, title="second", user="bob", channel="cli"))

    session = await store.get_session(key())
    assert session is not None
    assert (session.title, session.user, session.channel, session.message_count) == ("first", "ada", "web", 4)


async def test_a_session_that_is_not_listed_is_kept_until_it_is_pruned(store: Store) -> None:
    turn = new(session="closed", ephemeral=True)
    end = await keep(store, turn)
    await keep(store, new(session="listed"))

    assert await everything(store) == ["listed"]
    assert await store.get_session(key("closed")) is None
    assert await store.find_turn(turn.key) is not None
    assert await store.prune(turn.create_time) == 0
    assert await store.prune(end.end_time + 100) == 1
    assert await store.find_turn(turn.key) is None
    assert await store.prune(end.end_time + 100) == 0
    assert await everything(store) == ["listed"]


async def test_sessions_that_nobody_has_used_for_long_are_pruned_in_steps(store: Store, reopen: Reopen) -> None:
    for number in range(8):
        for ordinal in (1, 2):
            await keep(store, new(ordinal, session=f"s{number}", user="ann", workspace="wv"[number % 2]))
    await keep(store, new(session="closed", ephemeral=True))
    used = (await store.list_sessions("w", user="", channel="", before=None, limit=10))[1].update_time

    pruned = 0
    while step := await store.prune(used, ephemeral=False):
        pruned += step
    assert pruned == 4
    for again in (False, True):
        current = await reopen() if again else store
        assert await everything(current) == ["s6", "s4"]
        for user in ("", "ann"):
            left = await current.list_sessions("v", user=user, channel="", before=None, limit=10)
            assert [session.key.session for session in left] == ["s7", "s5"]
        assert await texts(current, "s0") == []
        assert await texts(current, "closed") == ["question", "answer"]
    assert await current.accept(new(session="s0", request_id="s0-1")) is None


async def test_a_long_session_is_pruned_whole(store: Store) -> None:
    turns = [new(ordinal) for ordinal in range(1, 2502)]
    await asyncio.gather(*(store.accept(turn) for turn in turns), *(store.finish(ended(turn)) for turn in turns))
    while await store.prune(next(TIMES), ephemeral=False):
        continue
    assert await everything(store) == []
    assert await store.find_turn(turns[-1].key) is None


async def test_workspaces_share_nothing(store: Store) -> None:
    for workspace in ("one", "two"):
        turn = new(workspace=workspace, text=f"canary of {workspace}", request_id="r", title=workspace)
        await keep(store, turn)

    for workspace, other in (("one", "two"), ("two", "one")):
        [session] = await store.list_sessions(workspace, user="", channel="", before=None, limit=10)
        assert session.title == workspace
        messages = await store.list_messages(key(workspace=workspace), after=(0, 0), limit=10)
        assert f"canary of {other}" not in str(messages)
    await store.delete_session(key(workspace="one"))
    assert await store.get_session(key(workspace="two")) is not None


async def test_what_was_answered_is_there_after_everything_was_written_at_once(store: Store, reopen: Reopen) -> None:
    turns = [
        new(ordinal, session=f"{number % 37}", request_id=f"{number}") for number, ordinal in enumerate(range(1, 1001))
    ]
    await asyncio.gather(*(store.accept(turn) for turn in turns), *(store.finish(ended(turn)) for turn in turns[::2]))
    store = await reopen()

    states = [(await store.find_turn(turn.key)).state for turn in turns]  # type: ignore[union-attr]
    assert states[::2] == [TurnState.COMPLETED] * 500
    assert states[1::2] == [TurnState.RUNNING] * 500


async def test_a_closed_store_refuses_instead_of_waiting(store: Store) -> None:
    await store.close()
    await store.close()
    for call in (store.accept(new()), store.finish(ended(new())), store.find_turn(new().key), store.get_session(key())):
        with pytest.raises(StorageUnavailable):
            await call
