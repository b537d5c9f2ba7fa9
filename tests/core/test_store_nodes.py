"""What stores promise to several nodes: turns of a session run on one, and nobody goes on with old memory."""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from kept_turns import ended, keep, key, known, new, said, texts
from moltbot_server.errors import TurnInterrupted
from moltbot_server.store import Elsewhere, Moved, NewTurn, Store
from moltbot_server.store.outbox import delivery_of
from moltbot_server.store.protocol import JournalEntry
from moltbot_server.store.redis import RedisStore
from moltbot_server.store.sqlite import SqliteStore
from moltbot_server.turns import Completed, Event, Place, TextDelta, TurnInput, TurnState
from redis.asyncio import Redis

ASKED = TurnInput(parts=said("question"))


class Nodes:
    """Nodes of one place; each has a made-up address."""

    def __init__(self, kind: str, port: int, folder: Path) -> None:
        self.kind, self.port, self.folder = kind, port, folder
        self.prefix = f"test-{secrets.token_hex(6)}"
        self.joined: list[Store] = []

    async def join(self) -> Store:
        """Return the open store of another node."""
        address = f"unix:/nowhere/{len(self.joined)}"
        store: Store
        if self.kind == "redis":
            store = RedisStore(host="127.0.0.1", port=self.port, prefix=self.prefix, advertised=address)
        else:
            store = SqliteStore(self.folder / "moltbot.db", address=address)
        await store.open()
        self.joined.append(store)
        return store


@pytest.fixture(params=["sqlite", "redis"])
async def nodes(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Nodes]:
    """Nodes on one SQLite file, or on one Redis."""
    port = request.getfixturevalue("redis_port") if request.param == "redis" else 0
    nodes = Nodes(request.param, port, tmp_path)
    yield nodes
    for store in nodes.joined:
        await store.close()


@pytest.fixture
async def here(nodes: Nodes) -> Store:
    """A node."""
    return await nodes.join()


@pytest.fixture
async def there(nodes: Nodes) -> Store:
    """Another node."""
    return await nodes.join()


def with_version(turn: NewTurn, version: int) -> NewTurn:
    return msgspec.structs.replace(turn, version=version)


async def version_of(store: Store) -> int:
    loaded = await store.load_session(key(), 10)
    assert loaded is not None
    return loaded.version


# --- who may go on with a session ------------------------------------------------------------------------------------


async def test_a_session_in_which_nothing_runs_goes_on_at_any_node_that_knows_its_latest(
    here: Store, there: Store
) -> None:
    await keep(here, new(1))
    old = await version_of(there)
    await keep(there, new(2))

    assert await here.accept(with_version(new(3), old)) == Moved()
    assert await here.accept(new(3)) == Moved()
    assert await here.find_turn(new(3).key) is None
    await keep(here, new(3))
    assert await there.accept(new(4)) == Moved()
    assert await texts(there) == ["question", "answer"] * 3


async def test_what_a_node_has_accepted_last_itself_it_goes_on_with_as_it_is(here: Store) -> None:
    await keep(here, new(1))
    version = await version_of(here)

    assert await asyncio.gather(*(here.accept(with_version(new(n), version)) for n in (2, 3))) == [None, None]
    for version in (-1, 0):
        assert await here.accept(with_version(new(4 - version), version)) is None


async def test_a_session_in_which_turns_run_is_at_one_node_until_all_have_ended(here: Store, there: Store) -> None:
    await keep(there, new(1))
    version = await version_of(here)
    first, second = new(2, rest=ASKED), new(3, rest=ASKED)
    for turn in (first, second):
        assert await there.accept(turn) is None

    loaded = await here.load_session(key(), 10)
    assert loaded is not None
    assert (loaded.running_on, loaded.messages) == (there.node, ())
    for fresh in (version, loaded.version, 0):
        assert await here.accept(with_version(new(4), fresh)) == Elsewhere(node=there.node)
    await there.finish(ended(second))
    assert await here.accept(with_version(new(4), loaded.version)) == Elsewhere(node=there.node)
    await there.finish(ended(first))
    mine = await there.load_session(key(), 10)
    assert mine is not None
    assert (mine.running_on, mine.last_ordinal, len(mine.messages)) == ("", 3, 6)
    assert await here.accept(with_version(new(4), version)) == Moved()
    assert await here.accept(with_version(new(4), mine.version)) is None


async def test_a_number_that_another_turn_has_is_not_given_twice(here: Store) -> None:
    await here.accept(new(1))

    assert await here.accept(new(1, request_id="other")) == Moved()
    assert await texts(here) == ["question"]


async def test_of_nodes_that_believe_a_session_is_new_one_is_right(nodes: Nodes) -> None:
    stores = [await nodes.join() for _ in range(3)]
    answers = await asyncio.gather(*(store.accept(new(1, request_id=store.node)) for store in stores))

    (winner,) = [store.node for store, answer in zip(stores, answers, strict=True) if answer is None]
    assert [answer for answer in answers if answer is not None] == [Elsewhere(node=winner)] * 2


async def test_a_turn_that_was_not_taken_ends_no_other_with_its_number(here: Store, there: Store) -> None:
    await there.accept(new(1, request_id="theirs", rest=ASKED))
    mine = new(1, request_id="mine", rest=ASKED)
    event = Event(sequence=1, at=1.0, kind=TextDelta(text="mine"))
    refused, left_out = here.accept(mine), here.append([JournalEntry(key=mine.key, events=(event,))])

    assert await refused == Elsewhere(node=there.node)
    assert set(await left_out) <= {mine.key}
    refused, finished = here.accept(mine), here.finish(ended(mine, answer="mine"))
    assert await refused == Elsewhere(node=there.node)
    for end in (finished, here.finish(ended(mine, answer="mine"))):
        with contextlib.suppress(TurnInterrupted):
            await end
    await there.finish(ended(new(1)))
    assert await texts(here) == ["question", "answer"]


async def test_the_end_of_a_turn_that_was_not_taken_costs_no_other_its_text(nodes: Nodes) -> None:
    here, there = await nodes.join(), await nodes.join()
    await here.accept(new(1, session="mine", rest=ASKED))
    event = Event(sequence=1, at=1.0, kind=TextDelta(text="seen"))
    assert list(await here.append([JournalEntry(key=new(1, session="mine").key, events=(event,))])) == []
    await there.accept(new(1, request_id="theirs", rest=ASKED))
    assert await here.accept(new(1, request_id="mine", rest=ASKED)) == Elsewhere(node=there.node)
    with pytest.raises(TurnInterrupted):
        await here.finish(ended(new(1)))
    await here.close()

    (orphan,) = await there.take_over()
    assert orphan.turn.events == (event,)


# --- reset and deleted -----------------------------------------------------------------------------------------------


async def test_a_session_is_reset_and_deleted_where_its_turns_run(here: Store, there: Store) -> None:
    await keep(there, new(1))
    await there.accept(new(2, rest=ASKED))

    assert await here.reset_session(key()) == Elsewhere(node=there.node)
    assert await here.delete_session(key()) == Elsewhere(node=there.node)
    assert await texts(here) == ["question", "answer", "question"]
    await there.finish(ended(new(2)))
    assert await here.reset_session(key()) is None
    assert await here.delete_session(key()) is True
    assert await there.delete_session(key()) is False


async def test_nobody_goes_on_with_what_was_reset_or_deleted_elsewhere(here: Store, there: Store) -> None:
    await keep(here, new(1))
    version = await version_of(here)
    await there.reset_session(key())

    for stale in (version, -1, 0):
        assert await here.accept(with_version(new(2), stale)) == Moved()
    await keep(here, new(2))
    version = await version_of(here)
    assert await there.delete_session(key()) is True
    for stale in (version, -1):
        assert await here.accept(with_version(new(3, opens_session=False), stale)) == Moved()
    assert await here.load_session(key(), 10) is None
    assert await here.accept(new(1, request_id="anew")) is None


async def test_a_session_that_is_made_again_has_no_version_that_it_had_before(here: Store, there: Store) -> None:
    await keep(here, new(1))
    version = await version_of(there)
    for number in range(3):
        await here.delete_session(key())
        await keep(here, new(1, request_id=f"again-{number}"))

        assert await there.accept(with_version(new(2), version)) == Moved()


# --- repeats ---------------------------------------------------------------------------------------------------------


async def test_a_repeated_request_finds_its_turn_and_the_node_that_runs_it(here: Store, there: Store) -> None:
    turn = new(request_id="r", rest=ASKED)
    await there.accept(turn)

    for again in (turn, new(2, request_id="r"), new(1, session="other", request_id="r")):
        for call in (here.accept, here.reaccept):
            earlier = await call(again)
            assert not isinstance(earlier, Elsewhere | Moved | None)
            assert (earlier.key, earlier.state, earlier.node) == (turn.key, TurnState.RUNNING, there.node)
    await there.finish(ended(turn))
    found = await here.find_turn(turn.key)
    assert found is not None
    assert found.node == ""


async def test_a_failed_turn_is_started_again_by_who_knows_the_session(here: Store, there: Store) -> None:
    await keep(there, new(1, request_id="r"), state=TurnState.FAILED)
    await keep(there, new(2))

    assert await here.reaccept(new(3, request_id="r")) == Moved()
    assert len(await texts(here)) == 3
    assert await here.reaccept(await known(here, new(3, request_id="r", rest=ASKED))) is None
    loaded = await there.load_session(key(), 10)
    assert loaded is not None
    assert loaded.running_on == here.node


# --- nodes that are gone ---------------------------------------------------------------------------------------------


async def test_what_was_taken_over_is_not_gone_on_with_from_memory(here: Store, there: Store) -> None:
    await keep(here, new(1))
    version = await version_of(here)
    turn = new(2, rest=ASKED)
    assert await there.accept(with_version(turn, version)) is None
    await there.close()
    (orphan,) = await here.take_over()

    assert (orphan.turn.key, orphan.epoch) == (turn.key, 2)
    for stale in (version, -1, 0):  # even by the node that has it now
        assert await here.accept(with_version(new(4), stale)) == Moved()
    loaded = await here.load_session(key(), 10)
    assert loaded is not None
    assert (loaded.running_on, loaded.last_ordinal, len(loaded.messages)) == (here.node, 2, 2)
    assert await here.accept(with_version(new(3), loaded.version)) is None


async def test_what_was_read_while_a_turn_ran_is_old_when_it_was_taken_over(nodes: Nodes) -> None:
    first, second, third = [await nodes.join() for _ in range(3)]
    turn = new(1, rest=ASKED)
    await first.accept(turn)
    version = await version_of(third)
    await first.close()
    await second.take_over()
    await second.finish(msgspec.structs.replace(ended(turn, answer="answer"), epoch=2))

    assert await third.accept(with_version(new(2), version)) == Moved()
    assert await third.accept(await known(third, new(2))) is None


async def test_a_turn_that_was_taken_over_is_not_taken_for_a_new_one_with_its_number(here: Store, there: Store) -> None:
    turn = new(1, request_id="r", rest=ASKED)
    await there.accept(turn)
    await there.close()
    await here.take_over()

    for call in (here.accept, here.reaccept):
        refused, finished = call(turn), here.finish(ended(turn, answer="wrong"))
        earlier = await refused
        assert not isinstance(earlier, Elsewhere | Moved | None) or call == here.reaccept
        with contextlib.suppress(TurnInterrupted):
            await finished
    await here.finish(msgspec.structs.replace(ended(turn, answer="right"), epoch=2))
    assert await texts(here) == ["question", "right"]


async def test_only_the_turns_of_nodes_that_are_gone_are_taken_over(nodes: Nodes) -> None:
    first, second, third = [await nodes.join() for _ in range(3)]
    await first.accept(new(session="alive", rest=ASKED))
    await second.accept(new(session="orphan", rest=ASKED))
    assert await third.take_over() == []
    await second.close()

    (orphan,) = await third.take_over()
    assert orphan.turn.key.session == key("orphan")
    assert list(await third.take_over()) == []
    await first.finish(ended(new(session="alive")))


async def test_each_node_tells_where_it_is_reached_until_it_is_gone(here: Store, there: Store) -> None:
    assert await here.address_of(there.node) == "unix:/nowhere/1"
    assert await here.address_of(here.node) == "unix:/nowhere/0"
    assert await here.address_of("nobody") == ""
    await there.close()
    assert await here.address_of(there.node) == ""


# --- anything may happen ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_nodes_do_none_goes_on_with_old_memory(nodes: Nodes, seed: int) -> None:
    dice = random.Random(seed)
    stores = [await nodes.join() for _ in range(3)]
    remembered: dict[int, tuple[int, int, list[str]]] = {}
    running: dict[int, list[NewTurn]] = {0: [], 1: [], 2: []}
    truth: list[str] = []
    refused = accepted = 0

    for step in range(500):
        place = dice.randrange(3)
        store, at_work = stores[place], running[place]
        act = dice.random()
        if act < 0.4 and len(at_work) < 2:
            if place not in remembered:
                loaded = await store.load_session(key(), 1000)
                if loaded is not None and loaded.running_on not in ("", store.node):
                    assert any(running[other] for other in running if other != place)
                    continue
                history = [message.text for message in loaded.messages] if loaded else []
                last = loaded.last_ordinal if loaded else 0
                remembered[place] = (loaded.version if loaded else 0, last, history)
            version, last, history = remembered[place]
            turn = new(last + dice.choice((1, 1, 2)), request_id=f"{step}", text=f"q{step}", rest=ASKED)
            answer = await store.accept(with_version(turn, version))
            if answer is None:
                assert history == truth
                assert not any(running[other] for other in running if other != place)
                at_work.append(turn)
                remembered[place] = (-1, turn.key.ordinal, history)
                accepted += 1
            else:
                assert isinstance(answer, Elsewhere | Moved)
                if isinstance(answer, Elsewhere):
                    assert running[[other.node for other in stores].index(answer.node)]
                del remembered[place]
                refused += 1
        elif act < 0.95 and at_work:
            turn = at_work.pop(0)
            await store.finish(ended(turn, answer=f"a{step}"))
            text = "".join(part.text for part in turn.question if hasattr(part, "text"))
            truth += [text, f"a{step}"]
            remembered[place] = (*remembered[place][:2], list(truth))
        elif act > 0.97 and not at_work:
            remembered.pop(place, None)
            change = store.reset_session if dice.random() < 0.5 else store.delete_session
            if any(running.values()):
                assert isinstance(await change(key()), Elsewhere)
            else:
                await change(key())
                truth.clear()
    assert min(refused, accepted) > 10


# --- a release before ------------------------------------------------------------------------------------------------


async def test_rows_of_a_release_that_knew_nothing_of_this_are_gone_on_with(redis_port: int) -> None:
    nodes = Nodes("redis", redis_port, Path())
    here, there = await nodes.join(), await nodes.join()
    assert isinstance(here, RedisStore)
    await keep(there, new(1))
    base = here.base("w")
    async with Redis(host="127.0.0.1", port=redis_port, protocol=2) as client:

        async def as_before() -> None:
            await client.hdel(f"{base}s:s", "version", "node")
            await client.delete(f"{base}a:s")

        await as_before()
        version = await version_of(here)
        assert version == 1
        assert await here.accept(with_version(new(2, rest=ASKED), version)) is None
        await here.finish(ended(new(2)))
        assert await version_of(here) > 1
        # Such a node accepts a turn, which nobody else may overtake.
        await keep(there, new(3))
        version = await version_of(here)
        await there.accept(new(4, rest=ASKED))
        await as_before()
        loaded = await here.load_session(key(), 10)
        assert loaded is not None
        assert loaded.running_on == there.node
        assert await here.accept(with_version(new(5), 1)) == Elsewhere(node=there.node)
        # One that such a node has ended stays in the list of those that run, and is found to have ended.
        await client.sadd(f"{base}a:s", "4:s")
        await there.finish(ended(new(4)))
        await client.sadd(f"{base}a:s", "4:s")
        assert await here.accept(with_version(new(4, request_id="taken"), version)) == Moved()
        assert await here.accept(await known(here, new(5))) is None
        assert await client.smembers(f"{base}a:s") == {b"5:s"}
    for store in nodes.joined:
        await store.close()


async def test_what_a_node_says_of_a_turn_of_another_one_is_not_delivered(here: Store, there: Store) -> None:
    # It began the same request under the same number, and heard too late that another node has it.
    place = Place(channel="slack", address="C1")
    turn = new(1, rest=msgspec.structs.replace(ASKED, reply_to=place, request_id="s-1"))
    assert await there.accept(turn) is None
    await there.finish(ended(turn, "", TurnState.CANCELLED))  # it was cancelled before its first word

    other = ended(turn, "an answer that nobody was told")
    assert turn.rest is not None
    last = other.events[-1].kind
    assert isinstance(last, Completed)
    with pytest.raises(TurnInterrupted):
        await here.finish(msgspec.structs.replace(other, delivery=delivery_of(turn.key, turn.rest, last)))

    assert await there.outbox.due([("w", "slack")]) == []
    stored = await there.find_turn(turn.key)
    assert stored is not None
    assert stored.state is TurnState.CANCELLED
