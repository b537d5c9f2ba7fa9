"""The shared store when things break: Redis, the network, a node that is gone, one that comes back."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from kept_turns import ended, everything, keep, key, new, said, texts
from moltbot_server import tasks
from moltbot_server.errors import StorageFull, StorageUnavailable, TurnInterrupted
from moltbot_server.store import Elsewhere, UsageQuery, UsageRow
from moltbot_server.store.redis import RedisStore
from moltbot_server.store.redis_line import Call
from moltbot_server.turns import TextDelta, TurnInput, TurnState
from redis_nodes import LEASE, Nodes, wrote
from redis_process import RedisProcess

ASKED = TurnInput(parts=said("question"))


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[RedisProcess]:
    """A Redis of the test's own, that writes down all that it is given."""
    async with RedisProcess.keeping(tmp_path) as process:
        yield process


@pytest.fixture
async def own(redis: RedisProcess) -> AsyncIterator[Nodes]:
    """Nodes on a Redis of the test's own."""
    nodes = Nodes(redis.port)
    yield nodes
    with contextlib.suppress(AssertionError):
        redis.go_on()
    for store in nodes.opened:
        await store.close()


def stop_renewing(store: RedisStore) -> None:
    """Let a node be as one that was stopped: its lease ends."""
    assert store._lease._task is not None
    store._lease._task.cancel()


async def there_again(store: RedisStore) -> None:
    """Wait until a store that could not reach Redis can."""
    async with asyncio.timeout(5):
        while store._reading._away or store._writing._away:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


async def taken(store: RedisStore, *, within: float = 10 * LEASE) -> list[tuple[str, int, list[str]]]:
    """Take over until there is something; return the sessions, epochs and words of the turns."""
    until = time.monotonic() + within
    while not (orphans := await store.take_over()):
        assert time.monotonic() < until, "nothing was taken over"
        await asyncio.sleep(LEASE / 10)
    return [
        (
            orphan.turn.key.session.session,
            orphan.epoch,
            [event.kind.text for event in orphan.turn.events if isinstance(event.kind, TextDelta)],
        )
        for orphan in orphans
    ]


# --- nodes -----------------------------------------------------------------------------------------------------------


async def test_a_node_that_is_gone_is_followed_by_another_with_all_that_was_kept(nodes: Nodes) -> None:
    first, second, third = [await nodes.join() for _ in range(3)]
    turns = [new(session=name, rest=ASKED) for name in "abc"]
    for turn in turns:
        await first.accept(turn)
    await second.accept(new(session="alive", rest=ASKED))
    await first.append([wrote(turn, "one ", "two") for turn in turns])
    assert await second.take_over() == []
    stop_renewing(first)

    both = await asyncio.gather(taken(second), third.take_over())
    assert both[0] == [(name, 2, ["one ", "two"]) for name in "abc"]
    assert both[1] == []
    assert await second.take_over() == []
    stop_renewing(second)
    assert await taken(third) == [*((name, 3, ["one ", "two"]) for name in "abc"), ("alive", 2, [])]


async def test_a_node_that_leaves_is_followed_at_once(nodes: Nodes) -> None:
    first, second = await nodes.join(), await nodes.join()
    await first.accept(new(rest=ASKED))
    await second.take_over()
    await first.close()

    assert [orphan.epoch for orphan in await second.take_over()] == [2]
    async with nodes.keys() as client:
        assert await client.exists(f"{nodes.prefix}:left") == 0


async def test_a_node_that_comes_back_can_write_nothing_into_what_another_has(nodes: Nodes) -> None:
    stopped, other = await nodes.join(), await nodes.join()
    turn, mine = new(rest=ASKED), new(session="later", rest=ASKED)
    await stopped.accept(turn)
    stop_renewing(stopped)
    await taken(other)

    assert await stopped.append([wrote(turn, "stale")]) == [turn.key]
    # Not even with an epoch that it could guess.
    assert await stopped.append([wrote(turn, "stale", epoch=2)]) == [turn.key]
    for epoch in (1, 2):
        with pytest.raises(TurnInterrupted):
            await stopped.finish(msgspec.structs.replace(ended(turn, answer="stale"), epoch=epoch))
    await other.finish(msgspec.structs.replace(ended(turn, answer="right"), epoch=2))
    assert await texts(other) == ["question", "right"]
    await stopped._lease.renew()
    assert await stopped.accept(mine) is None
    assert await stopped.append([wrote(mine, "fresh")]) == []
    await stopped.finish(ended(mine))
    assert await texts(other, "later") == ["question", "answer"]


async def test_a_node_that_could_not_renew_its_lease_lets_the_others_say_that_they_are_there(nodes: Nodes) -> None:
    first, second = await nodes.join(), await nodes.join()
    await first.accept(new(rest=ASKED))
    for store in (first, second):  # as when Redis hangs
        stop_renewing(store)
    await asyncio.sleep(1.2 * LEASE)

    assert await second.take_over() == []
    await first._lease.renew()
    assert await first.append([]) == []
    assert await second.take_over() == []
    await asyncio.sleep(1.2 * LEASE)
    assert [epoch for _, epoch, _ in await taken(second)] == [2]


async def test_nobody_is_taken_over_until_redis_has_been_there_for_the_time_of_a_lease(
    own: Nodes, redis: RedisProcess
) -> None:
    lease = 2.0
    first, second = await own.join(lease=lease), await own.join(lease=lease)
    await first.accept(new(rest=ASKED))
    stop_renewing(first)  # which is there all the time, and has no chance to say so
    await asyncio.sleep(0.6 * lease)
    await redis.kill()
    await asyncio.sleep(0.35 * lease)
    await redis.start()
    await there_again(second)
    await asyncio.sleep(0.1 * lease)  # the first one's lease has ended; the second one's has not

    assert await second.take_over() == []
    await asyncio.sleep(1.2 * lease)
    assert [epoch for _, epoch, _ in await taken(second)] == [2]


async def test_what_a_node_took_over_and_did_not_hear_of_is_told_again(nodes: Nodes) -> None:
    first, second = await nodes.join(), await nodes.join()
    await first.accept(new(rest=ASKED))
    await first.close()
    script = second._scripts["take_over"].on(second.base("w"), second.node, first.node)
    async with nodes.keys() as client:
        assert len(await client.execute_command(*script)) == 1  # and the answer is lost
    second._takeover._sweep_at = 0.0

    assert [epoch for _, epoch, _ in await taken(second)] == [2]
    second._takeover._sweep_at = 0.0
    assert await second.take_over() == []


async def test_one_request_id_at_many_nodes_at_once_is_one_turn(nodes: Nodes) -> None:
    stores = [await nodes.join() for _ in range(3)]
    turns = [new(ordinal, session=name, request_id="r") for name in "abc" for ordinal in range(1, 21)]
    answers = await asyncio.gather(*(stores[place % 3].accept(turn) for place, turn in enumerate(turns)))

    assert answers.count(None) == 1
    winner = turns[answers.index(None)].key
    assert {answer.key for answer in answers if answer is not None} == {winner}


async def test_a_turn_that_another_node_runs_is_neither_run_again_nor_ended_by_a_number_that_both_gave(
    nodes: Nodes,
) -> None:
    first, second = await nodes.join(), await nodes.join()
    turn = new(request_id="r", rest=ASKED)
    await first.accept(turn)

    for again in (turn, new(2, request_id="r")):
        for call in (second.accept, second.reaccept):
            earlier = await call(again)
            assert earlier is not None
            assert (earlier.key, earlier.state) == (turn.key, TurnState.RUNNING)
    taken_number = new(1, request_id="other")
    refused, finished = second.accept(taken_number), second.finish(ended(taken_number, answer="wrong"))
    assert await refused == Elsewhere(node=first.node)
    with pytest.raises(TurnInterrupted):
        await finished
    await first.finish(ended(turn))
    assert await texts(second) == ["question", "answer"]


# --- Redis is away ---------------------------------------------------------------------------------------------------


async def test_what_was_acknowledged_survives_the_death_of_redis_and_what_ends_meanwhile_is_kept(
    own: Nodes, redis: RedisProcess
) -> None:
    store = await own.join()
    turns = [new(session=f"s{number}", rest=ASKED) for number in range(20)]
    await asyncio.gather(*(store.accept(turn) for turn in turns))
    await store.append([wrote(turn, "kept") for turn in turns])
    await redis.kill()
    ends = [asyncio.ensure_future(store.finish(ended(turn))) for turn in turns]
    more = asyncio.ensure_future(store.append([wrote(turns[0], "more", first=2)]))
    await asyncio.wait(ends, timeout=0.3)
    began = time.monotonic()
    with pytest.raises(StorageUnavailable) as caught:
        await store.accept(new(session="late"))
    assert caught.value.retry_after
    assert time.monotonic() - began < 0.1
    await redis.start()

    assert await asyncio.gather(*ends) == [None] * 20
    await more
    await there_again(store)
    for turn in turns:
        assert await texts(store, turn.key.session.session) == ["question", "answer"]
    assert await store.find_turn(new(session="late").key) is None
    assert await store.accept(new(session="after")) is None


async def test_a_redis_that_hangs_costs_two_seconds_and_leaves_nothing_that_was_refused(
    own: Nodes, redis: RedisProcess
) -> None:
    store = await own.join()
    running = new(session="running", rest=ASKED)
    await store.accept(running)
    redis.hang()
    began = time.monotonic()
    refused = [store.accept(new(session=f"r{number}")) for number in range(50)]
    used = UsageRow(workspace="w", day="2026-01-01", turns=1)
    added, finished = store.add_usage([used]), store.finish(ended(running))
    outcomes = await asyncio.gather(*refused, return_exceptions=True)

    assert {type(outcome) for outcome in outcomes} == {StorageUnavailable}
    assert 1.5 < time.monotonic() - began < 8  # one wait for all, not one each
    began = time.monotonic()
    with pytest.raises(StorageUnavailable):
        await store.accept(new(session="another"))
    with pytest.raises(StorageUnavailable):
        await store.find_turn(running.key)
    assert time.monotonic() - began < 2.5  # the reading line may hear of it now
    redis.go_on()
    await asyncio.gather(added, finished)
    await there_again(store)
    assert await texts(store, "running") == ["question", "answer"]
    assert await everything(store) == ["running"]
    page = await store.list_usage(UsageQuery(first="2026-01-01", last="2026-01-02", by=()), after=None, limit=1)
    assert page.total.turns == 1
    async with own.keys() as client:
        assert await client.zcard(f"{store.base('w')}run:{store.node}") == 0
        assert await client.hlen(f"{store.base('w')}requests") == 1


async def test_nothing_waits_for_ever_and_nothing_is_left_when_redis_stays_away(
    own: Nodes, redis: RedisProcess
) -> None:
    before = asyncio.all_tasks()
    store = await own.join()
    turns = [new(session=f"s{number}", rest=ASKED) for number in range(10)]
    await asyncio.gather(*(store.accept(turn) for turn in turns))
    await redis.kill()
    began = time.monotonic()
    outcomes = await asyncio.gather(*(store.finish(ended(turn)) for turn in turns), return_exceptions=True)

    assert {type(outcome) for outcome in outcomes} == {StorageUnavailable}
    assert 7 < time.monotonic() - began < 11
    assert asyncio.all_tasks() - before == {store._writing._worker, store._reading._worker, store._lease._task}
    await asyncio.wait_for(store.close(), 5)
    assert asyncio.all_tasks() == before


async def test_scripts_that_redis_has_forgotten_are_told_again(nodes: Nodes) -> None:
    store = await nodes.join()
    await keep(store, new())
    async with nodes.keys() as client:
        await client.script_flush()
    await keep(store, new(2))
    assert await store.load_session(key(), 10) is not None
    assert len(await texts(store)) == 4


async def test_a_redis_without_memory_refuses_turns_and_recovers_by_itself(own: Nodes) -> None:
    store = await own.join()
    async with own.keys() as client:
        await client.config_set("maxmemory", "4mb")

        async def fill() -> None:
            for ordinal in range(1, 1000):
                await keep(store, new(ordinal, text="x" * 20_000))

        with pytest.raises(StorageFull) as caught:
            await fill()
        assert caught.value.retry_after
        assert len(await texts(store)) > 10
        await client.config_set("maxmemory", "0")
    await keep(store, new(2000, session="again"))
    assert await texts(store, "again") == ["question", "answer"]


# --- what is sent twice ----------------------------------------------------------------------------------------------


async def test_what_is_sent_twice_is_there_once(nodes: Nodes) -> None:
    store, other = await nodes.join(), await nodes.join()
    turn = new(rest=ASKED)
    for _ in range(2):
        assert await store.accept(turn) is None
    # The first two as after a lost answer, the third with what came meanwhile.
    for words in (("one",), ("one",), ("one", "two")):
        assert await store.append([wrote(turn, *words)]) == []
    await store.append([wrote(turn, "three", first=3)])
    await store.close()
    other._takeover._sweep_at = 0.0

    assert await taken(other) == [("s", 2, ["one", "two", "three"])]
    session = await other.get_session(key())
    assert session is not None
    assert session.message_count == 1


async def test_connections_that_break_all_the_time_lose_nothing_and_store_nothing_twice(nodes: Nodes) -> None:
    store, other = await nodes.join(), await nodes.join()
    broken = 0

    async def break_connections() -> None:
        nonlocal broken
        async with nodes.keys() as client:
            while True:
                while store._writing._away:  # noqa: ASYNC110 - a machine may need longer than it is to the next break
                    await asyncio.sleep(0.01)
                broken += await client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
                await asyncio.sleep(random.uniform(0.002, 0.02))

    async def say(number: int) -> int:
        """Say something until it is taken in, as callers do; return how often it was refused."""
        await asyncio.sleep(random.uniform(0, 1.5))
        refused = 0
        while True:
            turn = new(number + 1000 * refused, session=f"s{number % 10}", request_id=f"r{number}", rest=ASKED)
            try:
                # None: what was refused before is not found.
                assert await store.accept(turn) is None
                break
            except StorageUnavailable:
                refused += 1
                await asyncio.sleep(0.02)
        for word in range(3):
            assert await store.append([wrote(turn, f"{word}", first=1 + word)]) == []
        await store.add_usage([UsageRow(workspace="w", day="2026-01-01", turns=1)])
        await store.finish(ended(turn, answer=f"a{number}"))
        return refused

    breaking = asyncio.create_task(break_connections())
    try:
        async with asyncio.timeout(60):
            refused = await asyncio.gather(*(say(number) for number in range(1, 401)))
    finally:
        await tasks.end(breaking)
    await there_again(store)
    await there_again(other)
    assert await store.accept(new(session="end")) is None

    assert broken > 20
    for number, times in enumerate(refused, start=1):
        for attempt in range(times + 1):
            found = await store.find_turn(new(number + 1000 * attempt, session=f"s{number % 10}").key)
            assert (found is not None and found.state is TurnState.COMPLETED) is (attempt == times), number
    count = 0
    for session in await other.list_sessions("w", user="", channel="", before=None, limit=100):
        messages = await other.list_messages(session.key, after=(0, 0), limit=1000)
        assert session.message_count == len(messages)
        count += len(messages)
    assert count == 2 * 400 + 1
    page = await other.list_usage(UsageQuery(first="2026-01-01", last="2026-01-02", by=()), after=None, limit=1)
    assert page.total.turns == 400
    async with nodes.keys() as client:
        assert await client.keys(f"{store.base('w')}j:*") == []
        assert await client.zcard(f"{store.base('w')}run:{store.node}") == 1
        assert {name async for name in client.scan_iter(f"{store.base('w')}a:*")} == {
            f"{store.base('w')}a:end".encode()
        }


async def test_a_turn_that_was_refused_is_withdrawn_with_its_session(nodes: Nodes) -> None:
    store = await nodes.join()
    first, second = new(session="new", rest=ASKED), new(2, rest=ASKED)
    await keep(store, new(1))
    for turn in (first, second):
        call = store.accept(turn)
        await call
        store._writing._undo += call.undo  # type: ignore[attr-defined]
    await store._writing._disconnect()
    assert await store.accept(new(3)) is None

    assert await store.find_turn(first.key) is None
    assert await store.find_turn(second.key) is None
    assert await everything(store) == ["s"]
    assert await texts(store) == ["question", "answer", "question"]


async def test_what_is_withdrawn_is_the_turn_that_was_refused_and_not_the_next_in_its_place(nodes: Nodes) -> None:
    store = await nodes.join()
    refused, stored = new(request_id="refused", rest=ASKED), new(request_id="stored", rest=ASKED)
    (undo,) = store.accept(refused).undo  # type: ignore[attr-defined]
    await store.delete_session(key())
    assert await store.accept(stored) is None

    await store._writing.put(Call(undo, read=list))
    assert await store.find_turn(stored.key) is not None
    assert await texts(store) == ["question"]


async def test_a_session_that_is_used_after_it_was_found_to_be_old_is_not_deleted(nodes: Nodes) -> None:
    store = await nodes.join()
    await keep(store, new())
    await keep(store, new(session="old"))
    before = time.time() + 3600
    await store.accept(new(2, create_time=before + 1, rest=ASKED))

    assert [await store._forget(key(name), repr(before)) for name in ("s", "old")] == [0, 1]
    assert await everything(store) == ["s"]
