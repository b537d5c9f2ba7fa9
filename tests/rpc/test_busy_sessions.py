"""What becomes of turns in a busy session: they wait, go first, or are answered together."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from moltbot.v1 import chat_pb2, message_pb2
from moltbot_server.app import WORKSPACE
from moltbot_server.config_models import SessionRules, Storage
from moltbot_server.store import NewTurn
from moltbot_server.store.protocol import JournalEntry
from moltbot_server.store.sqlite import SqliteStore
from moltbot_server.testing import RunningServer, running_server
from moltbot_server.turns import Event, SessionKey, TextDelta, TextPart, TurnInput, TurnKey, WhenBusy
from redis_process import KeepingRedis
from rpc_calls import Api, WatchedEngine, drained, kinds, turn

INTERRUPT, JOIN, QUEUE = chat_pb2.WHEN_BUSY_INTERRUPT, chat_pb2.WHEN_BUSY_JOIN, chat_pb2.WHEN_BUSY_QUEUE
SESSION = "sessions/s"
LONG = "#100000 pace=0.02"


class Talk:
    """A session in which turns are begun one after the other, each surely behind the one before."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self.streams: list[tuple[str, Any, list[chat_pb2.Event]]] = []

    async def say(self, text: str, when_busy: Any = 0, **fields: Any) -> str:
        """Begin a turn and return its name when it is accepted."""
        stream = self.api.stream(turn(text, session=SESSION, when_busy=when_busy, **fields))
        first = (await stream.read()).event
        self.streams.append((first.accepted.turn, stream, [first]))
        return str(first.accepted.turn)

    async def hold(self, when_busy: Any = 0, **fields: Any) -> str:
        """Keep the session busy with a turn that has begun to speak, until `free` is called for it."""
        name = await self.say(LONG, when_busy, **fields)
        await self.until("text_delta")
        return name

    async def free(self, name: str) -> None:
        """End a turn that keeps the session busy."""
        assert await self.api.cancel(name)

    async def until(self, kind: str, index: int = -1) -> None:
        """Read a turn's stream to an event of a kind."""
        _, stream, events = self.streams[index]
        while events[-1].WhichOneof("kind") != kind:
            events.append((await stream.read()).event)

    async def ends(self) -> list[chat_pb2.Completed]:
        """Read all to their ends, and return how they completed."""
        for _, stream, events in self.streams:
            events += await asyncio.wait_for(drained(stream), 20)
            numbers = [event.sequence for event in events]
            assert numbers == sorted(set(numbers))
        return [events[-1].completed for _, _, events in self.streams]


@pytest.fixture
def talk(api: Api) -> Talk:
    """A session of the core."""
    return Talk(api)


def reasons(ends: list[chat_pb2.Completed]) -> list[str]:
    return [message_pb2.FinishReason.Name(end.finish_reason).removeprefix("FINISH_REASON_") for end in ends]


async def test_turns_wait_unless_they_say_otherwise(talk: Talk, engine: WatchedEngine) -> None:
    busy = await talk.hold()
    for number in range(3):
        await talk.say(f"say {number}", QUEUE if number % 2 else 0)
    await talk.free(busy)
    ends = await talk.ends()

    assert reasons(ends) == ["CANCELLED", "STOP", "STOP", "STOP"]
    assert [read[-1] for read in engine.read] == [LONG, "say 0", "say 1", "say 2"]


async def test_a_turn_that_interrupts_ends_those_before_it_and_goes(
    talk: Talk, api: Api, engine: WatchedEngine
) -> None:
    await talk.hold()
    await talk.say("waits")
    await talk.say("goes", INTERRUPT)
    await talk.say("waits too")
    ends = await talk.ends()

    assert reasons(ends) == ["CANCELLED", "CANCELLED", "STOP", "STOP"]
    assert ends[0].text
    assert ends[1].text == ""
    assert [read[-1] for read in engine.read] == [LONG, "goes", "waits too"]
    # What was written so far is kept, and read by those that follow.
    assert engine.read[1] == [LONG, ends[0].text, "goes"]
    assert engine.read[2][-3:] == ["goes", ends[2].text, "waits too"]
    assert await api.said(SESSION) == [
        LONG, ends[0].text, "waits", "goes", ends[2].text, "waits too", ends[3].text,
    ]  # fmt: skip


async def test_a_repeated_call_interrupts_nobody(talk: Talk) -> None:
    await talk.say("first", INTERRUPT, request_id="event")
    await talk.until("completed")
    busy = await talk.hold()
    again = await talk.say("first", INTERRUPT, request_id="event")
    await talk.until("completed")
    await talk.free(busy)
    ends = await talk.ends()

    assert again == talk.streams[0][0]
    assert reasons(ends) == ["STOP", "CANCELLED", "STOP"]


async def test_turns_that_wait_together_are_answered_once(talk: Talk, api: Api, engine: WatchedEngine) -> None:
    busy = await talk.hold(JOIN)
    names = [await talk.say(text, JOIN) for text in ("one", "two", "three")]
    await talk.free(busy)
    ends = await talk.ends()
    await talk.say("four")
    last = (await talk.ends())[-1]

    assert reasons(ends) == ["CANCELLED", "JOINED", "JOINED", "STOP"]
    assert [end.answered_by for end in ends] == ["", names[2], names[2], ""]
    assert [(end.text, end.model, end.message) for end in ends[1:3]] == [("", "", "")] * 2
    assert engine.read[1] == [LONG, ends[0].text, "one", "two", "three"]
    assert engine.read[2] == [*engine.read[1], ends[3].text, "four"]
    assert await api.said(SESSION) == [*engine.read[2], last.text]
    positions = [event.queued.position for event in talk.streams[3][2] if event.HasField("queued")]
    assert positions == sorted(positions, reverse=True)
    assert positions[0] == 3
    assert kinds(talk.streams[1][2])[-1] == "completed"


async def test_only_neighbours_for_the_same_place_join(talk: Talk, engine: WatchedEngine) -> None:
    here, there = (chat_pb2.Place(channel="slack", address=address) for address in ("a", "b"))
    busy = await talk.hold()
    for text, rule, place in (
        ("one", JOIN, here), ("two", JOIN, here), ("three", QUEUE, here), ("four", JOIN, here), ("five", JOIN, there),
        ("six", JOIN, there),
    ):  # fmt: skip
        await talk.say(text, rule, reply_to=place)
    await talk.free(busy)
    ends = await talk.ends()

    assert reasons(ends) == ["CANCELLED", "JOINED", "STOP", "STOP", "STOP", "JOINED", "STOP"]
    assert [read[-1] for read in engine.read] == [LONG, "two", "three", "four", "six"]


async def test_those_that_come_while_others_are_answered_wait_for_the_next_answer(talk: Talk) -> None:
    busy = await talk.hold()
    first = [await talk.say(text, JOIN) for text in ("one", "two", LONG)]
    await talk.free(busy)
    await talk.until("text_delta", 3)
    later = [await talk.say(f"later {number}", JOIN) for number in range(2)]
    await talk.free(first[2])
    ends = await talk.ends()

    assert [end.answered_by for end in ends] == ["", first[2], first[2], "", later[1], ""]
    assert reasons(ends) == ["CANCELLED", "JOINED", "JOINED", "CANCELLED", "JOINED", "STOP"]


async def test_the_end_of_a_neighbour_leaves_the_others_joined(talk: Talk, api: Api, engine: WatchedEngine) -> None:
    busy = await talk.hold()
    names = [await talk.say(text, JOIN) for text in ("one", "two", "three", "four")]
    assert await api.cancel(names[1])
    assert await api.cancel(names[3])
    await talk.free(busy)
    ends = await talk.ends()

    assert reasons(ends) == ["CANCELLED", "JOINED", "CANCELLED", "STOP", "CANCELLED"]
    assert ends[1].answered_by == names[2]
    assert engine.read[1][-2:] == ["one", "three"]


async def test_a_joined_turn_delivers_nothing_and_the_one_that_answers_does(api: Api, core: RunningServer) -> None:
    talk, place = Talk(api), chat_pb2.Place(channel="slack", address="a")
    busy = await talk.hold()
    names = [await talk.say(text, JOIN, reply_to=place) for text in ("one", "two")]
    await talk.free(busy)
    await talk.ends()
    found = await core.core.store.outbox.lease(("default", "slack"), limit=9, seconds=9, most_attempts=9)

    assert [f"{SESSION}/turns/{delivery.turn.ordinal}" for delivery in found.deliveries] == [names[1]]


Served = Callable[[], contextlib.AbstractAsyncContextManager[tuple[RunningServer, Api, WatchedEngine]]]


@pytest.fixture(params=["sqlite", "redis"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    """Runs cores one after the other on one workspace, with each store that keeps something."""
    settings: dict[str, Any] = {"sessions": SessionRules(when_busy=(("slack", "join"), ("", "interrupt")))}
    with contextlib.ExitStack() as stack:
        if request.param == "redis":
            redis = stack.enter_context(KeepingRedis(tmp_path))
            settings["store"] = Storage(type="redis", port=redis.port)

        @asynccontextmanager
        async def serve() -> AsyncIterator[tuple[RunningServer, Api, WatchedEngine]]:
            engine = WatchedEngine()
            async with running_server(tmp_path / "w", engine=engine, grace=0.0, **settings) as server:
                api = Api.of(server)
                yield server, api, engine
                await api.channel.close()

        yield serve


async def test_a_core_that_starts_reads_joined_messages_from_its_store_too(served: Served) -> None:
    async with served() as (_, api, _):
        talk = Talk(api)
        busy = await talk.hold(channel="slack")
        for text in ("one", "two"):
            await talk.say(text, channel="slack")
        await talk.free(busy)
        ends = await talk.ends()
        assert reasons(ends) == ["CANCELLED", "JOINED", "STOP"]
    async with served() as (_, api, engine):
        await Talk(api).say("three", channel="slack")
        await engine.idle.wait()
        assert engine.read[0] == [LONG, ends[0].text, "one", "two", ends[2].text, "three"]
        assert await api.said(SESSION) == [*engine.read[0], "You said: three"]


async def test_what_waited_to_join_or_to_interrupt_does_so_after_its_core_too(served: Served) -> None:
    async with served() as (_, api, _):
        talk = Talk(api)
        await talk.hold(QUEUE)
        names = [talk.streams[0][0], *[await talk.say(text, JOIN) for text in ("one", "two", "three")]]
    async with served() as (_, api, engine):
        await api.cancel(names[0])
        ended = [(await api.resumed(name))[-1].completed for name in names]
        assert reasons(ended) == ["CANCELLED", "JOINED", "JOINED", "STOP"]
        assert engine.read[-1][-3:] == ["one", "two", "three"]
        talk = Talk(api)
        await talk.hold()
        waits = await talk.say("waits", QUEUE)
    async with served() as (_, api, engine):
        talk = Talk(api)
        await talk.say("goes", channel="web")  # what the setting says of all channels but one
        assert reasons(await talk.ends()) == ["STOP"]
        assert (await api.resumed(waits))[-1].completed.finish_reason == message_pb2.FINISH_REASON_CANCELLED


async def test_what_was_written_before_an_interruption_is_kept_where_the_core_died_in_between(
    tmp_path: Path,
) -> None:
    # Stored are both turns, and what was shown of the first: the core died before it could end that one.
    asked = [TurnInput(parts=(TextPart(text=text),), request_id=text, session="s") for text in ("first", "second")]
    asked[1] = msgspec.structs.replace(asked[1], when_busy=WhenBusy.INTERRUPT)
    store = SqliteStore(tmp_path / "w" / "moltbot.db")
    await store.open()
    for ordinal, each in enumerate(asked, start=1):
        key = TurnKey(session=SessionKey(workspace=WORKSPACE, session="s"), ordinal=ordinal)
        row = NewTurn(
            key=key, request_id=each.request_id, digest=b"d", create_time=time.time(), question=each.parts, rest=each
        )
        assert await store.accept(row) is None
    first = TurnKey(session=SessionKey(workspace=WORKSPACE, session="s"), ordinal=1)
    events = (Event(sequence=1, at=1.0, kind=TextDelta(text="Thirteen words")),)
    await store.append([JournalEntry(key=first, events=events)])
    await store.close()

    engine = WatchedEngine()
    async with running_server(tmp_path / "w", engine=engine) as server:
        api = Api.of(server)
        ended = [(await api.resumed(f"sessions/s/turns/{number}"))[-1].completed for number in (1, 2)]
        assert reasons(ended) == ["CANCELLED", "STOP"]
        assert ended[0].text == "Thirteen words"
        assert engine.read == [["first", "Thirteen words", "second"]]
        await api.channel.close()
