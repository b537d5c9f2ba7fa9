"""Several cores on one Redis: whichever is asked, a session goes on as if there were only one."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from grpc import StatusCode, aio
from moltbot import MoltBot
from moltbot.v1 import chat_pb2, message_pb2, session_pb2
from moltbot_server.app import Core
from moltbot_server.config import Storage
from moltbot_server.testing import Rule, Script, running_server
from redis_process import KeepingRedis
from rpc_calls import Api, WatchedEngine, drained, info_of, kinds, reason_of, text_of, turn
from worker_rig import Workers

SESSION = "sessions/s"
SLOW = "#40 pace=0.03"
CANCELLED = message_pb2.FINISH_REASON_CANCELLED


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeepingRedis]:
    """A Redis that keeps what it is given; each test has a prefix of its own in it."""
    with KeepingRedis(tmp_path_factory.mktemp("redis")) as redis:
        yield redis


class Node:
    """A core, its engine, and all its services."""

    def __init__(self, core: Core, address: str, key: str) -> None:
        self.core = core
        engine = core.catalog.entries[0].engine
        assert isinstance(engine, WatchedEngine)
        self.engine = engine
        channel = aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self.api = Api(channel, (("authorization", f"Bearer {key}"),))
        self.bot = MoltBot(address, key)

    def forwarded(self) -> dict[tuple[str, ...], float]:
        """Return how many calls were made at other nodes, by method and outcome."""
        return dict(self.core.metrics.forwarded._counts)


def scripted() -> WatchedEngine:
    return WatchedEngine(Script(rules=(Rule(template="{messages} with {text}"),)))


@pytest.fixture(params=["redis", "workers"])
async def nodes(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[list[Node]]:
    """Three cores of one workspace: on one Redis, or as workers of a machine."""
    make = on_redis if request.param == "redis" else as_workers
    async with make(request, tmp_path) as nodes:
        yield nodes
        for node in nodes:
            await node.bot.close()
            await node.api.channel.close()


@asynccontextmanager
async def as_workers(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[list[Node]]:
    """Run three workers."""
    rig = Workers(tmp_path / "home", 3, {})
    try:
        nodes = []
        for number in range(1, 4):
            core = await rig.start(number, scripted())
            nodes.append(Node(core, f"unix:{rig.workspace.core_socket(number)}", rig.key))
        yield nodes
    finally:
        await rig.end()


@asynccontextmanager
async def on_redis(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[list[Node]]:
    """Run three cores on one Redis."""
    redis: KeepingRedis = request.getfixturevalue("redis")
    store = Storage(type="redis", host="127.0.0.1", port=redis.port, prefix=f"test-{secrets.token_hex(4)}")
    async with AsyncExitStack() as running:
        nodes = []
        for _ in range(3):
            server = await running.enter_async_context(
                running_server(tmp_path / "home", engine=scripted(), store=store, grace=0.5)
            )
            nodes.append(Node(server.core, server.address, server.key))
        yield nodes


async def begun(node: Node, **fields: str) -> tuple[aio.UnaryStreamCall, str]:
    """Begin a slow answer at a node; return the open call, from which the first words were read, and its name."""
    call = node.api.stream(turn(SLOW, session=SESSION, **fields))
    name = ""
    while True:
        event = (await call.read()).event
        name = event.accepted.turn or name
        if event.HasField("text_delta"):
            return call, name


# --- history ---------------------------------------------------------------------------------------------------------


async def test_each_node_knows_what_was_said_at_the_others(nodes: list[Node]) -> None:
    said: list[str] = []
    for number in range(9):
        node = nodes[number % 3]
        answer = await node.api.run(turn(f"question {number}", session=SESSION))
        assert answer.turn == f"{SESSION}/turns/{number + 1}"
        assert node.engine.read[-1] == [*said, f"question {number}"]
        said += [f"question {number}", answer.completed.text]
    assert all(not node.forwarded() for node in nodes)
    for node in nodes:
        assert await node.api.said(SESSION) == said


async def test_a_turn_that_was_begun_on_old_memory_is_begun_again_unseen(nodes: list[Node]) -> None:
    here, there = nodes[:2]
    await here.api.run(turn("one", session=SESSION))
    await there.api.run(turn("two", session=SESSION))
    before = len(here.engine.read)
    events = await here.api.events(turn("three", session=SESSION))

    assert [len(read) for read in here.engine.read[before:]] == [3, 5]
    assert kinds(events)[0] == "accepted"
    assert events[0].accepted.turn == f"{SESSION}/turns/3"
    numbers = [event.sequence for event in events]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] < 10
    assert text_of(events) == events[-1].completed.text
    assert here.engine.running == 0


async def test_what_was_reset_or_deleted_at_one_node_is_so_at_all(nodes: list[Node]) -> None:
    one, two, three = nodes
    for node in nodes:
        await node.api.run(turn("before", session=SESSION))
    await two.api.sessions.ResetSession(session_pb2.ResetSessionRequest(name=SESSION), metadata=two.api.metadata)
    assert (await one.api.run(turn("after", session=SESSION))).turn == f"{SESSION}/turns/4"
    assert one.engine.read[-1] == ["after"]

    await three.api.sessions.DeleteSession(session_pb2.DeleteSessionRequest(name=SESSION), metadata=one.api.metadata)
    for node in (one, two):
        with pytest.raises(aio.AioRpcError) as caught:
            await node.api.session(SESSION)
        assert caught.value.code() is StatusCode.NOT_FOUND
    await one.api.run(turn("anew", session=SESSION))
    assert one.engine.read[-1] == ["anew"]
    assert (await two.api.session(SESSION)).title == "anew"


async def test_a_request_that_is_repeated_beside_another_of_its_id_gets_its_answer_wherever_it_is(
    nodes: list[Node],
) -> None:
    # The other one is refused by the store; whoever repeats the first one must not be taken for its thief.
    one, two, _ = nodes

    async def told(node: Node, text: str, number: int) -> str:
        session = f"sessions/repeated-{number}"
        try:
            return (await node.api.run(turn(text, session=session, request_id=f"r{number}"))).completed.text
        except aio.AioRpcError as error:
            return reason_of(error)

    for number in range(15):
        first, other, again = await asyncio.gather(
            told(one, "mine", number), told(two, "other", number), told(two, "mine", number)
        )
        if first != "REQUEST_ID_REUSED":
            assert (first, other, again) == ("1 with mine", "REQUEST_ID_REUSED", "1 with mine")
        else:
            assert (first, other, again) == ("REQUEST_ID_REUSED", "1 with other", "REQUEST_ID_REUSED")


# --- one turn at a time ----------------------------------------------------------------------------------------------


async def test_a_second_turn_at_another_node_waits_for_the_first_and_reads_its_answer(nodes: list[Node]) -> None:
    one, two, three = nodes
    first, _ = await begun(one)
    second, third = two.api.stream(turn("second", session=SESSION)), three.api.stream(turn("third", session=SESSION))
    while not (await second.read()).event.HasField("queued"):
        continue
    positions = [event.queued.position for event in await drained(third) if event.HasField("queued")]
    whole = await drained(first)
    rest = await drained(second)

    assert positions[0] in (1, 2)
    assert positions == sorted(positions, reverse=True)
    said = [SLOW, whole[-1].completed.text, "second", rest[-1].completed.text]
    assert one.engine.read[-1][:2] == said[:2]
    assert sorted(read[-1] for read in one.engine.read) == sorted([SLOW, "second", "third"])
    assert two.engine.read == three.engine.read == []
    assert two.forwarded() == three.forwarded() == {("StreamTurn", "OK"): 1}


async def test_two_hundred_turns_of_twenty_sessions_at_random_nodes_keep_their_order(nodes: list[Node]) -> None:
    dice = random.Random(7)
    asked: list[tuple[str, str]] = [(f"s{number % 20}", f"q{number}") for number in range(200)]
    dice.shuffle(asked)

    async def ask(session: str, question: str) -> tuple[str, str, str]:
        await asyncio.sleep(dice.random() * 0.5)
        bot = dice.choice(nodes).bot
        reply = await bot.run_turn(question, session=session, request_id=f"{session}-{question}", within=60)
        return question, reply.turn, reply.text

    told = await asyncio.gather(*(ask(*each) for each in asked))

    reads = [read for node in nodes for read in node.engine.read]
    for number in range(20):
        turns = sorted((int(name.rpartition("/")[2]), question, text) for question, name, text in told
                       if name.startswith(f"sessions/s{number}/"))  # fmt: skip
        said: list[str] = []
        for _, question, text in turns:
            assert text == f"{len(said) + 1} with {question}"
            said.append(question)
            assert said in reads
            said.append(text)
        assert await dice.choice(nodes).api.said(f"sessions/s{number}") == said
        assert len(turns) == 10
        assert len({ordinal for ordinal, _, _ in turns}) == 10
    assert sum(node.engine.running for node in nodes) == 0
    for node in nodes:
        assert len(node.core.pipeline) == len(node.core.journal) == 0
        assert not node.core.pipeline._moving


async def test_a_repeated_call_is_not_taken_for_another_one_whose_number_its_turn_has(nodes: list[Node]) -> None:
    one, two, _ = nodes
    await two.api.run(turn("first", session=SESSION))
    for number in (2, 3):
        await one.api.run(turn(f"question {number}", session=SESSION, request_id=f"r{number}"))
    # The first one would be turn 2 at this node, and the second one turn 3.
    repeated, fresh = await asyncio.gather(
        two.api.events(turn("question 3", session=SESSION, request_id="r3")),
        two.api.events(turn("another", session=SESSION)),
    )
    assert repeated[0].accepted.turn == f"{SESSION}/turns/3"
    assert repeated[-1].completed.text == "5 with question 3"
    assert fresh[-1].completed.text == "7 with another"


async def test_one_request_at_three_nodes_at_once_is_one_turn(nodes: list[Node]) -> None:
    for number, session in enumerate((SESSION, "")):
        asked = turn(SLOW, session=session, request_id=f"r{number}")
        streams = await asyncio.gather(*(node.api.events(asked) for node in nodes))

        assert [kinds(events)[-1] for events in streams] == ["completed"] * 3
        assert len({events[0].accepted.turn for events in streams}) == 1
        assert len({events[-1].completed.text for events in streams}) == 1
        assert {text_of(events) for events in streams} == {streams[0][-1].completed.text}
        name = streams[0][0].accepted.turn.partition("/turns/")[0]
        assert len(await nodes[0].api.said(name)) == 2


# --- turns at other nodes --------------------------------------------------------------------------------------------


async def test_a_turn_is_resumed_and_cancelled_at_any_node(nodes: list[Node]) -> None:
    one, two, three = nodes
    stream, name = await begun(one)
    resumed = two.api.chat.ResumeTurn(
        chat_pb2.ResumeTurnRequest(name=name, after_sequence=2), metadata=two.api.metadata
    )
    assert (await resumed.read()).event.sequence > 2
    assert await three.api.cancel(name) is True

    seen, whole = await drained(resumed), await drained(stream)
    assert seen[-1] == whole[-1]
    assert whole[-1].completed.finish_reason == CANCELLED
    assert await two.api.cancel(name) is False
    assert [event.sequence for event in await three.api.resumed(name)][-1] == whole[-1].sequence
    assert three.forwarded() == {("CancelTurn", "OK"): 1}


async def test_any_node_tells_the_turn_that_runs_in_a_session(nodes: list[Node]) -> None:
    here, there, third = nodes
    await there.api.run(turn("before", session=SESSION))  # which leaves the session at hand there
    call, name = await begun(here, request_id="mine")
    for node in nodes:
        active = (await node.api.session(SESSION)).active_turn
        assert (active.name, active.request_id) == (name, "mine")
        assert active.last_sequence >= 1
    assert here.forwarded() == {}
    assert there.forwarded() == {("GetSession", "OK"): 1.0}

    call.cancel()
    assert await third.api.cancel(name)
    for node in nodes:
        assert not (await node.api.session(SESSION)).HasField("active_turn")
    assert there.forwarded() == {("GetSession", "OK"): 1.0}


async def test_a_session_is_told_without_its_turn_where_the_node_that_runs_it_does_not_answer(
    nodes: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = nodes[:2]
    call, _ = await begun(here)
    hangs = asyncio.Event()
    monkeypatch.setattr(here.core.store, "get_session", lambda key: hangs.wait())
    async with asyncio.timeout(10):
        found = await there.api.session(SESSION)
    assert (found.name, found.HasField("active_turn")) == (SESSION, False)
    hangs.set()
    call.cancel()


async def test_a_running_session_is_deleted_and_not_reset_at_any_node(nodes: list[Node]) -> None:
    one, two, _ = nodes
    stream, _ = await begun(one)
    with pytest.raises(aio.AioRpcError) as caught:
        await two.api.sessions.ResetSession(session_pb2.ResetSessionRequest(name=SESSION), metadata=two.api.metadata)
    assert (caught.value.code(), reason_of(caught.value)) == (StatusCode.FAILED_PRECONDITION, "SESSION_BUSY")
    assert ("grpc-retry-pushback-ms", "1000") in tuple(caught.value.trailing_metadata() or ())

    await two.api.sessions.DeleteSession(session_pb2.DeleteSessionRequest(name=SESSION), metadata=two.api.metadata)
    assert (await drained(stream))[-1].completed.finish_reason == CANCELLED
    with pytest.raises(aio.AioRpcError) as caught:
        await one.api.session(SESSION)
    assert caught.value.code() is StatusCode.NOT_FOUND


async def test_a_conversation_has_turns_of_several_nodes(nodes: list[Node]) -> None:
    one, two, _ = nodes
    _, name = await begun(one)
    call = two.api.chat.Converse(metadata=two.api.metadata)
    await call.write(chat_pb2.ConverseRequest(ref="next", start=turn("next", session=SESSION)))
    await call.write(chat_pb2.ConverseRequest(ref="own", start=turn("own")))
    await call.write(chat_pb2.ConverseRequest(ref="old", resume=chat_pb2.ResumeTurnRequest(name=name)))
    await call.write(chat_pb2.ConverseRequest(ref="wrong", start=turn("other", session=SESSION, request_id="x" * 200)))
    answers: dict[str, list[chat_pb2.ConverseResponse]] = {}
    cancelled = False
    while (answer := await call.read()) is not aio.EOF:
        answers.setdefault(answer.ref, []).append(answer)
        if answer.ref == "next" and answer.event.HasField("queued") and not cancelled:
            cancelled = True
            await call.write(chat_pb2.ConverseRequest(ref="stop", cancel=chat_pb2.CancelTurnRequest(name=name)))
            await call.done_writing()

    assert answers["stop"][0].cancelled.cancelled is True
    assert answers["old"][-1].event.completed.finish_reason == CANCELLED
    assert {answer.turn for answer in answers["old"]} == {name}
    assert {answer.turn for answer in answers["next"]} == {f"{SESSION}/turns/2"}
    assert answers["next"][-1].event.completed.text
    assert answers["own"][-1].event.completed.text
    assert answers["wrong"][0].error.reason == "INVALID_FIELD"


# --- through and through ---------------------------------------------------------------------------------------------


async def test_a_caller_that_leaves_ends_the_call_at_the_other_node(nodes: list[Node]) -> None:
    one, two, _ = nodes
    await begun(one)
    waiting = two.api.stream(turn("unwanted", session=SESSION, cancel_on_disconnect=True))
    while not (await waiting.read()).event.HasField("queued"):
        continue
    waiting.cancel()
    async with asyncio.timeout(5):
        while len(one.core.pipeline) > 1:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)
    assert two.forwarded() == {("StreamTurn", "CANCELLED"): 1}


async def test_a_deadline_holds_at_the_other_node(nodes: list[Node]) -> None:
    one, two, _ = nodes
    await begun(one)
    with pytest.raises(aio.AioRpcError) as caught:
        await two.api.run(turn("late", session=SESSION), timeout=0.3)
    assert caught.value.code() is StatusCode.DEADLINE_EXCEEDED
    async with asyncio.timeout(5):
        while len(one.core.pipeline) > 1:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


async def test_a_call_that_was_made_for_a_caller_goes_no_further_than_to_a_worker_of_the_same_machine(
    nodes: list[Node], request: pytest.FixtureRequest
) -> None:
    one, two, _ = nodes
    await begun(one)
    beside = "workers" in request.node.name
    for told in ("2", "x") if beside else ("1", "2", "x"):
        with pytest.raises(aio.AioRpcError) as caught:
            await two.api.chat.RunTurn(
                chat_pb2.RunTurnRequest(turn=turn("more", session=SESSION)),
                metadata=(*two.api.metadata, ("moltbot-forwarded", told)),
            )
        assert (caught.value.code(), reason_of(caught.value)) == (StatusCode.UNAVAILABLE, "NOT_SERVING")
        assert info_of(caught.value).metadata["retryable"] == "true"
        assert ("moltbot-handoff", "1") in tuple(caught.value.trailing_metadata() or ())
    assert two.forwarded() == {}


async def test_a_node_that_leaves_sends_those_who_follow_it_through_another_to_who_takes_over(
    nodes: list[Node],
) -> None:
    one, two, three = nodes
    first, name = await begun(one)
    second = two.api.stream(turn("second", session=SESSION))
    while not (await second.read()).event.HasField("queued"):
        continue
    leaving = asyncio.create_task(one.core.stop(0.1))
    with pytest.raises(aio.AioRpcError) as caught:
        await drained(second)
    assert (caught.value.code(), reason_of(caught.value)) == (StatusCode.UNAVAILABLE, "NOT_SERVING")
    assert ("moltbot-handoff", "1") in tuple(caught.value.trailing_metadata() or ())
    await leaving
    first.cancel()

    whole = [event async for event in two.bot.resume_turn(name, within=30)]
    after = [event async for event in three.bot.resume_turn(f"{SESSION}/turns/2", within=30)]
    assert whole[-1].completed.text
    assert after[-1].completed.text
    assert await three.api.said(SESSION) == [SLOW, whole[-1].completed.text, "second", after[-1].completed.text]
