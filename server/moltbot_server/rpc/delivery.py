"""DeliveryService: answers given out to adapters, and those that were given up."""

from __future__ import annotations

from moltbot.v1 import chat_pb2, delivery_pb2, delivery_pb2_grpc

from moltbot_server.errors import DeliveryNotFound, InvalidField
from moltbot_server.outbox import Deliveries
from moltbot_server.rpc import convert, names
from moltbot_server.rpc.interceptors import Call
from moltbot_server.store.outbox import DeadLetter, Delivery
from moltbot_server.turns import Completed

_MOST_LEASED, _LEASED = 256, 16
_LONGEST_MESSAGE = 256
_LONGEST_REASON = 512
_LONGEST_PAUSE = 86_400.0
# A client takes 4 MiB at most unless it says otherwise; one answer alone may fill that.
_LARGEST_PAGE = 1 << 20


class DeliveryService(delivery_pb2_grpc.DeliveryServiceServicer):
    """Serves deliveries."""

    def __init__(self, deliveries: Deliveries) -> None:
        self._deliveries = deliveries

    async def ReceiveDeliveries(self, request: delivery_pb2.ReceiveDeliveriesRequest, call: Call) -> None:  # type: ignore[override]
        """Stream the deliveries of a channel as they come."""
        channel = names.read_channel(request.channel, "channel")
        most = request.max_leased or _LEASED
        if not 1 <= most <= _MOST_LEASED:
            raise InvalidField("max_leased", f"use 1 to {_MOST_LEASED}, or 0 for {_LEASED}")
        receiver = self._deliveries.receive(call.principal.workspace, channel, most)
        try:
            # So the adapter knows that it is heard, before there is anything for it.
            await call.context.send_initial_metadata(())
            async for delivery in receiver:
                await call.context.write(delivery_pb2.ReceiveDeliveriesResponse(delivery=_delivery(delivery)))
        finally:
            self._deliveries.leave(receiver)

    async def ConfirmDelivery(  # type: ignore[override]
        self, request: delivery_pb2.ConfirmDeliveryRequest, call: Call
    ) -> delivery_pb2.ConfirmDeliveryResponse:
        """Take note that a delivery was posted."""
        id = names.read_delivery(request.name, "name")
        if len(request.message) > _LONGEST_MESSAGE:
            raise InvalidField("message", f"use at most {_LONGEST_MESSAGE} characters")
        kept = await self._deliveries.confirm(call.principal.workspace, id, request.message)
        return delivery_pb2.ConfirmDeliveryResponse(message=kept)

    async def RejectDelivery(  # type: ignore[override]
        self, request: delivery_pb2.RejectDeliveryRequest, call: Call
    ) -> delivery_pb2.RejectDeliveryResponse:
        """Have a delivery given out again later, or give it up."""
        id = names.read_delivery(request.name, "name")
        if request.attempt < 1:
            raise InvalidField("attempt", "name the attempt that failed, as the delivery told it")
        if len(request.reason) > _LONGEST_REASON:
            raise InvalidField("reason", f"use at most {_LONGEST_REASON} characters")
        after = request.retry_after.ToNanoseconds() / 1e9 if request.HasField("retry_after") else None
        if after is not None and not 0 <= after <= _LONGEST_PAUSE:
            raise InvalidField("retry_after", f"use 0 to {_LONGEST_PAUSE:.0f} seconds")
        dead = await self._deliveries.reject(
            call.principal.workspace,
            id,
            request.attempt,
            reason=request.reason or "its receiver could not post it",
            retry_after=after,
            permanent=request.permanent,
        )
        return delivery_pb2.RejectDeliveryResponse(dead=dead)

    async def ListDeadLetters(  # type: ignore[override]
        self, request: delivery_pb2.ListDeadLettersRequest, call: Call
    ) -> delivery_pb2.ListDeadLettersResponse:
        """Answer what was given up, the latest first."""
        size = names.page_size(request.page_size, default=100, most=1000)
        if request.channel:
            names.read_channel(request.channel, "channel")
        scope = ("dead letters", request.channel)
        found = await self._deliveries.list_dead(
            call.principal.workspace,
            channel=request.channel,
            before=names.read_time_token(scope, request.page_token),
            limit=size + 1,
        )
        page = delivery_pb2.ListDeadLettersResponse()
        for letter in found[:size]:
            told = _dead_letter(letter)
            if page.dead_letters and page.ByteSize() + told.ByteSize() > _LARGEST_PAGE:
                break
            page.dead_letters.append(told)
        if len(page.dead_letters) < len(found):
            last = found[len(page.dead_letters) - 1]
            page.next_page_token = names.write_token(scope, (last.dead_time, last.delivery.id))
        return page

    async def RetryDeadLetter(  # type: ignore[override]
        self, request: delivery_pb2.RetryDeadLetterRequest, call: Call
    ) -> delivery_pb2.RetryDeadLetterResponse:
        """Have a dead letter delivered after all."""
        id = names.read_delivery(request.name, "name")
        if not await self._deliveries.revive(call.principal.workspace, id):
            raise _no_dead_letter()
        return delivery_pb2.RetryDeadLetterResponse()

    async def DropDeadLetter(  # type: ignore[override]
        self, request: delivery_pb2.DropDeadLetterRequest, call: Call
    ) -> delivery_pb2.DropDeadLetterResponse:
        """Delete a dead letter."""
        id = names.read_delivery(request.name, "name")
        if not await self._deliveries.drop(call.principal.workspace, id):
            raise _no_dead_letter()
        return delivery_pb2.DropDeadLetterResponse()


def _no_dead_letter() -> DeliveryNotFound:
    return DeliveryNotFound("there is no such dead letter in this workspace; it may have been retried or dropped")


def _delivery(value: Delivery) -> delivery_pb2.Delivery:
    key = value.turn
    told = delivery_pb2.Delivery(
        name=names.delivery_name(value.id),
        place=chat_pb2.Place(channel=value.place.channel, address=value.place.address),
        dedupe_key=value.id,
        turn=names.turn_name(key.session.session, key.ordinal),
        request_id=value.request_id,
        attempt=value.attempt,
        create_time=convert.timestamp(value.create_time),
    )
    if isinstance(value.ending, Completed):
        convert.fill_completed(told.completed, key, value.ending)
    else:
        convert.fill_failed(told.failed, key, value.ending)
    return told


def _dead_letter(value: DeadLetter) -> delivery_pb2.DeadLetter:
    return delivery_pb2.DeadLetter(
        delivery=_delivery(value.delivery), reason=value.reason, dead_time=convert.timestamp(value.dead_time)
    )
