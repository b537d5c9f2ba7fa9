"""Deliveries given out by the nodes that share a store, and what happens when the store is away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from kept_turns import ended, new
from moltbot_server.config_models import Delivering
from moltbot_server.errors import NotServing, StorageUnavailable
from moltbot_server.metrics import Metrics
from moltbot_server.outbox import Deliveries, Receiver, pause
from moltbot_server.store import Store
from moltbot_server.store.outbox import Delivery, Outbox, delivery_of
from moltbot_server.turns import Completed, Place, TextPart, TurnInput
from msgspec.structs import replace

Node = Callable[..., Deliveries]


@pytest.fixture
async def node(store: Store) -> AsyncIterator[Node]:
    """Makes what gives deliveries out, as each node on the store has it."""
    made: list[Deliveries] = []

    def make(outbox: Callable[[], Outbox] = lambda: store.outbox, **settings: Any) -> Deliveries:
        made.append(Deliveries(outbox, Delivering(**settings), Metrics()))
        return made[-1]

    yield make
    for deliveries in made:
        await deliveries.close()


async def posted(store: Store, ordinal: int = 1, address: str = "") -> None:
    """Store a turn whose answer goes to a place of its own."""
    turn = new(ordinal)
    asked = TurnInput(
        parts=(TextPart(text="x"),),
        request_id=turn.request_id,
        reply_to=Place(channel="slack", address=address or f"place {ordinal}"),
    )
    end = ended(turn)
    last = end.events[-1].kind
    assert isinstance(last, Completed)
    await store.accept(replace(turn, rest=asked))
    await store.finish(replace(end, delivery=delivery_of(turn.key, asked, last)))


async def next_of(receiver: Receiver) -> Delivery:
    return await asyncio.wait_for(anext(receiver), 10)


async def test_what_ended_at_another_node_is_found_by_looking(store: Store, node: Node) -> None:
    receiver = node().receive("w", "slack", 4)
    waiting = asyncio.ensure_future(next_of(receiver))
    await asyncio.sleep(0.05)
    await posted(store)

    assert (await waiting).place == Place(channel="slack", address="place 1")


async def test_a_confirmation_at_another_node_makes_room_and_lets_the_next_one_of_the_place_go(
    store: Store, node: Node
) -> None:
    here, there = node(), node()
    for ordinal in (1, 2):
        await posted(store, ordinal, "one place")
    receiver = here.receive("w", "slack", 1)
    first = await next_of(receiver)
    await there.confirm("w", first.id, "m")
    second = await next_of(receiver)

    assert (first.request_id, second.request_id) == ("s-1", "s-2")


async def test_a_lease_is_renewed_while_its_receiver_is_there_and_not_for_ever(
    store: Store, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moltbot_server.outbox._LONGEST_HELD", 1.5)
    here, there = node(lease=0.5), node(lease=0.5)
    await posted(store)
    first = await next_of(here.receive("w", "slack", 4))
    other = asyncio.ensure_future(next_of(there.receive("w", "slack", 4)))
    done, _ = await asyncio.wait({other}, timeout=1.0)
    assert not done

    again = await other
    assert (again.id, again.attempt) == (first.id, 2)


async def test_receivers_of_one_workspace_are_given_nothing_of_another(store: Store, node: Node) -> None:
    deliveries = node()
    await posted(store)
    waiting = asyncio.ensure_future(next_of(deliveries.receive("v", "slack", 4)))
    done, _ = await asyncio.wait({waiting}, timeout=0.6)
    waiting.cancel()

    assert not done


class _Away:
    """An outbox that cannot be reached for a while."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self.is_away = False

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._outbox, name)

        async def calling(*arguments: Any, **options: Any) -> Any:
            if self.is_away:
                raise StorageUnavailable("away")
            return await call(*arguments, **options)

        return calling


async def test_what_waits_is_given_out_when_the_store_is_there_again(store: Store, node: Node) -> None:
    outbox = _Away(store.outbox)
    deliveries = node(lambda: outbox)
    receiver = deliveries.receive("w", "slack", 4)
    waiting = asyncio.ensure_future(next_of(receiver))
    await asyncio.sleep(0.05)
    outbox.is_away = True
    await posted(store)
    await asyncio.sleep(0.6)
    outbox.is_away = False

    assert (await waiting).request_id == "s-1"


async def test_a_receiver_is_told_that_the_store_is_away_when_it_asks(store: Store, node: Node) -> None:
    outbox = _Away(store.outbox)
    outbox.is_away = True
    with pytest.raises(StorageUnavailable):
        await next_of(node(lambda: outbox).receive("w", "slack", 4))


async def test_nobody_is_given_anything_by_a_node_that_leaves(store: Store, node: Node) -> None:
    deliveries = node()
    waiting = asyncio.ensure_future(next_of(deliveries.receive("w", "slack", 4)))
    await asyncio.sleep(0.05)
    await deliveries.close()

    with pytest.raises(NotServing):
        await waiting
    with pytest.raises(NotServing):
        deliveries.receive("w", "slack", 4)


async def test_deliveries_are_counted_and_old_ones_given_up_while_nobody_receives(
    store: Store, make_store: Any
) -> None:
    metrics = Metrics()
    deliveries = Deliveries(lambda: store.outbox, Delivering(), metrics)
    for ordinal in (1, 2):
        await posted(store, ordinal)
    deliveries.open()
    await asyncio.sleep(0.2)
    page = metrics.page().decode()
    await deliveries.close()

    # Turns of these tests ended long ago by the clock of the embedded stores, and just now by that of Redis.
    assert any(f'moltbot_outbox{{channel="slack",state="{state}"}} 2.0' in page for state in ("open", "dead"))


async def test_what_was_posted_is_remembered_for_a_day_and_what_is_open_as_long_as_is_configured() -> None:
    asked: asyncio.Future[dict[str, float]] = asyncio.get_running_loop().create_future()

    class Watched:
        """An outbox that hears what is to be kept of it."""

        async def count(self) -> dict[tuple[str, str], int]:
            return {}

        async def prune(self, **kept: float) -> int:
            if not asked.done():
                asked.set_result(kept)
            return 0

    deliveries = Deliveries(Watched, Delivering(keep=1234.0), Metrics())  # type: ignore[arg-type]  # no more is asked
    deliveries.open()
    assert await asyncio.wait_for(asked, 10) == {"keep": 1234.0, "delivered": 86_400.0}
    await deliveries.close()


def test_pauses_grow_with_each_attempt_and_differ() -> None:
    assert all(0.5 <= pause(1) <= 1.0 for _ in range(100))
    assert len({pause(1) for _ in range(100)}) > 90
    assert all(4.0 <= pause(4) <= 8.0 for _ in range(100))
    assert all(150 <= pause(attempt) <= 300 for attempt in (12, 1000, 1_000_000))
