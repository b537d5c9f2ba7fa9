"""Readers that take nothing any more, while their core has more to say."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from grpc import StatusCode, aio
from moltbot import MoltBot
from moltbot.v1 import chat_pb2
from moltbot_server.rpc import slow_readers
from moltbot_server.testing import RunningServer, running_server
from rpc_calls import Api, reason_of, turn

LONG = "#40000"
"""Asks for an answer that no buffer between the two has room for."""
NARROW = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536))


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers are given up after half a second."""
    monkeypatch.setattr(slow_readers, "LONGEST", 0.5)


def given_up(core: RunningServer) -> bool:
    """Return whether a stream of the core has ended because nothing was taken from it."""
    return b'reason="SLOW_CONSUMER"' in core.core.metrics.page()


async def test_who_takes_nothing_is_told_to_resume_and_has_the_whole_answer_then(tmp_path: Path) -> None:
    async with running_server(tmp_path) as core:
        api = Api(aio.insecure_channel(core.address, options=NARROW), core.metadata)
        call = api.chat.StreamTurn(chat_pb2.StreamTurnRequest(turn=turn(LONG)), metadata=core.metadata)
        accepted = (await call.read()).event
        name, shown, last = accepted.accepted.turn, "", accepted.sequence
        async with asyncio.timeout(20):
            while not given_up(core):  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.05)
        told = None
        try:
            while isinstance(response := await call.read(), chat_pb2.StreamTurnResponse):
                shown, last = shown + response.event.text_delta.text, response.event.sequence
        except aio.AioRpcError as error:
            told = error
        assert told is not None
        assert (told.code(), reason_of(told)) == (StatusCode.RESOURCE_EXHAUSTED, "SLOW_CONSUMER")

        rest = api.chat.ResumeTurn(chat_pb2.ResumeTurnRequest(name=name, after_sequence=last), metadata=core.metadata)
        async for response in rest:
            shown += response.event.text_delta.text
        assert response.event.completed.text == shown
        await api.channel.close()


async def test_a_conversation_of_which_nothing_is_taken_ends_and_its_turns_go_on(tmp_path: Path) -> None:
    async with running_server(tmp_path) as core:
        api = Api(aio.insecure_channel(core.address, options=NARROW), core.metadata)
        call = api.chat.Converse(metadata=core.metadata)
        await call.write(chat_pb2.ConverseRequest(ref="long", start=turn(LONG)))
        await call.write(chat_pb2.ConverseRequest(ref="other", start=turn("#3")))
        name = ""
        while not name:
            response = await call.read()
            name = response.turn if response.ref == "long" else ""
        async with asyncio.timeout(20):
            while not given_up(core):  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.05)
        told = None
        try:
            while await call.read():
                pass
        except aio.AioRpcError as error:
            told = error
        assert told is not None
        assert (told.code(), reason_of(told)) == (StatusCode.RESOURCE_EXHAUSTED, "SLOW_CONSUMER")

        events = [response.event async for response in api.chat.ResumeTurn(
            chat_pb2.ResumeTurnRequest(name=name), metadata=core.metadata
        )]  # fmt: skip
        assert len(events[-1].completed.text.split()) == 40_000
        await api.channel.close()


async def test_the_python_client_goes_on_by_itself_when_its_user_reads_again(tmp_path: Path) -> None:
    async with running_server(tmp_path) as core, MoltBot(core.address, core.key) as bot:
        shown = ""
        async for event in bot.stream_turn("#600 pace=0.005", session="s"):
            shown += event.text_delta.text
            if event.HasField("accepted"):
                await asyncio.sleep(1.5)  # thinks
        assert event.completed.text == shown


async def test_a_model_that_thinks_for_long_is_no_slow_reader(tmp_path: Path) -> None:
    async with running_server(tmp_path) as core, MoltBot(core.address, core.key) as bot:
        assert (await bot.run_turn("#2 wait=1.5")).text
        events = [event async for event in bot.stream_turn("#2 wait=1.5")]
        assert events[-1].HasField("completed")
        assert not given_up(core)
