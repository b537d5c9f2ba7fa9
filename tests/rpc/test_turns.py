"""Turns as callers see them: their events, what they store, what makes them one and the same."""

from __future__ import annotations

import asyncio
import gc
import itertools
from pathlib import Path

import grpc
import pytest
from google.protobuf import duration_pb2
from moltbot.v1 import chat_pb2, message_pb2, session_pb2
from moltbot_server.errors import QueueFull
from moltbot_server.live_turn import LiveTurn
from moltbot_server.models.engine import Asker
from moltbot_server.testing import RunningServer, Script, ScriptedEngine, running_server
from moltbot_server.turn_checks import digest_of
from moltbot_server.turn_run import TurnRun
from moltbot_server.turns import TextPart, TurnInput
from rpc_calls import Api, WatchedEngine, fields_of, info_of, kinds, reason_of, refused, text_of, turn


async def test_a_turn_ends_with_exactly_one_last_event_whose_text_is_that_of_the_deltas(api: Api) -> None:
    events = await api.events(turn("#40 pace=0.002", flush_interval=duration_pb2.Duration()))

    assert kinds(events) == ["accepted", "routed", *["text_delta"] * 40, "completed"]
    assert [event.sequence for event in events] == list(range(1, 44))
    assert text_of(events) == events[-1].completed.text
    assert events[-1].completed.finish_reason == message_pb2.FINISH_REASON_STOP


async def test_deltas_that_come_close_together_are_one_event_but_the_first_never_waits(api: Api) -> None:
    events = await api.events(turn("#200", flush_interval=duration_pb2.Duration(nanos=200_000_000)))

    deltas = [event.text_delta.text for event in events if event.WhichOneof("kind") == "text_delta"]
    assert 1 <= len(deltas) <= 2
    assert "".join(deltas) == events[-1].completed.text
    assert all(one.sequence < other.sequence for one, other in itertools.pairwise(events))


async def test_the_names_that_an_accepted_turn_tells_lead_to_what_was_stored(api: Api) -> None:
    events = await api.events(turn("hello", session="sessions/talk", user="ada", channel="web"))

    accepted, completed = events[0].accepted, events[-1].completed
    assert accepted.turn == "sessions/talk/turns/1"
    assert accepted.session == "sessions/talk"
    stored = await api.messages("sessions/talk")
    assert [message.name for message in stored] == [accepted.message, completed.message]
    assert {message.turn for message in stored} == {accepted.turn}
    assert [message.role for message in stored] == [message_pb2.ROLE_USER, message_pb2.ROLE_ASSISTANT]
    assert [message.model for message in stored] == ["", completed.model]
    assert await api.said("sessions/talk") == ["hello", "You said: hello"]
    session = await api.session("sessions/talk")
    assert (session.title, session.user, session.channel, session.message_count) == ("hello", "ada", "web", 2)


async def test_a_core_names_a_session_and_a_request_when_the_caller_does_not(api: Api) -> None:
    first, second = [(await api.events(turn()))[0].accepted for _ in range(2)]

    assert first.session != second.session
    assert first.request_id != second.request_id
    assert all((first.request_id, second.request_id))


async def test_a_turn_that_fails_ends_its_stream_well_and_its_unary_call_with_the_same_status(api: Api) -> None:
    events = await api.events(turn("#9 fail=4:QUEUE_FULL", flush_interval=duration_pb2.Duration()))
    error = await refused(api.run(turn("#9 fail=4:QUEUE_FULL")))

    assert kinds(events) == ["accepted", "routed", *["text_delta"] * 4, "failed"]
    failed = events[-1].failed
    assert (failed.code, failed.reason, failed.retryable) == (8, "QUEUE_FULL", True)
    assert (error.code().value[0], reason_of(error), error.details()) == (failed.code, failed.reason, failed.message)
    assert info_of(error).metadata["retryable"] == "true"


async def test_a_failed_turn_is_no_part_of_the_history_but_its_question_is_listed(
    api: Api, engine: WatchedEngine
) -> None:
    await api.events(turn("#2 fail=1", session="sessions/s"))
    await api.events(turn("again", session="sessions/s"))

    assert engine.read[-1] == ["again"]
    assert await api.said("sessions/s") == ["#2 fail=1", "again", "You said: again"]


async def test_the_same_request_id_follows_the_same_turn_while_it_runs_and_after_its_end(api: Api) -> None:
    spoken = turn("#30 pace=0.01", request_id="one", session="sessions/s")
    first = asyncio.create_task(api.events(spoken))
    running = await api.events(spoken)
    over = await api.events(spoken)
    unary = await api.run(spoken)

    whole = await first
    assert running[0] == over[0] == whole[0]
    assert running[-1] == over[-1] == whole[-1]
    assert text_of(running) == text_of(over) == text_of(whole)
    assert (unary.turn, unary.completed) == (whole[0].accepted.turn, whole[-1].completed)
    assert unary.last_sequence == whole[-1].sequence
    assert (await api.session("sessions/s")).message_count == 2


async def test_a_request_id_is_refused_for_other_content(api: Api) -> None:
    await api.run(turn("this", request_id="one"))
    error = await refused(api.run(turn("that", request_id="one")))

    assert (error.code().name, reason_of(error)) == ("ALREADY_EXISTS", "REQUEST_ID_REUSED")


async def test_a_request_id_is_refused_for_what_comes_from_another_platform_or_is_answered_elsewhere(api: Api) -> None:
    place, other = (chat_pb2.Place(channel="slack", address=address) for address in ("C1", "C2"))
    asked = {"request_id": "event-1", "session": "sessions/s", "channel": "slack", "reply_to": place}
    answered = await api.run(turn("Hi", **asked))

    assert await api.run(turn("Hi", **asked)) == answered
    for fields in ({"channel": "discord"}, {"channel": ""}, {"reply_to": other}, {"reply_to": None}):
        foreign = turn("Hi", **{**asked, **fields})
        assert reason_of(await refused(api.run(foreign))) == "REQUEST_ID_REUSED"


def test_the_content_of_a_turn_from_nowhere_has_the_digest_that_earlier_releases_stored() -> None:
    """Calls are repeated while cores are being renewed."""
    asked = TurnInput(parts=(TextPart(text="Hi"),), session="s", user="u")
    assert digest_of(asked).hex() == "152939d45880bbc0ae33fce6519c34a7"


async def test_a_request_id_is_refused_for_other_content_while_its_turn_runs_and_after_a_restart(
    tmp_path: Path,
) -> None:
    async with running_server(tmp_path) as server:
        api = Api.of(server)
        call = api.stream(turn("#50 pace=0.01", request_id="one"))
        await call.read()
        assert reason_of(await refused(api.run(turn("that", request_id="one")))) == "REQUEST_ID_REUSED"
        call.cancel()
        await api.channel.close()
    async with running_server(tmp_path) as server:
        api = Api.of(server)
        assert reason_of(await refused(api.run(turn("that", request_id="one")))) == "REQUEST_ID_REUSED"
        await api.channel.close()


@pytest.mark.parametrize("session", ["", "sessions/crowded"], ids=["a new session", "a session that is to be read"])
async def test_many_calls_of_one_request_id_are_one_turn(api: Api, engine: WatchedEngine, session: str) -> None:
    spoken = turn("#20 pace=0.005", request_id="crowd", session=session)

    answers = await asyncio.gather(*(api.events(spoken) for _ in range(200)))

    assert {(events[0].accepted.turn, events[-1].completed.text) for events in answers} == {
        (answers[0][0].accepted.turn, answers[0][-1].completed.text)
    }
    assert {text_of(events) for events in answers} == {answers[0][-1].completed.text}
    assert len(engine.read) == 1
    assert len(await api.messages(answers[0][0].accepted.session)) == 2


async def test_calls_of_one_request_id_with_different_content_all_get_their_due(api: Api) -> None:
    calls = [api.run(turn(f"text {n % 2}", request_id="two", session="sessions/both")) for n in range(20)]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)

    turns = {outcome.turn for outcome in outcomes if isinstance(outcome, chat_pb2.RunTurnResponse)}
    refusals = [outcome for outcome in outcomes if not isinstance(outcome, chat_pb2.RunTurnResponse)]
    assert len(turns) == 1
    assert len(refusals) == 10
    assert {reason_of(error) for error in refusals} == {"REQUEST_ID_REUSED"}
    assert len(await api.messages("sessions/both")) == 2


async def test_the_same_request_id_follows_the_same_turn_after_a_restart(tmp_path: Path) -> None:
    spoken = turn("#8", request_id="one", session="sessions/s")
    async with running_server(tmp_path) as server:
        api = Api.of(server)
        first = await api.events(spoken)
        await api.channel.close()
    async with running_server(tmp_path) as server:
        api = Api.of(server)
        second, unary = await api.events(spoken), await api.run(spoken)
        assert (second[0], second[-1]) == (first[0], first[-1])
        assert kinds(second).count("accepted") == kinds(second).count("completed") == 1
        assert text_of(second) == first[-1].completed.text
        assert (unary.turn, unary.completed) == (first[0].accepted.turn, first[-1].completed)
        assert len(await api.messages("sessions/s")) == 2
        await api.channel.close()


async def test_a_turn_that_failed_for_now_is_started_again_without_a_second_question(api: Api) -> None:
    spoken = turn("#5 fail=2", request_id="again", session="sessions/s")
    first = await api.events(spoken)
    second = await api.events(spoken)

    assert first[0].accepted.turn != second[0].accepted.turn
    assert kinds(second)[-1] == "failed"
    assert await api.said("sessions/s") == ["#5 fail=2"]
    assert (await api.session("sessions/s")).message_count == 1
    old = await api.resumed(first[0].accepted.turn)
    assert old[0].accepted.request_id == "again"
    assert old[-1] == first[-1]


async def test_a_turn_that_was_started_again_is_found_as_it_ended(api: Api) -> None:
    spoken = turn("#5 fail=2", request_id="again")
    await api.events(spoken)
    second = await api.events(spoken)

    replayed = await api.resumed(second[0].accepted.turn)
    assert replayed[-1] == second[-1]
    assert text_of(replayed) == text_of(second)


async def test_a_turn_that_failed_for_good_is_not_started_again(api: Api, engine: WatchedEngine) -> None:
    spoken = turn("#5 fail=2:PERMISSION_DENIED", request_id="once")
    first = await api.events(spoken)
    second = await api.events(spoken)

    assert (first[0], first[-1]) == (second[0], second[-1])
    assert len(engine.read) == 1


async def test_a_transcript_stands_in_for_a_session_and_leaves_no_trace_in_the_list(
    api: Api, engine: WatchedEngine
) -> None:
    brought = chat_pb2.Transcript(
        messages=[
            message_pb2.Message(role=message_pb2.ROLE_SYSTEM, parts=[message_pb2.Part(text="be brief")]),
            message_pb2.Message(role=message_pb2.ROLE_USER, parts=[message_pb2.Part(text="one")]),
            message_pb2.Message(role=message_pb2.ROLE_ASSISTANT, parts=[message_pb2.Part(text="two")]),
        ]
    )
    events = await api.events(turn("three", transcript=brought))

    assert engine.read[-1] == ["be brief", "one", "two", "three"]
    assert (await api.resumed(events[0].accepted.turn))[-1] == events[-1]
    listed = await api.sessions.ListSessions(session_pb2.ListSessionsRequest(), metadata=api.metadata)
    assert list(listed.sessions) == []


async def test_a_transcript_and_a_session_are_not_taken_together(api: Api) -> None:
    error = await refused(api.run(turn(transcript=chat_pb2.Transcript(), session="sessions/s")))

    assert (error.code().name, reason_of(error)) == ("INVALID_ARGUMENT", "INVALID_FIELD")


async def test_messages_of_a_session_are_told_and_read_in_the_order_of_acceptance(
    api: Api, engine: WatchedEngine
) -> None:
    calls = [asyncio.create_task(api.events(turn(f"question {n}", session="sessions/s"))) for n in range(12)]
    streams = await asyncio.gather(*calls)

    accepted = sorted(int(events[0].accepted.turn.rpartition("/")[2]) for events in streams)
    assert accepted == list(range(1, 13))
    order = sorted(streams, key=lambda events: int(events[0].accepted.turn.rpartition("/")[2]))
    answers = [events[-1].completed.text for events in order]
    assert [text for text in await api.said("sessions/s") if text.startswith("You said")] == answers
    assert [len(read) for read in engine.read] == [1 + 2 * n for n in range(12)]


async def test_turns_of_one_session_wait_for_each_other_and_are_told_their_place(api: Api) -> None:
    first = api.stream(turn("#20 pace=0.02", session="sessions/s"))
    await first.read()
    second = asyncio.create_task(api.events(turn("second", session="sessions/s")))
    third = api.stream(turn("third", session="sessions/s"))
    places = []
    async for response in third:
        if response.event.WhichOneof("kind") == "queued":
            places.append(response.event.queued.position)
    queued = [event.queued.position for event in await second if event.WhichOneof("kind") == "queued"]

    assert sorted([queued, places]) == [[1], [2, 1]]
    timings = (await second)[-1].completed.timings
    assert timings.queue.ToTimedelta().total_seconds() > 0.1


async def test_turns_of_different_sessions_do_not_wait_for_each_other(api: Api, engine: WatchedEngine) -> None:
    calls = [asyncio.create_task(api.events(turn("#4 pace=0.05", session=f"sessions/{n}"))) for n in range(20)]
    streams = await asyncio.gather(*calls)

    assert all("queued" not in kinds(events) for events in streams)


async def test_history_is_cut_to_the_context_with_the_system_prompt_kept_and_the_cut_told(tmp_path: Path) -> None:
    engine = WatchedEngine(Script(context_length=256))
    async with running_server(tmp_path, engine=engine, system_prompt="the house rules") as server:
        api = Api.of(server)
        for n in range(12):
            last = await api.run(turn(f"question {n} " + "x" * 60, session="sessions/long"))
        await api.channel.close()

    timings = last.completed.timings
    assert timings.trimmed_messages > 0
    assert timings.history_messages + timings.trimmed_messages == 22
    read = engine.read[-1]
    assert read[0] == "the house rules"
    assert read[-1].startswith("question 11")
    assert len(read) == timings.history_messages + 2
    assert read[1].startswith("question ")


async def test_the_rules_of_a_turn_stand_before_those_of_the_workspace(tmp_path: Path) -> None:
    engine = WatchedEngine()
    async with running_server(tmp_path, engine=engine, system_prompt="house") as server:
        api = Api.of(server)
        await api.run(turn(system_prompt="mine"))
        await api.channel.close()

    assert engine.read[-1][0] == "mine"


async def test_a_message_longer_than_the_context_fails_with_its_reason(tmp_path: Path) -> None:
    async with running_server(tmp_path, engine=WatchedEngine(Script(context_length=64))) as server:
        api = Api.of(server)
        error = await refused(api.run(turn("x" * 1000)))
        last = (await api.events(turn("x" * 1000)))[-1]
        await api.channel.close()

    assert (error.code().name, reason_of(error)) == ("INVALID_ARGUMENT", "CONTEXT_LENGTH_EXCEEDED")
    assert (error.details() or "").startswith("turn.parts: takes ")
    assert fields_of(error) == ["turn.parts"]
    assert last.failed.message.startswith("turn.parts: takes ")
    assert last.failed.field == "turn.parts"


async def test_a_session_goes_on_after_a_restart_with_its_history(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        api = Api.of(server)
        await api.run(turn("one", session="sessions/s"))
        await api.channel.close()
    engine = WatchedEngine()
    async with running_server(tmp_path, engine=engine) as server:
        api = Api.of(server)
        second = await api.run(turn("two", session="sessions/s"))
        await api.channel.close()

    assert second.turn == "sessions/s/turns/2"
    assert engine.read == [["one", "You said: one", "two"]]


async def test_a_turn_cancelled_before_its_first_word_is_no_history_before_or_after_a_restart(tmp_path: Path) -> None:
    reads = []
    for _ in range(2):
        engine = WatchedEngine()
        async with running_server(tmp_path, engine=engine) as server:
            api = Api.of(server)
            call = api.stream(turn("#1 wait=30", session="sessions/s"))
            accepted = (await call.read()).event.accepted
            assert await api.cancel(accepted.turn)
            await api.run(turn("next", session="sessions/s"))
            reads.append(engine.read[-1])
            await api.channel.close()

    assert reads[0] == ["next"]
    assert reads[1] == ["next", "You said: next", "next"]


async def test_a_turn_tells_where_its_time_went(api: Api) -> None:
    timings = (await api.run(turn("#4 wait=0.1 pace=0.03"))).completed.timings

    seconds = {
        name: getattr(timings, name).ToTimedelta().total_seconds()
        for name in ("accept", "queue", "first_token", "generation", "total")
    }
    assert seconds["first_token"] >= 0.09
    assert seconds["first_token"] + seconds["generation"] >= 0.18
    assert seconds["total"] >= seconds["first_token"] + seconds["generation"] - 0.001
    assert 0 < seconds["accept"] <= seconds["total"]
    assert timings.attempts == 1


async def test_the_core_counts_turns_tokens_and_failures(core: RunningServer, api: Api) -> None:
    await api.events(turn("#5"))
    await api.events(turn("#5 fail=1"))
    await refused(api.run(turn("")))

    page = core.core.metrics.page().decode()
    assert 'moltbot_turns_total{outcome="stop"} 1.0' in page
    assert 'moltbot_turns_total{outcome="failed"} 1.0' in page
    assert 'moltbot_errors_total{reason="MODEL_UNAVAILABLE"} 1.0' in page
    assert 'moltbot_errors_total{reason="EMPTY_MESSAGE"} 1.0' in page
    assert 'moltbot_tokens_total{direction="output",model="scripted"} 5.0' in page
    assert 'moltbot_grpc_calls_total{method="ChatService/StreamTurn",status="OK"} 2.0' in page


async def test_ended_turns_are_freed_without_the_garbage_collector(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        api = Api.of(server)
        await api.run(turn())
        gc.collect()
        gc.disable()
        try:
            for text in ("hello", "#5 pace=0.001", "#5 fail=2"):
                await asyncio.gather(*(api.events(turn(text)) for _ in range(5)))
            left = [type(entry).__name__ for entry in gc.get_objects() if isinstance(entry, LiveTurn | TurnRun)]
        finally:
            gc.enable()
            await api.channel.close()
    assert left == []


class FullEngine(ScriptedEngine):
    """Takes nobody while it is full."""

    full = True

    def admit(self, asker: Asker) -> None:
        """Refuse."""
        if self.full:
            raise QueueFull("Too many answers wait already.", retry_after=0.1)


async def test_turns_of_a_flood_are_refused_alike_whether_they_were_read_or_not(tmp_path: Path) -> None:
    engine = FullEngine()
    async with running_server(tmp_path, engine=engine) as server:
        api = Api.of(server)
        refusals = [await refused(api.run(turn(f"turn {number}"))) for number in range(300)]
        strange = turn("")  # nobody looks at it to find that it is blank
        refusals.append(await refused(api.run(strange)))
        assert {refusal.code() for refusal in refusals} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert {reason_of(refusal) for refusal in refusals} == {"QUEUE_FULL"}
        assert all("grpc-retry-pushback-ms" in dict(refusal.trailing_metadata() or ()) for refusal in refusals)

        wrong = (("authorization", "Bearer mb_wrong"),)
        unknown = await refused(api.chat.RunTurn(chat_pb2.RunTurnRequest(turn=turn("x")), metadata=wrong))
        assert unknown.code() is grpc.StatusCode.UNAUTHENTICATED

        engine.full = False
        assert (await api.run(turn("hello"))).completed.text
        page = server.core.metrics.page().decode()
    assert 'moltbot_errors_total{reason="QUEUE_FULL"} 301.0' in page
