"""The Python client against a real core, and against a core whose connections break."""

import asyncio
import traceback
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from moltbot import MoltBot, MoltBotClientError
from moltbot.credentials import find_address
from moltbot.errors import from_event
from moltbot.v1 import chat_pb2, chat_pb2_grpc, message_pb2
from moltbot_server.testing import RunningServer, running_server


@pytest.fixture
async def core(tmp_path: Path) -> AsyncIterator[RunningServer]:
    """A real core with the scripted engine."""
    async with running_server(tmp_path / "workspace") as server:
        yield server


@pytest.fixture
async def bot(core: RunningServer) -> AsyncIterator[MoltBot]:
    """A client of the core."""
    async with MoltBot(core.address, core.key) as bot:
        yield bot


async def test_a_reply_tells_its_text_its_session_and_what_it_took(bot: MoltBot) -> None:
    reply = await bot.run_turn("Hi")
    assert reply.text == "You said: Hi"
    assert reply.session.startswith("sessions/")
    assert reply.turn == f"{reply.session}/turns/1"
    assert reply.completed.finish_reason == message_pb2.FINISH_REASON_STOP
    assert reply.completed.usage.output_tokens > 0
    again = await bot.run_turn("Hi again", session=reply.session)
    assert again.session == reply.session


async def test_a_streamed_turn_begins_with_accepted_and_ends_with_completed(bot: MoltBot) -> None:
    events = [event async for event in bot.stream_turn("Hi there", session="plan", channel="tests", user="ada")]
    kinds = [event.WhichOneof("kind") for event in events]
    assert (kinds[0], kinds[-1]) == ("accepted", "completed")
    assert events[0].accepted.session == "sessions/plan"
    assert "".join(event.text_delta.text for event in events) == events[-1].completed.text == "You said: Hi there"
    sequences = [event.sequence for event in events]
    assert sequences == sorted(set(sequences))


async def test_a_turn_that_was_left_is_resumed_where_it_was_left(core: RunningServer, bot: MoltBot) -> None:
    text, last, turn = "", 0, ""
    async with aclosing(bot.stream_turn("#40 pace=0.005", flush_interval=None)) as events:
        async for event in events:
            turn = turn or event.accepted.turn
            text, last = text + event.text_delta.text, event.sequence
            if text:
                break
    async with MoltBot(core.address, core.key) as other:
        rest = [event async for event in other.resume_turn(turn, after_sequence=last)]
    whole = text + "".join(event.text_delta.text for event in rest)
    assert whole == rest[-1].completed.text
    assert len(whole.split()) == 40


async def test_what_becomes_of_a_turn_in_a_busy_session_is_said_in_the_words_of_the_configuration(bot: MoltBot) -> None:
    for word in ("join", "WHEN_BUSY_INTERRUPT"):
        assert (await bot.run_turn("Hi", when_busy=word)).text
    with pytest.raises(ValueError, match="when_busy is 'jion', and can be interrupt, join, queue"):
        await bot.run_turn("Hi", when_busy="jion")


async def test_a_model_is_named_with_or_without_its_collection(bot: MoltBot) -> None:
    for name in ("scripted", "models/scripted"):
        assert (await bot.run_turn("Hi", model=name)).completed.model == "models/scripted"
    with pytest.raises(MoltBotClientError) as refused:
        await bot.run_turn("Hi", model="scritped")
    assert refused.value.reason == "MODEL_NOT_FOUND"


async def test_a_cancelled_turn_keeps_its_text(bot: MoltBot) -> None:
    turn, text, last = "", "", None
    async for event in bot.stream_turn("#1000 pace=0.01"):
        turn = turn or event.accepted.turn
        if event.text_delta.text and not text:
            assert await bot.cancel_turn(turn) is True
        text, last = text + event.text_delta.text, event
    assert last is not None
    assert last.completed.finish_reason == message_pb2.FINISH_REASON_CANCELLED
    assert last.completed.text == text
    assert await bot.cancel_turn(turn) is False


async def test_sessions_messages_and_models_are_listed_over_their_pages(bot: MoltBot) -> None:
    for number in range(55):  # more than a page of sessions
        await bot.run_turn("Hi", session=f"s{number}")
    for _ in range(60):  # more than a page of messages
        await bot.run_turn("Hi", session="s0")
    names = [session.name async for session in bot.sessions()]
    assert names[0] == "sessions/s0"
    assert sorted(names) == sorted(f"sessions/s{number}" for number in range(55))
    roles = [message.role async for message in bot.messages("s0")]
    assert roles == [message_pb2.ROLE_USER, message_pb2.ROLE_ASSISTANT] * 61
    models = [model async for model in bot.models()]
    assert models[0].is_default
    assert await bot.get_model(models[0].name.removeprefix("models/")) == models[0]


async def test_a_session_is_read_reset_and_deleted(bot: MoltBot) -> None:
    await bot.run_turn("Hi", session="plan", user="ada")
    found = await bot.get_session("plan")
    assert (found.name, found.user, found.message_count) == ("sessions/plan", "ada", 2)
    assert (await bot.reset_session("sessions/plan")).message_count == 0
    await bot.delete_session("plan")
    with pytest.raises(MoltBotClientError) as caught:
        await bot.get_session("plan")
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND")


async def test_a_refusal_tells_code_reason_field_and_whether_to_try_again(bot: MoltBot, core: RunningServer) -> None:
    with pytest.raises(MoltBotClientError) as caught:
        await bot.run_turn("  ")
    error = caught.value
    assert (error.code, error.reason, error.retryable) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "EMPTY_MESSAGE",
        False,
    )
    assert len(error.fields) == 1
    with pytest.raises(MoltBotClientError) as caught:
        await bot.run_turn("#5 fail=2:QUEUE_FULL")
    error = caught.value
    assert (error.code, error.reason, error.retryable) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", True)
    async with MoltBot(core.address, "mb_live_wrong") as stranger:
        with pytest.raises(MoltBotClientError) as caught:
            await stranger.run_turn("Hi")
    assert (caught.value.code, caught.value.retryable) == (grpc.StatusCode.UNAUTHENTICATED, False)


async def test_a_failed_turn_ends_its_stream_with_an_event_that_is_an_error(bot: MoltBot) -> None:
    events = [event async for event in bot.stream_turn("#5 fail=2")]
    error = from_event(events[-1].failed)
    assert (error.code, error.reason, error.retryable) == (
        grpc.StatusCode.UNAVAILABLE,
        "MODEL_UNAVAILABLE",
        True,
    )


async def test_a_repeated_request_id_follows_the_first_turn(bot: MoltBot) -> None:
    first = await bot.run_turn("Hi", session="plan", request_id="once")
    assert await bot.run_turn("Hi", session="plan", request_id="once") == first
    with pytest.raises(MoltBotClientError) as caught:
        await bot.run_turn("Something else", session="plan", request_id="once")
    assert caught.value.reason == "REQUEST_ID_REUSED"


async def test_a_call_ends_within_its_time(bot: MoltBot) -> None:
    with pytest.raises(MoltBotClientError) as caught:
        await bot.run_turn("#1 wait=30", within=0.2)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    told = ""
    try:
        async for event in bot.stream_turn("#1 wait=30", within=0.2):
            told = event.failed.reason  # the core may end the turn a moment before the client's own clock
    except MoltBotClientError as late:
        told = late.code.name
    assert told == "DEADLINE_EXCEEDED"


async def test_an_address_where_nobody_is_fails_soon_and_says_unavailable() -> None:
    async with MoltBot("127.0.0.1:1", "mb_live_x") as bot, asyncio.timeout(10):
        with pytest.raises(MoltBotClientError) as caught:
            await bot.run_turn("Hi")
        assert (caught.value.code, caught.value.retryable) == (grpc.StatusCode.UNAVAILABLE, True)
        assert "nobody answers at 127.0.0.1:1 (Connection refused): start MoltBot with `moltbot start`" in str(
            caught.value
        )
    async with MoltBot("127.0.0.1:1", "mb_live_x", patience=0.5) as bot, asyncio.timeout(2):
        with pytest.raises(MoltBotClientError, match="nobody answers at") as caught:
            _ = [event async for event in bot.stream_turn("Hi")]
    assert "AioRpcError" not in "".join(traceback.format_exception(caught.value))


async def test_the_key_comes_from_the_environment_or_the_workspace(
    core: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MOLTBOT_KEY", raising=False)
    monkeypatch.setenv("MOLTBOT_WORKSPACE", str(tmp_path / "workspace"))
    async with MoltBot(core.address) as bot:
        assert (await bot.run_turn("Hi")).text
    monkeypatch.setenv("MOLTBOT_WORKSPACE", str(tmp_path / "nowhere"))
    with pytest.raises(MoltBotClientError, match="NO_KEY"):
        MoltBot(core.address)
    monkeypatch.setenv("MOLTBOT_KEY", core.key)
    async with MoltBot(core.address) as bot:
        assert (await bot.run_turn("Hi")).text


class BreakingCore(chat_pb2_grpc.ChatServiceServicer):
    """A core whose streams break after every second event, as a connection does that is cut."""

    def __init__(self, words: list[str]) -> None:
        self.calls: list[str] = []
        self._events = [chat_pb2.Event(accepted=chat_pb2.Accepted(turn="sessions/s/turns/1", session="sessions/s"))]
        self._events += [chat_pb2.Event(text_delta=chat_pb2.TextDelta(text=word)) for word in words]
        self._events.append(chat_pb2.Event(completed=chat_pb2.Completed(text="".join(words))))
        for sequence, event in enumerate(self._events, 1):
            event.sequence = sequence

    async def StreamTurn(  # noqa: N802 (the contract's name)
        self, request: chat_pb2.StreamTurnRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[chat_pb2.StreamTurnResponse]:
        self.calls.append(f"StreamTurn {bool(request.turn.request_id)}")
        for event in self._events[:2]:
            yield chat_pb2.StreamTurnResponse(event=event)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")

    async def ResumeTurn(  # noqa: N802 (the contract's name)
        self, request: chat_pb2.ResumeTurnRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[chat_pb2.ResumeTurnResponse]:
        self.calls.append(f"ResumeTurn after {request.after_sequence}")
        rest = [event for event in self._events if event.sequence > request.after_sequence]
        for event in rest[:2]:
            yield chat_pb2.ResumeTurnResponse(event=event)
        if len(rest) > 2:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")


@asynccontextmanager
async def serving(core: chat_pb2_grpc.ChatServiceServicer, port: int = 0) -> AsyncIterator[int]:
    """Serve a core of one's own; gives the port."""
    server = grpc.aio.server()
    chat_pb2_grpc.add_ChatServiceServicer_to_server(core, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield bound
    finally:
        await server.stop(None)


async def test_a_stream_that_breaks_again_and_again_is_followed_to_its_end() -> None:
    core = BreakingCore(["a", "b", "c", "d", "e"])
    async with serving(core) as port, MoltBot(f"127.0.0.1:{port}", "key") as bot:
        events = [event async for event in bot.stream_turn("Hi")]
    assert [event.sequence for event in events] == [1, 2, 3, 4, 5, 6, 7]
    assert core.calls == ["StreamTurn True", "ResumeTurn after 2", "ResumeTurn after 4", "ResumeTurn after 6"]


async def test_a_core_that_forgot_a_turn_by_restarting_is_told_as_an_interruption() -> None:
    class Forgetful(BreakingCore):
        async def ResumeTurn(  # noqa: N802 (the contract's name)
            self, request: chat_pb2.ResumeTurnRequest, context: grpc.aio.ServicerContext
        ) -> AsyncIterator[chat_pb2.ResumeTurnResponse]:
            status = status_pb2.Status(code=5, message="no such turn")
            status.details.add().Pack(error_details_pb2.ErrorInfo(reason="TURN_NOT_FOUND", domain="moltbot"))
            details = (("grpc-status-details-bin", status.SerializeToString()),)
            await context.abort(grpc.StatusCode.NOT_FOUND, status.message, details)
            yield chat_pb2.ResumeTurnResponse()

    async with serving(Forgetful(["a", "b"])) as port, MoltBot(f"127.0.0.1:{port}", "key") as bot:
        with pytest.raises(MoltBotClientError) as caught:
            _ = [event async for event in bot.stream_turn("Hi")]
        assert (caught.value.reason, caught.value.retryable) == ("TURN_INTERRUPTED", True)
        with pytest.raises(MoltBotClientError) as caught:
            _ = [event async for event in bot.resume_turn("sessions/s/turns/1")]
        assert (caught.value.reason, caught.value.retryable) == ("TURN_NOT_FOUND", False)


def test_an_address_is_that_of_what_runs_in_the_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOLTBOT_ADDRESS", raising=False)
    monkeypatch.setenv("MOLTBOT_WORKSPACE", str(tmp_path))
    assert find_address() == "127.0.0.1:50051"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "start.json").write_text('{"grpc": "127.0.0.1:50999"}')
    assert find_address() == "127.0.0.1:50999"
    monkeypatch.setenv("MOLTBOT_ADDRESS", "core.example.com:443")
    assert find_address() == "core.example.com:443"
    monkeypatch.delenv("MOLTBOT_ADDRESS")
    (tmp_path / "run" / "start.json").write_text("[]")
    assert find_address() == "127.0.0.1:50051"
