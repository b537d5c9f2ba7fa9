"""What every store promises of deliveries: see `moltbot_server.store.outbox.Outbox`."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from kept_turns import Reopen, ended, new
from moltbot_server.errors import DeliveryNotFound, LeaseLost, TurnInterrupted
from moltbot_server.store import NewTurn, Store
from moltbot_server.store.outbox import Delivery, Held, delivery_of
from moltbot_server.turns import Completed, Failed, FinishReason, Place, TextPart, TurnInput, TurnState

CHANNEL = ("w", "slack")


def asked(address: str = "T/C/1", channel: str = "slack", **fields: Any) -> TurnInput:
    return TurnInput(parts=(TextPart(text="question"),), reply_to=Place(channel=channel, address=address), **fields)


def begun(ordinal: int = 1, session: str = "s", address: str = "T/C/1", **fields: Any) -> NewTurn:
    """Return a turn whose answer is to be delivered."""
    place = {"address": address, "channel": fields.pop("channel", "slack")}
    turn = new(ordinal, session, **fields)
    return msgspec.structs.replace(turn, rest=asked(**place, request_id=turn.request_id))


def over(turn: NewTurn, answer: str = "answer", state: TurnState = TurnState.COMPLETED, **fields: Any) -> Any:
    """Return its end, with the delivery."""
    end = ended(turn, answer, state)
    last = end.events[-1].kind
    assert isinstance(last, Completed | Failed)
    assert turn.rest is not None
    return msgspec.structs.replace(end, delivery=delivery_of(turn.key, turn.rest, last), **fields)


async def posted(store: Store, *turns: NewTurn, **end: Any) -> None:
    """Store turns with their ends, one after the other."""
    for turn in turns:
        assert await store.accept(turn) is None
        await store.finish(over(turn, **end))


async def leased(store: Store, limit: int = 10, seconds: float = 60.0, most: int = 3) -> list[Delivery]:
    found = await store.outbox.lease(CHANNEL, limit=limit, seconds=seconds, most_attempts=most)
    return list(found.deliveries)


def held(delivery: Delivery, workspace: str = "w") -> Held:
    return Held(workspace=workspace, id=delivery.id, attempt=delivery.attempt)


def questions(deliveries: list[Delivery]) -> list[str]:
    return [delivery.request_id for delivery in deliveries]


async def reject(store: Store, delivery: Delivery, **how: Any) -> bool:
    options = {"reason": "no", "delay": 0.0, "permanent": False, "most_attempts": 3, **how}
    return (await store.outbox.reject(held(delivery), **options))[0]


async def test_the_end_of_a_turn_leaves_a_delivery_that_says_it_all(store: Store, reopen: Reopen) -> None:
    turn = begun()
    await posted(store, turn)
    store = await reopen()

    assert set(await store.outbox.due([CHANNEL, ("w", "discord"), ("v", "slack")])) == {CHANNEL}
    (delivery,) = await leased(store)
    assert (delivery.turn, delivery.place) == (turn.key, Place(channel="slack", address="T/C/1"))
    assert (delivery.request_id, delivery.attempt) == (turn.request_id, 1)
    assert isinstance(delivery.ending, Completed)
    assert delivery.ending.text == "answer"
    assert await leased(store) == []
    assert list(await store.outbox.due([CHANNEL])) == []


async def test_a_failure_is_delivered_and_what_ended_in_silence_is_not(store: Store) -> None:
    await posted(store, begun(1, address="a"), state=TurnState.FAILED)
    await posted(store, begun(2, address="b"), state=TurnState.CANCELLED, answer="")
    await posted(store, begun(3, address="c"), state=TurnState.CANCELLED, answer="so far")
    nowhere = new(4)
    await store.accept(nowhere)
    await store.finish(ended(nowhere))

    found = await leased(store)
    assert [type(delivery.ending) for delivery in found] == [Failed, Completed]
    assert [delivery.place.address for delivery in found] == ["a", "c"]


def test_a_turn_that_was_answered_with_others_leaves_no_delivery() -> None:
    turn = begun()
    last = over(turn).events[-1].kind
    joined = msgspec.structs.replace(last, text="", finish_reason=FinishReason.JOINED, answered_by=2)

    assert turn.rest is not None
    assert delivery_of(turn.key, turn.rest, joined) is None


def test_a_dedupe_key_is_of_one_turn_alone_and_short_enough_for_every_platform() -> None:
    turns = [begun(1), begun(2), begun(1, session="t"), begun(1, workspace="v"), begun(1, request_id="other")]
    keys = [over(turn).delivery.id for turn in turns]

    assert len(set(keys)) == len(keys)
    assert {len(key) for key in keys} == {24}
    assert over(turns[0]).delivery.id == keys[0]


async def test_the_end_of_a_turn_that_was_taken_over_leaves_nothing(store: Store, reopen: Reopen) -> None:
    turn = begun()
    await store.accept(turn)
    store = await reopen()
    await store.take_over()
    with pytest.raises(TurnInterrupted):
        await store.finish(over(turn))
    assert await leased(store) == []

    await store.finish(over(turn, "right", epoch=2))
    await store.finish(over(turn, "right", epoch=2))
    (delivery,) = await leased(store)
    assert isinstance(delivery.ending, Completed)
    assert delivery.ending.text == "right"
    assert await leased(store) == []


@pytest.mark.parametrize("waits", [True, False], ids=["after it", "together with it"])
async def test_the_end_of_a_turn_that_was_not_taken_leaves_nothing(store: Store, waits: bool) -> None:
    await posted(store, begun(1, request_id="r"))
    second = begun(2, request_id="r")
    accepted = store.accept(second)
    if waits:
        await accepted
    finished = store.finish(over(second, "another"))
    assert await accepted is not None
    await finished

    assert questions(await leased(store)) == ["r"]
    assert await leased(store) == []


async def test_a_turn_that_ends_with_its_acceptance_leaves_a_delivery_too(store: Store) -> None:
    turn = begun()
    accepted, finished = store.accept(turn), store.finish(over(turn))
    assert await accepted is None
    await finished

    assert questions(await leased(store)) == [turn.request_id]


async def test_deliveries_of_a_place_come_one_after_the_other_and_others_beside_them(store: Store) -> None:
    await posted(store, *(begun(number, address="a") for number in (1, 2, 3)), begun(4, address="b"))

    first = await leased(store)
    assert questions(first) == ["s-1", "s-4"]
    assert await leased(store) == []
    await store.outbox.confirm("w", first[0].id, "m1")
    second = await leased(store)
    assert questions(second) == ["s-2"]
    assert await reject(store, second[0], permanent=True)
    assert questions(await leased(store)) == ["s-3"]


async def test_many_who_ask_at_once_share_what_there_is(store: Store) -> None:
    turns = [begun(number, address=f"place {number}") for number in range(1, 41)]
    await posted(store, *turns)
    found = await asyncio.gather(*(leased(store, limit=3) for _ in range(20)))

    names = [name for deliveries in found for name in questions(deliveries)]
    assert sorted(names) == sorted(turn.request_id for turn in turns)


async def test_a_lease_that_ends_is_given_out_again_with_the_same_key_and_the_next_attempt(store: Store) -> None:
    await posted(store, begun(1), begun(2))
    (first,) = await leased(store, seconds=-1.0)
    (second,) = await leased(store, seconds=-1.0)

    assert (second.id, second.attempt) == (first.id, 2)
    assert second == msgspec.structs.replace(first, attempt=2)


async def test_a_lease_is_held_as_long_as_it_is_renewed(store: Store) -> None:
    await posted(store, begun())
    (first,) = await leased(store, seconds=0.05)
    assert list(await store.outbox.renew([held(first)], 60.0)) == []
    await asyncio.sleep(0.1)
    assert await leased(store) == []

    assert list(await store.outbox.renew([held(first)], -1.0)) == []
    (second,) = await leased(store)
    assert list(await store.outbox.renew([held(first), held(second)], 60.0)) == [held(first)]
    assert list(await store.outbox.renew([held(second, "v")], 60.0)) == [held(second, "v")]


async def test_what_was_posted_was_posted_whoever_has_the_lease_by_then(store: Store, reopen: Reopen) -> None:
    await posted(store, begun(1), begun(2))
    (first,) = await leased(store, seconds=-1.0)
    (second,) = await leased(store)

    place = Place(channel="slack", address="T/C/1")
    assert await store.outbox.confirm("w", first.id, "late") == ("late", place)
    assert await store.outbox.confirm("w", second.id, "again") == ("late", None)
    with pytest.raises(LeaseLost):
        await reject(store, second)
    assert list(await store.outbox.renew([held(second)], 60.0)) == [held(second)]
    store = await reopen()
    assert await store.outbox.confirm("w", first.id, "") == ("late", None)
    assert questions(await leased(store)) == ["s-2"]


async def test_an_attempt_that_is_over_rejects_nothing(store: Store) -> None:
    await posted(store, begun())
    (first,) = await leased(store, seconds=-1.0)
    (second,) = await leased(store)

    with pytest.raises(LeaseLost):
        await reject(store, first, permanent=True)
    assert list(await store.outbox.renew([held(second)], 60.0)) == []


async def test_a_rejection_that_comes_twice_counts_once(store: Store) -> None:
    await posted(store, begun())
    (first,) = await leased(store)
    assert not await reject(store, first, delay=60.0)
    assert not await reject(store, first, permanent=True)

    assert await leased(store) == []
    assert await store.outbox.list_dead("w", channel="", before=None, limit=10) == []


async def test_what_nobody_was_given_can_neither_be_confirmed_nor_rejected(store: Store) -> None:
    await posted(store, begun())
    id = over(begun()).delivery.id
    with pytest.raises(LeaseLost):
        await store.outbox.confirm("w", id, "m")
    with pytest.raises(LeaseLost):
        await store.outbox.reject(
            Held(workspace="w", id=id, attempt=1), reason="", delay=0.0, permanent=True, most_attempts=1
        )
    for workspace, name in (("v", id), ("w", "unknown")):
        with pytest.raises(DeliveryNotFound):
            await store.outbox.confirm(workspace, name, "m")
        with pytest.raises(DeliveryNotFound):
            await store.outbox.reject(
                Held(workspace=workspace, id=name, attempt=1), reason="", delay=0, permanent=True, most_attempts=1
            )


async def test_what_is_rejected_comes_again_when_its_pause_is_over_and_keeps_its_place_back(store: Store) -> None:
    await posted(store, begun(1), begun(2))
    (first,) = await leased(store)
    assert not await reject(store, first, delay=0.2)
    assert await leased(store) == []
    await asyncio.sleep(0.3)

    (again,) = await leased(store)
    assert (again.id, again.attempt) == (first.id, 2)


async def test_what_fails_too_often_is_given_up_with_the_last_reason(store: Store, reopen: Reopen) -> None:
    await posted(store, begun(1), begun(2))
    for attempt in (1, 2, 3):
        (delivery,) = await leased(store)
        assert delivery.attempt == attempt
        assert await reject(store, delivery, reason=f"no {attempt}") is (attempt == 3)

    assert questions(await leased(store)) == ["s-2"]
    store = await reopen()
    (dead,) = await store.outbox.list_dead("w", channel="", before=None, limit=10)
    assert (dead.delivery.request_id, dead.delivery.attempt, dead.reason) == ("s-1", 3, "no 3")
    assert isinstance(dead.delivery.ending, Completed)


async def test_what_ends_its_receivers_again_and_again_is_given_up_too(store: Store) -> None:
    await posted(store, begun(1), begun(2))
    for _ in range(3):
        assert len(await leased(store, seconds=-1.0)) == 1
    found = await store.outbox.lease(CHANNEL, limit=10, seconds=60.0, most_attempts=3)
    assert (found.deliveries, found.dead) == ((), 1)

    assert questions(await leased(store)) == ["s-2"]
    (dead,) = await store.outbox.list_dead("w", channel="slack", before=None, limit=10)
    assert "never said" in dead.reason


async def test_a_dead_letter_that_is_retried_comes_behind_what_waits_and_has_all_its_attempts_again(
    store: Store,
) -> None:
    await posted(store, begun(1), begun(2))
    (first,) = await leased(store)
    await reject(store, first, permanent=True)
    assert await store.outbox.revive("v", first.id) is None
    assert await store.outbox.revive("w", first.id) == first.place
    assert await store.outbox.revive("w", first.id) is None

    (second,) = await leased(store)
    assert second.request_id == "s-2"
    assert await leased(store) == []
    await store.outbox.confirm("w", second.id, "")
    for attempt in (2, 3, 4):
        (again,) = await leased(store)
        assert (again.id, again.attempt) == (first.id, attempt)
        assert await reject(store, again) is (attempt == 4)


async def test_a_dead_letter_is_confirmed_late_or_dropped_once(store: Store) -> None:
    await posted(store, begun(1, address="a"), begun(2, address="b"))
    for delivery in await leased(store):
        await reject(store, delivery, permanent=True)
    late, dropped = (over(begun(number)).delivery.id for number in (1, 2))

    assert await store.outbox.confirm("w", late, "m") == ("m", Place(channel="slack", address="a"))
    assert await store.outbox.drop("v", dropped) is False
    assert await store.outbox.drop("w", dropped) is True
    assert await store.outbox.drop("w", dropped) is False
    assert await store.outbox.drop("w", late) is False
    assert await store.outbox.list_dead("w", channel="", before=None, limit=10) == []


async def test_dead_letters_are_listed_the_latest_first_and_in_pages(store: Store) -> None:
    for number in range(1, 8):
        await posted(store, begun(number, address=str(number), channel="slack" if number % 2 else "discord"))
    for channel in ("slack", "discord"):
        found = await store.outbox.lease(("w", channel), limit=10, seconds=60, most_attempts=3)
        for delivery in found.deliveries:
            await reject(store, delivery, permanent=True)
            await asyncio.sleep(0.002)
    whole = list(await store.outbox.list_dead("w", channel="", before=None, limit=100))

    assert [letter.delivery.request_id for letter in whole] == ["s-6", "s-4", "s-2", "s-7", "s-5", "s-3", "s-1"]
    for place, letter in enumerate(whole, start=1):
        before = (letter.dead_time, letter.delivery.id)
        assert list(await store.outbox.list_dead("w", channel="", before=before, limit=2)) == whole[place : place + 2]
    of_slack = await store.outbox.list_dead("w", channel="slack", before=None, limit=3)
    assert list(of_slack) == whole[3:6]
    assert await store.outbox.list_dead("v", channel="", before=None, limit=100) == []


async def test_open_and_dead_deliveries_are_counted_by_channel(store: Store) -> None:
    await posted(store, *(begun(number) for number in (1, 2, 3)), begun(4, channel="discord"))
    await posted(store, begun(5, workspace="v"))
    (first,) = await leased(store)
    await reject(store, first, permanent=True)

    assert dict(await store.outbox.count()) == {
        ("slack", "open"): 3,
        ("discord", "open"): 1,
        ("slack", "dead"): 1,
    }


async def test_what_is_old_goes_and_what_nobody_took_is_given_up(store: Store) -> None:
    await posted(store, *(begun(number, address=str(number)) for number in (1, 2, 3)))
    first, second, third = await leased(store)
    await store.outbox.confirm("w", first.id, "m")
    await reject(store, second, permanent=True)
    await reject(store, third, delay=60.0)
    await posted(store, begun(4, address="3"))

    while await store.outbox.prune(keep=1e11, delivered=1e11):
        continue
    assert await store.outbox.confirm("w", first.id, "") == ("m", None)
    assert await store.outbox.prune(keep=1e11, delivered=-1.0) == 1
    with pytest.raises(DeliveryNotFound):
        await store.outbox.confirm("w", first.id, "")
    await asyncio.sleep(0.3)
    assert await store.outbox.prune(keep=0.2, delivered=-1.0) == 3
    dead = await store.outbox.list_dead("w", channel="", before=None, limit=10)
    assert {letter.delivery.request_id: letter.reason for letter in dead} == {
        "s-3": "nobody received it",
        "s-4": "nobody received it",
    }
    while await store.outbox.prune(keep=-1.0, delivered=-1.0):
        continue
    assert dict(await store.outbox.count()) == {}


async def test_a_failure_that_nobody_was_given_gives_way_to_the_turn_that_is_asked_again(store: Store) -> None:
    await posted(store, begun(1, request_id="r"), state=TurnState.FAILED)
    await posted(store, begun(2))
    again = begun(3, request_id="r")
    assert await store.reaccept(again) is None

    assert questions(await leased(store)) == ["s-2"]
    await store.finish(over(again))
    await store.outbox.confirm("w", over(begun(2)).delivery.id, "")
    (delivery,) = await leased(store)
    assert delivery.turn == again.key


async def test_a_session_that_is_deleted_owes_its_answers_all_the_same(store: Store) -> None:
    turn = begun()
    await posted(store, turn)
    await store.delete_session(turn.key.session)

    assert questions(await leased(store)) == [turn.request_id]
