"""Deliveries given out to the adapters that are connected here, while the store keeps them.

A delivery of a turn that ended on this node goes out at once; for those of other nodes the store is asked four times a
second, and only while an adapter waits. What is leased to a stream stays so while the stream lives.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from moltbot_server.config_models import Delivering
from moltbot_server.errors import MoltBotError, NotServing, StorageUnavailable
from moltbot_server.metrics import Metrics
from moltbot_server.store.outbox import Channel, DeadLetter, Delivery, Held, Outbox
from moltbot_server.turns import Place

log = logging.getLogger(__name__)

_LOOK_EVERY = 0.25
_RENEWALS = 3  # in the time of a lease
_LONGEST_HELD = 600.0
"""Seconds after which a lease is renewed no more: who takes so long has forgotten the delivery."""
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 300.0
"""Seconds before a delivery that was rejected is given out again: twice as long after each attempt."""
_COUNT_EVERY = 15.0
_PRUNE_EVERY = 600.0
_KEEP_DELIVERED = 86_400.0
"""Seconds for which what was posted is known, so that a late or repeated confirmation finds it."""
_MOST_CHANNELS = 50


class Receiver:
    """The deliveries of a channel for one stream: an iterator that leases them as they come, up to `most` at a time."""

    def __init__(self, deliveries: Deliveries, channel: Channel, most: int) -> None:
        self.channel = channel
        self.held: dict[str, tuple[Held, float]] = {}
        self.renewed = 0.0
        self._deliveries = deliveries
        self._most = most
        self._ready: deque[Delivery] = deque()
        self._woken = asyncio.Event()

    def __aiter__(self) -> Receiver:
        return self

    async def __anext__(self) -> Delivery:
        """Return the next delivery.

        Raises:
            NotServing: the core leaves.
            StorageUnavailable: the store cannot tell.
        """
        while not self._ready:
            self._deliveries.check_stays()
            self._woken.clear()
            if self.room:
                self._ready.extend(await self._deliveries.lease(self, self.room))
            if not self._ready:
                await self._woken.wait()
        return self._ready.popleft()

    @property
    def room(self) -> int:
        """How many deliveries it may be given yet."""
        return self._most - len(self.held)

    def wake(self) -> bool:
        """Have it look for deliveries; answer False when it has no room for any."""
        self._woken.set()
        return self.room > 0

    def let_go(self, id: str) -> None:
        """Take note that a lease is over."""
        if self.held.pop(id, None) is not None:
            self._woken.set()


class Deliveries:
    """Gives deliveries out, renews their leases, and takes note of what became of them."""

    def __init__(self, outbox: Callable[[], Outbox], settings: Delivering, metrics: Metrics) -> None:
        """`outbox` returns that of the store, once that is open."""
        self._outbox = outbox
        self._settings = settings
        self._metrics = metrics
        self._receivers: dict[Channel, deque[Receiver]] = {}
        self._looking: asyncio.Task[None] | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._leaving = False
        self._counts: Mapping[tuple[str, str], int] = {}
        self._channels: set[str] = set()

    def open(self) -> None:
        """Begin to count what there is, and to delete what is old."""
        self._keeping = asyncio.create_task(self._keep())
        self._metrics.outbox.ask(self._numbers)

    async def close(self) -> None:
        """Send the receivers away, and end."""
        self._leaving = True
        for receiver in self._all():
            receiver.wake()
        tasks = [task for task in (self._looking, self._keeping) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    # --- for adapters --------------------------------------------------------------------------------------------

    def receive(self, workspace: str, channel: str, most: int) -> Receiver:
        """Return the deliveries of a channel as they come; `leave` has to be called with it in the end.

        Raises:
            NotServing: the core leaves.
        """
        self.check_stays()
        receiver = Receiver(self, (workspace, channel), most)
        self._receivers.setdefault(receiver.channel, deque()).append(receiver)
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        return receiver

    def leave(self, receiver: Receiver) -> None:
        """Give a receiver nothing more; its leases end by themselves."""
        there = self._receivers[receiver.channel]
        there.remove(receiver)
        if not there:
            del self._receivers[receiver.channel]
        self.announce(*receiver.channel)  # it may have been the one that was woken

    def announce(self, workspace: str, channel: str) -> None:
        """Wake one who waits for deliveries of a channel: there may be one."""
        there = self._receivers.get((workspace, channel), deque())
        for _ in range(len(there)):
            receiver = there[0]
            there.rotate(-1)
            if receiver.wake():
                return

    async def lease(self, receiver: Receiver, limit: int) -> Sequence[Delivery]:
        """Lease deliveries for a receiver, and wake the next one when there may be more."""
        settings, channel = self._settings, receiver.channel
        found = await self._outbox().lease(
            channel, limit=limit, seconds=settings.lease, most_attempts=settings.max_attempts
        )
        now = asyncio.get_running_loop().time()
        receiver.renewed = now if not receiver.held else receiver.renewed
        for delivery in found.deliveries:
            receiver.held[delivery.id] = (Held(workspace=channel[0], id=delivery.id, attempt=delivery.attempt), now)
        self._count(channel[1], "leased", len(found.deliveries))
        self._count(channel[1], "dead", found.dead)
        if found.dead or len(found.deliveries) == limit:
            self.announce(*channel)
        return found.deliveries

    async def confirm(self, workspace: str, id: str, message: str) -> str:
        """Take note that a delivery was posted, and return the platform's id that was told first.

        Raises:
            DeliveryNotFound: there is none.
            LeaseLost: nobody was ever given it.
        """
        kept, place = await self._outbox().confirm(workspace, id, message)
        self._over(workspace, id, place, "delivered")
        return kept

    async def reject(
        self, workspace: str, id: str, attempt: int, *, reason: str, retry_after: float | None, permanent: bool
    ) -> bool:
        """Have a delivery given out again later, or give it up; return whether it is dead.

        Raises:
            DeliveryNotFound: there is none.
            LeaseLost: the attempt is over.
        """
        dead, place = await self._outbox().reject(
            Held(workspace=workspace, id=id, attempt=attempt),
            reason=reason,
            delay=pause(attempt) if retry_after is None else retry_after,
            permanent=permanent,
            most_attempts=self._settings.max_attempts,
        )
        self._over(workspace, id, place, "dead" if dead else "rejected")
        return dead

    def _over(self, workspace: str, id: str, place: Place | None, outcome: str) -> None:
        """Let a lease go, and the next delivery of its place."""
        for receiver in self._all():
            if receiver.channel[0] == workspace:
                receiver.let_go(id)
        if place is not None:
            self._count(place.channel, outcome, 1)
            self.announce(workspace, place.channel)

    # --- for operators -------------------------------------------------------------------------------------------

    async def list_dead(
        self, workspace: str, *, channel: str, before: tuple[float, str] | None, limit: int
    ) -> Sequence[DeadLetter]:
        """Return what was given up, the latest first."""
        return await self._outbox().list_dead(workspace, channel=channel, before=before, limit=limit)

    async def revive(self, workspace: str, id: str) -> bool:
        """Have a dead letter delivered after all; answer False when there is none."""
        place = await self._outbox().revive(workspace, id)
        if place is not None:
            self._count(place.channel, "retried", 1)
            self.announce(workspace, place.channel)
        return place is not None

    async def drop(self, workspace: str, id: str) -> bool:
        """Delete a dead letter; answer False when there is none."""
        return await self._outbox().drop(workspace, id)

    # --- inside --------------------------------------------------------------------------------------------------

    def check_stays(self) -> None:
        """Refuse when the core leaves.

        Raises:
            NotServing: it does.
        """
        if self._leaving:
            raise NotServing("the core is leaving; receive deliveries from another one", retry_after=0.5)

    async def _look(self) -> None:
        """Look after the receivers as long as there are any."""
        while self._receivers:
            await asyncio.sleep(_LOOK_EVERY)
            try:
                await self._renew()
                waiting = {receiver.channel for receiver in self._all() if receiver.room}
                for channel in await self._outbox().due(waiting) if waiting else ():
                    self.announce(*channel)
            except MoltBotError as error:
                log.debug("cannot look for deliveries now", extra={"error": error.message})

    async def _renew(self) -> None:
        """Renew the leases of streams that live, and learn which are over: other nodes are told of them too."""
        now = asyncio.get_running_loop().time()
        every = self._settings.lease / _RENEWALS
        asking = [r for r in self._all() if r.held and (not r.room or now - r.renewed >= every)]
        leases = [held for r in asking for held, since in r.held.values() if now - since < _LONGEST_HELD]
        ended = set(await self._outbox().renew(leases, self._settings.lease)) if leases else set()
        for receiver in asking:
            receiver.renewed = now
            for id, (held, since) in list(receiver.held.items()):
                if held in ended or now - since >= _LONGEST_HELD:
                    receiver.let_go(id)

    async def _keep(self) -> None:
        prune_at = 0.0
        while True:
            now = asyncio.get_running_loop().time()
            try:
                self._counts = await self._outbox().count()
                if now >= prune_at:
                    prune_at = now + _PRUNE_EVERY
                    while await self._outbox().prune(keep=self._settings.keep, delivered=_KEEP_DELIVERED):
                        continue
            except StorageUnavailable as error:
                log.debug("cannot look after deliveries now", extra={"error": error.message})  # the store has told it
            except MoltBotError as error:
                log.warning("cannot look after deliveries now; it is tried again", extra={"error": error.message})
            await asyncio.sleep(_COUNT_EVERY)

    def _all(self) -> Iterator[Receiver]:
        return (receiver for there in list(self._receivers.values()) for receiver in list(there))

    def _count(self, channel: str, outcome: str, number: int) -> None:
        if number:
            self._metrics.deliveries.add(self._label(channel), outcome, amount=number)

    def _label(self, channel: str) -> str:
        """Return the label of a channel: callers choose its name, and labels are never forgotten."""
        if channel in self._channels or len(self._channels) < _MOST_CHANNELS:
            self._channels.add(channel)
            return channel
        return "others"

    def _numbers(self) -> Iterable[tuple[tuple[str, ...], float]]:
        """Return the gauges: what the whole store has, and what is leased to streams of this node."""
        numbers: dict[tuple[str, ...], float] = {}
        leased = [((receiver.channel[1], "leased"), len(receiver.held)) for receiver in self._all()]
        told: list[tuple[tuple[str, str], Any]] = [*self._counts.items(), *leased]
        for (channel, state), number in told:
            place = (self._label(channel), state)
            numbers[place] = numbers.get(place, 0) + number
        return numbers.items()


def pause(attempt: int) -> float:
    """Return the seconds after which what failed so often is tried again; no two alike."""
    longest = min(_FIRST_PAUSE * 2.0 ** min(attempt - 1, 30), _LONGEST_PAUSE)
    return longest * random.uniform(0.5, 1.0)
