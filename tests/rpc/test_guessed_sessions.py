"""Sessions that a core has not heard of: they are taken for new while nearly all are; the store has the last word."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from pathlib import Path

import pytest
from grpc import StatusCode
from moltbot.v1 import session_pb2
from moltbot_server.errors import StorageUnavailable
from moltbot_server.store import Pending
from moltbot_server.store.protocol import JournalEntry
from moltbot_server.testing import RunningServer, running_server
from moltbot_server.turns import TurnKey
from rpc_calls import Api, WatchedEngine, drained, kinds, refused, text_of, turn


@pytest.fixture
async def core(tmp_path: Path, engine: WatchedEngine) -> AsyncIterator[RunningServer]:
    """A core that takes every session for new that it does not know."""
    async with running_server(tmp_path / "workspace", engine=engine) as server:
        server.core.sessions._guessed_from = 0.0
        yield server


async def test_a_new_session_is_answered_without_a_look(
    api: Api, core: RunningServer, engine: WatchedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core.core.store, "load_session", None)

    events = await api.events(turn("hello", session="sessions/fresh"))

    assert kinds(events)[-1] == "completed"
    assert await api.said("sessions/fresh") == ["hello", text_of(events)]
    assert engine.read == [["hello"]]


async def test_what_was_seen_before_a_turn_was_accepted_is_not_written_down_for_it(
    api: Api, core: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    append = core.core.store.append

    def noted(entries: Sequence[JournalEntry]) -> Pending[Collection[TurnKey]]:
        written.extend("".join(type(event.kind).__name__[0] for event in entry.events) for entry in entries)
        return append(entries)

    monkeypatch.setattr(core.core.store, "append", noted)

    events = await api.events(turn("#3 wait=0.2 pace=0.05", session="sessions/fresh"))

    assert kinds(events)[0] == "accepted"
    assert written, "its text is"
    assert all("T" in kinds for kinds in written)


async def test_who_was_taken_for_new_goes_on_with_what_was_said(
    api: Api, core: RunningServer, engine: WatchedEngine
) -> None:
    first = text_of(await api.events(turn("one", session="sessions/old")))
    core.core.sessions.forget_idle()

    events = await api.events(turn("two", session="sessions/old"))

    assert engine.read == [["one"], ["two"], ["one", first, "two"]], "it is begun as new, and then as what it is"
    assert events[0].accepted.turn == "sessions/old/turns/2"
    assert kinds(events).count("accepted") == 1
    assert await api.said("sessions/old") == ["one", first, "two", text_of(events)]
    assert not core.core.sessions._loading


async def test_the_first_turns_of_a_session_keep_their_order_when_they_come_at_once(
    api: Api, engine: WatchedEngine
) -> None:
    words = [f"word {number}" for number in range(8)]
    calls = [api.stream(turn(word, session="sessions/many")) for word in words]
    answers = [await drained(call) for call in calls]

    said = (await api.said("sessions/many"))[::2]
    assert sorted(said) == sorted(words)
    assert [events[-1].WhichOneof("kind") for events in answers] == ["completed"] * len(words)
    assert [len(read) for read in engine.read] == [1 + 2 * number for number in range(len(words))]


async def test_the_same_call_twice_is_one_turn_of_a_new_session(api: Api, engine: WatchedEngine) -> None:
    asked = turn("hello", session="sessions/twice", request_id="same")

    first, second = await asyncio.gather(api.events(asked), api.events(asked))

    assert first == second
    assert len(engine.read) == 1


async def test_a_session_is_reset_after_the_guess_that_it_is_new(api: Api, core: RunningServer) -> None:
    await api.run(turn("one", session="sessions/old"))
    core.core.sessions.forget_idle()
    await api.run(turn("two", session="sessions/old"))
    await api.sessions.ResetSession(session_pb2.ResetSessionRequest(name="sessions/old"), metadata=api.metadata)
    core.core.sessions.forget_idle()

    events = await api.events(turn("three", session="sessions/old"))

    assert events[0].accepted.turn == "sessions/old/turns/3"
    assert (await api.said("sessions/old"))[0] == "three"


async def test_no_more_is_guessed_when_guesses_are_wrong(api: Api, core: RunningServer, engine: WatchedEngine) -> None:
    sessions = core.core.sessions
    for number in range(60):
        await api.run(turn("one", session=f"sessions/s{number}"))
    sessions._guessed_from = 0.9
    assert sessions._new > 0.9
    begun = []
    for number in range(10):
        sessions.forget_idle()
        engine.read.clear()
        await api.run(turn("two", session=f"sessions/s{number}"))
        begun.append([len(read) for read in engine.read])

    assert begun[0] == [1, 3]
    assert begun[-1] == [3]


async def test_a_turn_that_is_not_stored_yet_is_not_found_by_the_number_of_another_one(
    api: Api, core: RunningServer, engine: WatchedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await api.events(turn("one", session="sessions/old"))
    core.core.sessions.forget_idle()
    held = asyncio.Event()
    accept = core.core.store.accept
    monkeypatch.setattr(core.core.store, "accept", lambda row: (held.set(), accept(row))[1])
    asked = asyncio.create_task(api.run(turn("two", session="sessions/old")))
    await held.wait()

    events = await api.resumed("sessions/old/turns/1")

    assert events[-1] == first[-1]
    assert (await asked).turn == "sessions/old/turns/2"


async def test_a_store_that_refuses_leaves_no_session_behind_that_nobody_can_open(
    api: Api, core: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(row: object) -> Pending[None]:
        answer: Pending[None] = Pending()
        asyncio.get_running_loop().call_soon(answer.settle, StorageUnavailable("no", retry_after=1.0))
        return answer

    with monkeypatch.context() as patched:
        patched.setattr(core.core.store, "accept", refuse)
        error = await refused(api.run(turn("one", session="sessions/s")))
    assert error.code() is StatusCode.UNAVAILABLE

    assert (await api.run(turn("one", session="sessions/s"))).turn == "sessions/s/turns/1"
