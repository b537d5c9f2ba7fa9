"""Many turns on one stream: commands side by side, answers that name their command, a clean end."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import Any

import grpc
from grpc import aio
from moltbot.v1 import chat_pb2, message_pb2
from moltbot_server.testing import RunningServer
from rpc_calls import Api, WatchedEngine, kinds, reason_of, refused, text_of, turn


class Talk:
    """One open `Converse` stream."""

    def __init__(self, api: Api, **options: Any) -> None:
        self.call = api.chat.Converse(metadata=api.metadata, **options)
        self.answers: dict[str, list[chat_pb2.ConverseResponse]] = defaultdict(list)

    async def start(self, ref: str, spoken: chat_pb2.TurnInput) -> None:
        """Send a turn."""
        await self.call.write(chat_pb2.ConverseRequest(ref=ref, start=spoken))

    async def cancel(self, ref: str, name: str) -> None:
        """Send a cancellation."""
        await self.call.write(chat_pb2.ConverseRequest(ref=ref, cancel=chat_pb2.CancelTurnRequest(name=name)))

    async def resume(self, ref: str, name: str, after: int = 0) -> None:
        """Send a wish to follow a turn."""
        resume = chat_pb2.ResumeTurnRequest(name=name, after_sequence=after)
        await self.call.write(chat_pb2.ConverseRequest(ref=ref, resume=resume))

    async def next(self) -> chat_pb2.ConverseResponse:
        """Return the next answer."""
        response = await self.call.read()
        assert isinstance(response, chat_pb2.ConverseResponse), "the stream has ended"
        self.answers[response.ref].append(response)
        return response

    async def end(self) -> None:
        """Send no more and read the rest."""
        await self.call.done_writing()
        while (response := await self.call.read()) is not aio.EOF:
            self.answers[response.ref].append(response)

    def events(self, ref: str) -> list[chat_pb2.Event]:
        """Return the events that belong to a command."""
        return [answer.event for answer in self.answers[ref] if answer.WhichOneof("answer") == "event"]


async def test_turns_of_one_stream_are_told_side_by_side_and_to_their_end(api: Api) -> None:
    talk = Talk(api)
    for number in range(20):
        await talk.start(str(number), turn(f"#{number + 1} pace=0.01"))
    await talk.end()

    assert await talk.call.code() is grpc.StatusCode.OK
    assert sorted(talk.answers, key=int) == [str(number) for number in range(20)]
    for number in range(20):
        events = talk.events(str(number))
        assert (kinds(events)[0], kinds(events)[-1]) == ("accepted", "completed")
        assert kinds(events).count("completed") == 1
        assert text_of(events) == events[-1].completed.text
        assert {answer.turn for answer in talk.answers[str(number)]} == {events[0].accepted.turn}
    firsts = [answers[0].event.create_time.ToNanoseconds() for answers in talk.answers.values()]
    lasts = [answers[-1].event.create_time.ToNanoseconds() for answers in talk.answers.values()]
    assert max(firsts) < max(lasts)


async def test_a_stream_without_commands_ends_well(api: Api) -> None:
    talk = Talk(api)
    await talk.end()

    assert await talk.call.code() is grpc.StatusCode.OK
    assert talk.answers == {}


async def test_a_command_that_fails_leaves_the_stream_and_the_other_turns_alone(api: Api) -> None:
    talk = Talk(api)
    await talk.start("good", turn("#20 pace=0.01"))
    await talk.start("blank", turn("  "))
    await talk.start("model", turn(model="models/other"))
    await talk.resume("gone", "sessions/s/turns/1")
    await talk.cancel("wrong", "turns/1")
    await talk.call.write(chat_pb2.ConverseRequest(ref="nothing"))
    await talk.call.write(chat_pb2.ConverseRequest(ref="x" * 129, start=turn()))
    await talk.end()

    assert await talk.call.code() is grpc.StatusCode.OK
    errors = {
        ref[:8]: (answers[0].error.code, answers[0].error.reason)
        for ref, answers in talk.answers.items()
        if answers[0].WhichOneof("answer") == "error"
    }
    assert errors == {
        "blank": (3, "EMPTY_MESSAGE"),
        "model": (5, "MODEL_NOT_FOUND"),
        "gone": (5, "TURN_NOT_FOUND"),
        "wrong": (3, "INVALID_FIELD"),
        "nothing": (3, "INVALID_FIELD"),
        "xxxxxxxx": (3, "INVALID_FIELD"),
    }
    assert kinds(talk.events("good"))[-1] == "completed"


async def test_a_turn_is_cancelled_on_the_stream_that_follows_it(api: Api, engine: WatchedEngine) -> None:
    talk = Talk(api)
    await talk.start("long", turn("#1000 pace=0.01"))
    name = (await talk.next()).turn
    await talk.cancel("stop", name)
    await talk.cancel("stop again", name)
    await talk.end()

    answers = [talk.answers[ref][0].cancelled.cancelled for ref in ("stop", "stop again")]
    assert sorted(answers) == [False, True]
    last = talk.events("long")[-1].completed
    assert last.finish_reason == message_pb2.FINISH_REASON_CANCELLED
    assert last.text == text_of(talk.events("long"))
    assert engine.running == 0


async def test_a_turn_can_be_cancelled_when_the_stream_carries_as_many_as_it_can(api: Api) -> None:
    talk = Talk(api)
    for number in range(64):
        await talk.start(str(number), turn("#1 wait=30"))
    while len(talk.answers) < 64:
        await talk.next()
    await talk.cancel("stop", talk.answers["7"][0].turn)
    while "stop" not in talk.answers:
        await asyncio.wait_for(talk.next(), 5)

    assert talk.answers["stop"][0].cancelled.cancelled is True
    talk.call.cancel()
    for answers in talk.answers.values():
        if answers[0].turn:
            await api.cancel(answers[0].turn)


async def test_more_commands_than_run_at_once_all_get_their_turn(api: Api) -> None:
    talk = Talk(api)

    async def send() -> None:
        for number in range(150):
            await talk.start(str(number), turn("#3 pace=0.005"))
        await talk.call.done_writing()

    sending = asyncio.create_task(send())
    while (response := await talk.call.read()) is not aio.EOF:
        talk.answers[response.ref].append(response)
    await sending

    assert len(talk.answers) == 150
    assert all(kinds(talk.events(ref))[-1] == "completed" for ref in talk.answers)


async def test_a_turn_is_resumed_and_attached_to_on_a_stream(api: Api) -> None:
    whole = await api.events(turn("#9", request_id="one"))
    talk = Talk(api)
    await talk.resume("resumed", whole[0].accepted.turn, after=2)
    await talk.start("attached", turn("#9", request_id="one"))
    await talk.start("other content", turn("other", request_id="one"))
    await talk.end()

    assert talk.events("resumed")[-1] == whole[-1]
    assert all(event.sequence > 2 for event in talk.events("resumed"))
    assert talk.events("attached")[-1] == whole[-1]
    assert talk.answers["other content"][0].error.reason == "REQUEST_ID_REUSED"


async def test_turns_go_on_when_the_stream_breaks(api: Api, core: RunningServer) -> None:
    talk = Talk(api)
    await talk.start("one", turn("#20 pace=0.01"))
    name = (await talk.next()).turn
    talk.call.cancel()

    assert kinds(await api.resumed(name))[-1] == "completed"


async def test_bytes_that_are_no_command_end_the_stream_with_a_clear_status(api: Api) -> None:
    call = api.channel.stream_stream("/moltbot.v1.ChatService/Converse")(metadata=api.metadata)
    await call.write(b"\xff\xff\xff")
    error = await refused(call)

    assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")


async def test_a_core_that_leaves_ends_streams_with_the_reason(api: Api, core: RunningServer) -> None:
    idle, busy = Talk(api), Talk(api)
    for talk in (idle, busy):
        await talk.start("first", turn("#1"))
        while not (await talk.next()).event.HasField("completed"):
            pass
    await busy.start("second", turn("#20 pace=0.02"))
    while not (await busy.next()).event.HasField("text_delta"):
        pass
    leaving = asyncio.create_task(core.core.stop(10.0))
    errors = [await refused(talk.call) for talk in (busy, idle)]
    await leaving
    assert [(error.code(), reason_of(error)) for error in errors] == [(grpc.StatusCode.UNAVAILABLE, "NOT_SERVING")] * 2
