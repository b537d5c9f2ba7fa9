"""Answers to be posted on a platform: received as they come, each confirmed or rejected, through whatever breaks."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any
from weakref import WeakValueDictionary

import grpc
from google.protobuf import duration_pb2

from moltbot.calls import Calls, Metadata
from moltbot.errors import MoltBotClientError, from_event, from_status
from moltbot.v1 import chat_pb2, delivery_pb2, message_pb2

_OVER = frozenset({"LEASE_LOST", "DELIVERY_NOT_FOUND"})

_Call = Callable[[str, Any], Awaitable[Any]]


class Delivery:
    """The answer of a turn, or its failure, on the way to a place.

    `dedupe_key` is what the platform is to know it by, the same at every attempt; `attempt` above 1 says that somebody
    may have posted it before. `completed` is set for an answer, `failure` for a turn that failed.
    """

    def __init__(self, told: delivery_pb2.Delivery, call: _Call, settled: Callable[[str], object]) -> None:
        """`call` carries out a method of `DeliveryService` by its name; `settled` hears that this is out of hand."""
        self.name = told.name
        self.channel = told.place.channel
        self.address = told.place.address
        self.dedupe_key = told.dedupe_key
        self.turn = told.turn
        self.request_id = told.request_id
        self.attempt = told.attempt
        self.create_time = told.create_time.ToDatetime()
        self.completed: chat_pb2.Completed | None = told.completed if told.HasField("completed") else None
        self.failure: MoltBotClientError | None = from_event(told.failed) if told.HasField("failed") else None
        self.stream: object = None
        """The stream on which it came last; of no use to others."""
        self._call = call
        self._settled = settled

    def __repr__(self) -> str:
        return f"<Delivery {self.name} to {self.channel} {self.address}, attempt {self.attempt}>"

    @property
    def text(self) -> str:
        """The text of the answer; of a turn that failed, what was wrong."""
        if self.completed is not None:
            return self.completed.text
        return self.failure.message if self.failure is not None else ""

    @property
    def attachments(self) -> list[message_pb2.Part]:
        """Parts of the answer that are not text."""
        return list(self.completed.attachments) if self.completed is not None else []

    async def confirm(self, message: str = "") -> str:
        """Say that it was posted, as the platform's `message`; return the platform's id that was told first.

        Raises:
            MoltBotClientError: the core refused, or nothing led to it for too long.
        """
        request = delivery_pb2.ConfirmDeliveryRequest(name=self.name, message=message)
        try:
            message = str((await self._call("ConfirmDelivery", request)).message)
        except MoltBotClientError as error:
            if error.reason != "DELIVERY_NOT_FOUND":
                raise  # else it was posted and forgotten, or dropped
        self._settled(self.name)
        return message

    async def reject(self, reason: str = "", *, retry_after: float | None = None, permanent: bool = False) -> bool:
        """Say that it could not be posted; return whether it is given up.

        It comes again after `retry_after` seconds, or after a pause that grows; with `permanent`, or after too many
        attempts, it becomes a dead letter. An attempt that is over rejects nothing.

        Raises:
            MoltBotClientError: the core refused, or nothing led to it for too long.
        """
        request = delivery_pb2.RejectDeliveryRequest(
            name=self.name, attempt=self.attempt, reason=reason, permanent=permanent
        )
        if retry_after is not None:
            request.retry_after.CopyFrom(_duration(retry_after))
        dead = False
        while True:
            try:
                dead = bool((await self._call("RejectDelivery", request)).dead)
            except MoltBotClientError as error:
                if error.reason not in _OVER:
                    raise
                if request.attempt != self.attempt:
                    request.attempt = self.attempt  # it was leased anew meanwhile, to this receiver
                    continue
            self._settled(self.name)
            return dead


async def receive(calls: Calls, channel: str, at_once: int, metadata: Metadata) -> AsyncGenerator[Delivery, None]:
    """Yield the deliveries of a channel as they come, at most `at_once` of them not confirmed and not rejected.

    One that its receiver has in hand while the stream breaks is not yielded again, but told its new attempt. A core
    that gives one out again on the same stream thinks that it was forgotten.

    Raises:
        MoltBotClientError: the core refused, or nothing led to it for too long.
    """
    request = delivery_pb2.ReceiveDeliveriesRequest(channel=channel, max_leased=at_once)
    patience = calls.patience()
    in_hand: WeakValueDictionary[str, Delivery] = WeakValueDictionary()

    async def call(method: str, request: Any) -> Any:
        return await calls.unary(lambda link: getattr(link.deliveries, method), request, metadata)

    def settled(name: str) -> None:
        in_hand.pop(name, None)

    while True:
        link = calls.ways.pick()
        patience.left()
        stream: Any = link.deliveries.ReceiveDeliveries(request, metadata=metadata)
        try:
            await stream.wait_for_connection()
            patience.progress()
            while isinstance(response := await stream.read(), delivery_pb2.ReceiveDeliveriesResponse):
                patience.progress()
                told = response.delivery
                known = in_hand.get(told.name)
                if known is not None and known.stream is not stream:
                    known.attempt, known.stream = told.attempt, stream
                    continue
                delivery = in_hand[told.name] = Delivery(told, call, settled)
                delivery.stream = stream
                del known
                yield delivery
                del delivery  # whoever has it now says by that that it is in hand
            continue
        except grpc.aio.AioRpcError as error:
            failure = from_status(error, link.address)
        finally:
            stream.cancel()
        await calls.pause(patience, failure, link, "receive")


def _duration(seconds: float) -> duration_pb2.Duration:
    made = duration_pb2.Duration()
    made.FromNanoseconds(int(seconds * 1e9))
    return made
