"""Answers that go to places: handed to adapters, confirmed, rejected, given up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2
from moltbot.v1 import chat_pb2, delivery_pb2, delivery_pb2_grpc, message_pb2
from moltbot_server import outbox
from moltbot_server.config_models import Delivering
from moltbot_server.testing import RunningServer, ScriptedEngine, running_server
from rpc_calls import Api, fields_of, reason_of, refused, turn, until


class Desk:
    """An adapter, as far as deliveries go."""

    def __init__(self, server: RunningServer) -> None:
        self.server = server
        self.channel = server.channel()
        self.calls = delivery_pb2_grpc.DeliveryServiceStub(self.channel)
        self.metadata = server.metadata

    def receive(self, channel: str = "slack", **fields: Any) -> Any:
        """Open a stream."""
        request = delivery_pb2.ReceiveDeliveriesRequest(channel=channel, **fields)
        return self.calls.ReceiveDeliveries(request, metadata=self.metadata)

    async def confirm(self, delivery: delivery_pb2.Delivery, message: str = "") -> str:
        """Confirm a delivery."""
        request = delivery_pb2.ConfirmDeliveryRequest(name=delivery.name, message=message)
        return str((await self.calls.ConfirmDelivery(request, metadata=self.metadata)).message)

    async def reject(self, delivery: delivery_pb2.Delivery, **fields: Any) -> bool:
        """Reject a delivery."""
        request = delivery_pb2.RejectDeliveryRequest(name=delivery.name, attempt=delivery.attempt, **fields)
        return bool((await self.calls.RejectDelivery(request, metadata=self.metadata)).dead)

    async def dead(self, **fields: Any) -> delivery_pb2.ListDeadLettersResponse:
        """List dead letters."""
        request = delivery_pb2.ListDeadLettersRequest(**fields)
        answer: delivery_pb2.ListDeadLettersResponse = await self.calls.ListDeadLetters(request, metadata=self.metadata)
        return answer


async def next_of(stream: Any, within: float = 10.0) -> delivery_pb2.Delivery:
    """Return the next delivery of a stream."""
    response = await asyncio.wait_for(stream.read(), within)
    assert isinstance(response, delivery_pb2.ReceiveDeliveriesResponse)
    return response.delivery


async def nothing_of(stream: Any, within: float = 0.6) -> None:
    """Make sure that a stream has nothing to say for a while, and leave it open."""
    reading = asyncio.ensure_future(stream.read())
    done, _ = await asyncio.wait({reading}, timeout=within)
    assert not done, reading.result()
    stream.cancel()
    await asyncio.gather(reading, return_exceptions=True)


@asynccontextmanager
async def at_desk(server: RunningServer) -> AsyncIterator[Desk]:
    desk = Desk(server)
    yield desk
    await desk.channel.close()


@pytest.fixture
async def desk(core: RunningServer) -> AsyncIterator[Desk]:
    """An adapter of the core."""
    async with at_desk(core) as desk:
        yield desk


def to(address: str = "T/C/1", channel: str = "slack", text: str = "hello", **fields: Any) -> chat_pb2.TurnInput:
    """Return a turn whose answer goes to a place."""
    return turn(text, reply_to=chat_pb2.Place(channel=channel, address=address), **fields)


async def test_an_answer_is_handed_to_the_adapter_of_its_channel_as_soon_as_it_is_there(
    api: Api, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "_LOOK_EVERY", 3600.0)  # nobody finds it by looking now and then
    other, stream = desk.receive("discord"), desk.receive()
    await stream.initial_metadata()
    outcome = await api.run(to(session="sessions/s", request_id="event 1"))
    delivery = await next_of(stream)

    assert delivery.turn == outcome.turn == "sessions/s/turns/1"
    assert delivery.name == f"deliveries/{delivery.dedupe_key}"
    assert (delivery.place.channel, delivery.place.address) == ("slack", "T/C/1")
    assert (delivery.request_id, delivery.attempt, len(delivery.dedupe_key)) == ("event 1", 1, 24)
    assert delivery.completed.text == outcome.completed.text
    assert delivery.completed.message == "sessions/s/messages/1.1"
    assert abs(delivery.create_time.ToNanoseconds() / 1e9 - time.time()) < 60
    assert await desk.confirm(delivery, "1690.34") == "1690.34"
    assert await desk.confirm(delivery, "another") == "1690.34"
    await nothing_of(stream)
    await nothing_of(other, 0.1)


async def test_what_ended_while_no_adapter_was_there_waits_for_one(api: Api, desk: Desk) -> None:
    for number in range(3):
        await api.run(to(f"place {number}", text=f"text {number}"))
    stream = desk.receive()

    deliveries = [await next_of(stream) for _ in range(3)]
    assert [delivery.place.address for delivery in deliveries] == ["place 0", "place 1", "place 2"]


async def test_a_turn_that_fails_is_delivered_as_a_failure(tmp_path: Path) -> None:
    async with running_server(tmp_path / "w", engine=_Broken()) as server, at_desk(server) as desk:
        api = Api.of(server)
        stream = desk.receive()
        error = await refused(api.chat.RunTurn(chat_pb2.RunTurnRequest(turn=to()), metadata=api.metadata))
        delivery = await next_of(stream)
        await api.channel.close()

    assert reason_of(error) == delivery.failed.reason == "INTERNAL"
    assert delivery.WhichOneof("outcome") == "failed"
    assert "incident" in delivery.failed.message


class _Broken(ScriptedEngine):
    """An engine that cannot answer."""

    def begin(self, *arguments: Any, **options: Any) -> Any:
        """Fail."""
        raise RuntimeError("broken")


async def test_adapters_of_one_channel_share_the_work(api: Api, desk: Desk) -> None:
    streams = [desk.receive(max_leased=2) for _ in range(3)]
    for stream in streams:
        await stream.initial_metadata()
    await asyncio.gather(*(api.run(to(f"place {number}")) for number in range(6)))

    found = [await next_of(stream) for stream in streams for _ in range(2)]
    assert len({delivery.name for delivery in found}) == 6
    for delivery in found:
        await desk.confirm(delivery)


async def test_a_stream_is_given_no_more_than_it_takes_until_something_is_confirmed(api: Api, desk: Desk) -> None:
    for number in range(4):
        await api.run(to(f"place {number}"))
    stream = desk.receive(max_leased=2)
    first, second = await next_of(stream), await next_of(stream)
    reading = asyncio.ensure_future(next_of(stream))
    done, _ = await asyncio.wait({reading}, timeout=0.6)
    assert not done
    await desk.confirm(second)
    third = await reading
    await desk.confirm(first)

    assert (await next_of(stream)).place.address == "place 3"
    assert third.place.address == "place 2"


async def test_deliveries_of_a_place_keep_their_order_whatever_is_rejected(api: Api, desk: Desk) -> None:
    for number in range(3):
        await api.run(to(text=f"text {number}", request_id=f"event {number}"))
    stream = desk.receive()
    first = await next_of(stream)
    assert await desk.reject(first, reason="busy", retry_after=duration_pb2.Duration(nanos=100_000_000)) is False
    again = await next_of(stream)
    assert (again.name, again.attempt) == (first.name, 2)
    await desk.confirm(again)
    second = await next_of(stream)
    assert await desk.reject(second, reason="the channel was archived", permanent=True) is True
    third = await next_of(stream)

    assert [delivery.request_id for delivery in (first, second, third)] == ["event 0", "event 1", "event 2"]
    (letter,) = (await desk.dead()).dead_letters
    assert (letter.delivery.request_id, letter.reason) == ("event 1", "the channel was archived")
    assert letter.delivery.completed.text
    assert abs(letter.dead_time.ToNanoseconds() / 1e9 - time.time()) < 60


async def test_what_an_adapter_left_behind_is_given_to_another_when_its_lease_has_ended(tmp_path: Path) -> None:
    async with running_server(tmp_path / "w", outbox=Delivering(lease=2.0)) as server, at_desk(server) as desk:
        api = Api.of(server)
        await api.run(to())
        stream = desk.receive()
        first = await next_of(stream)
        await asyncio.sleep(2.5)  # longer than the lease, which is renewed while the stream lives
        other = desk.receive()
        await nothing_of(other, 0.3)
        stream.cancel()
        again = await next_of(desk.receive())
        late = await desk.confirm(first, "posted after all")
        error = await refused(
            desk.calls.RejectDelivery(
                delivery_pb2.RejectDeliveryRequest(name=again.name, attempt=again.attempt), metadata=desk.metadata
            )
        )
        await api.channel.close()

    assert (again.name, again.dedupe_key, again.attempt) == (first.name, first.dedupe_key, 2)
    assert late == "posted after all"
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.FAILED_PRECONDITION, "LEASE_LOST")


async def test_an_adapter_that_rejects_too_often_makes_a_dead_letter_that_can_be_retried_or_dropped(
    tmp_path: Path,
) -> None:
    async with running_server(tmp_path / "w", outbox=Delivering(max_attempts=2)) as server, at_desk(server) as desk:
        api = Api.of(server)
        await api.run(to())
        stream = desk.receive()
        at_once = duration_pb2.Duration()
        assert await desk.reject(await next_of(stream), reason="first", retry_after=at_once) is False
        delivery = await next_of(stream)
        assert await desk.reject(delivery, reason="second", retry_after=at_once) is True
        retry = delivery_pb2.RetryDeadLetterRequest(name=delivery.name)
        await desk.calls.RetryDeadLetter(retry, metadata=desk.metadata)
        revived = await next_of(stream)
        assert await desk.reject(revived, permanent=True) is True
        drop = delivery_pb2.DropDeadLetterRequest(name=delivery.name)
        await desk.calls.DropDeadLetter(drop, metadata=desk.metadata)
        gone = [
            await refused(call(request, metadata=desk.metadata))
            for call, request in ((desk.calls.DropDeadLetter, drop), (desk.calls.RetryDeadLetter, retry))
        ]
        page = server.core.metrics.page().decode()
        await api.channel.close()

    assert (revived.name, revived.attempt) == (delivery.name, 3)
    assert [reason_of(error) for error in gone] == ["DELIVERY_NOT_FOUND"] * 2
    for outcome, number in (("leased", 3), ("rejected", 1), ("dead", 2), ("retried", 1)):
        assert f'moltbot_deliveries_total{{channel="slack",outcome="{outcome}"}} {number}.0' in page


async def test_dead_letters_are_listed_in_pages(api: Api, desk: Desk) -> None:
    for number in range(5):
        await api.run(to(f"place {number}", channel="slack" if number % 2 else "discord"))
    for channel, number in (("slack", 2), ("discord", 3)):
        stream = desk.receive(channel)
        for _ in range(number):
            await desk.reject(await next_of(stream), permanent=True)
        stream.cancel()
    whole = [letter.delivery.place.address for letter in (await desk.dead()).dead_letters]
    pages, token = [], ""
    while True:
        page = await desk.dead(page_size=2, page_token=token)
        pages.append([letter.delivery.place.address for letter in page.dead_letters])
        token = page.next_page_token
        if not token:
            break

    assert sorted(whole) == [f"place {number}" for number in range(5)]
    assert pages == [whole[:2], whole[2:4], whole[4:]]
    assert len((await desk.dead(channel="slack")).dead_letters) == 2
    error = await refused(
        desk.calls.ListDeadLetters(delivery_pb2.ListDeadLettersRequest(page_token="nonsense"), metadata=desk.metadata)
    )
    assert reason_of(error) == "INVALID_PAGE_TOKEN"


async def test_deliveries_survive_their_core(tmp_path: Path) -> None:
    async with running_server(tmp_path / "w") as server:
        api = Api.of(server)
        await api.run(to(request_id="event"))
        await api.channel.close()
    async with running_server(tmp_path / "w") as server, at_desk(server) as desk:
        delivery = await next_of(desk.receive())
    async with running_server(tmp_path / "w", outbox=Delivering(lease=1.0)) as server, at_desk(server) as desk:
        await desk.confirm(delivery)
        await nothing_of(desk.receive(), 1.5)

    assert delivery.request_id == "event"


async def test_a_core_that_leaves_sends_its_adapters_away(tmp_path: Path) -> None:
    async with running_server(tmp_path / "w") as server:
        desk = Desk(server)
        stream = desk.receive()
        await stream.initial_metadata()
        stopping = asyncio.create_task(server.core.stop(0.0))
        error = await refused(stream)
        await stopping
        await desk.channel.close()

    assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "NOT_SERVING")


async def test_a_stopped_answer_is_delivered_as_far_as_it_came(api: Api, desk: Desk) -> None:
    stream = desk.receive()
    events = api.stream(to(text="#100000 pace=0.02", session="sessions/s"))
    accepted = (await events.read()).event.accepted
    while not (await events.read()).event.text_delta.text:
        continue
    assert await api.cancel(accepted.turn)
    delivery = await next_of(stream)

    assert delivery.completed.finish_reason == message_pb2.FINISH_REASON_CANCELLED
    assert delivery.completed.text


@pytest.mark.parametrize(
    ("place", "field"),
    [
        ({"channel": "", "address": "a"}, "turn.reply_to.channel"),
        ({"channel": "Slack", "address": "a"}, "turn.reply_to.channel"),
        ({"channel": "x" * 33, "address": "a"}, "turn.reply_to.channel"),
        ({"channel": "slack", "address": ""}, "turn.reply_to.address"),
        ({"channel": "slack", "address": "x" * 513}, "turn.reply_to.address"),
    ],
)
async def test_a_place_that_nothing_can_be_delivered_to_is_refused(api: Api, place: Any, field: str) -> None:
    error = await refused(api.stream(turn(reply_to=chat_pb2.Place(**place))))

    assert fields_of(error) == [field]


async def test_calls_that_make_no_sense_are_refused_with_their_field(desk: Desk) -> None:
    name = "deliveries/" + "0" * 24
    wrong: list[tuple[Any, Any, str]] = [
        (desk.calls.ReceiveDeliveries, delivery_pb2.ReceiveDeliveriesRequest(), "channel"),
        (
            desk.calls.ReceiveDeliveries,
            delivery_pb2.ReceiveDeliveriesRequest(channel="slack", max_leased=257),
            "max_leased",
        ),
        (desk.calls.ConfirmDelivery, delivery_pb2.ConfirmDeliveryRequest(name="x"), "name"),
        (desk.calls.ConfirmDelivery, delivery_pb2.ConfirmDeliveryRequest(name=name, message="x" * 257), "message"),
        (desk.calls.RejectDelivery, delivery_pb2.RejectDeliveryRequest(name=name), "attempt"),
        (
            desk.calls.RejectDelivery,
            delivery_pb2.RejectDeliveryRequest(name=name, attempt=1, reason="x" * 513),
            "reason",
        ),
        (
            desk.calls.RejectDelivery,
            delivery_pb2.RejectDeliveryRequest(name=name, attempt=1, retry_after=duration_pb2.Duration(seconds=-1)),
            "retry_after",
        ),
        (desk.calls.ListDeadLetters, delivery_pb2.ListDeadLettersRequest(channel="A"), "channel"),
        (desk.calls.RetryDeadLetter, delivery_pb2.RetryDeadLetterRequest(name=""), "name"),
        (desk.calls.DropDeadLetter, delivery_pb2.DropDeadLetterRequest(name="deliveries/x"), "name"),
    ]
    for method, request, field in wrong:
        error = await refused(method(request, metadata=desk.metadata))
        assert fields_of(error) == [field]
    for method, request in (
        (desk.calls.ConfirmDelivery, delivery_pb2.ConfirmDeliveryRequest(name=name)),
        (desk.calls.RejectDelivery, delivery_pb2.RejectDeliveryRequest(name=name, attempt=1)),
    ):
        assert reason_of(await refused(method(request, metadata=desk.metadata))) == "DELIVERY_NOT_FOUND"


async def test_nothing_is_left_of_streams_that_end(api: Api, desk: Desk, core: RunningServer) -> None:
    streams = [desk.receive() for _ in range(20)]
    for stream in streams:
        await stream.initial_metadata()
    for stream in streams:
        stream.cancel()
    deliveries = core.core.deliveries

    await until(lambda: not deliveries._receivers)
    await until(lambda: deliveries._looking is None or deliveries._looking.done())
