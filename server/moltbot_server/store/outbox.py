"""Answers on the way to the places where they belong: what a store promises of them.

A delivery is open until somebody confirms it or it is given up. Of the open ones of a place, the first alone can be
leased: for a time, to one receiver, who is told which attempt it is. An attempt that is not the latest one is over.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from msgspec.structs import replace

from moltbot_server.errors import DeliveryNotFound, LeaseLost
from moltbot_server.turns import Completed, Failed, FinishReason, Place, TurnInput, TurnKey, Value, encode

_KEY_BYTES = 12
"""As hexadecimal digits they fit into what Discord takes for a nonce, 25 characters."""

UNSAID = "its receivers never said that it was posted"
"""Why a delivery is given up that was leased too often."""
UNWANTED = "nobody received it"
"""Why a delivery is given up that is open for too long."""

Channel = tuple[str, str]
"""A workspace, and a channel in it."""


class NewDelivery(Value, frozen=True, kw_only=True):
    """What is to be delivered when a turn ends. `id` is the dedupe key too."""

    id: str
    place: Place
    request_id: str
    ending: Completed | Failed


class Delivery(Value, frozen=True, kw_only=True):
    """A delivery, given out for the `attempt`-th time. `create_time` is when its turn ended, in Unix seconds."""

    id: str
    turn: TurnKey
    place: Place
    request_id: str
    ending: Completed | Failed
    attempt: int
    create_time: float


class DeadLetter(Value, frozen=True, kw_only=True):
    """A delivery that was given up, why, and when (Unix seconds)."""

    delivery: Delivery
    reason: str
    dead_time: float


class Leased(Value, frozen=True, kw_only=True):
    """What a call for deliveries found, and how many were given up instead."""

    deliveries: tuple[Delivery, ...] = ()
    dead: int = 0


class Held(Value, frozen=True, kw_only=True):
    """A lease: of a delivery of a workspace, at an attempt."""

    workspace: str
    id: str
    attempt: int


class Outbox(Protocol):
    """Keeps deliveries. Every method raises `StorageUnavailable` or `StorageFull` when the store cannot do it."""

    async def due(self, channels: Collection[Channel]) -> Collection[Channel]:
        """Return the channels in which something can be leased now."""

    async def lease(self, channel: Channel, *, limit: int, seconds: float, most_attempts: int) -> Leased:
        """Lease what can be leased, the longest due first; what was given out so often in vain is given up."""

    async def renew(self, leases: Sequence[Held], seconds: float) -> Collection[Held]:
        """Let leases end later, and return those that have ended."""

    async def confirm(self, workspace: str, id: str, message: str) -> tuple[str, Place | None]:
        """Take note that a delivery was posted; return the platform's id of it, and its place if that is news.

        Raises:
            DeliveryNotFound: there is none.
            LeaseLost: it was never leased.
        """

    async def reject(
        self, lease: Held, *, reason: str, delay: float, permanent: bool, most_attempts: int
    ) -> tuple[bool, Place | None]:
        """Give a lease back: the delivery can be leased again after `delay` seconds, or is given up.

        Return whether it was given up, and its place if either is news.

        Raises:
            DeliveryNotFound: there is none.
            LeaseLost: somebody else has leased it since, or it has ended well.
        """

    async def list_dead(
        self, workspace: str, *, channel: str, before: tuple[float, str] | None, limit: int
    ) -> Sequence[DeadLetter]:
        """Return what was given up, the latest first, that comes after a place (dead time, id) in that order."""

    async def revive(self, workspace: str, id: str) -> Place | None:
        """Have a dead letter delivered after all; return its place, or None when there is none."""

    async def drop(self, workspace: str, id: str) -> bool:
        """Delete a dead letter; answer False when there is none."""

    async def count(self) -> Mapping[tuple[str, str], int]:
        """Return how many deliveries are `open` and `dead`, by channel and state."""

    async def prune(self, *, keep: float, delivered: float) -> int:
        """Delete what was posted so many seconds ago, give up what is open for `keep` seconds, and delete the dead.

        One call does a part of it; return how many that were, 0 when there are no more.
        """


def delivery_of(key: TurnKey, turn: TurnInput, ending: Completed | Failed) -> NewDelivery | None:
    """Return what has to be delivered of a turn that ended; None where nobody waits for it, or there is nothing.

    Thoughts of a model are not delivered.
    """
    if turn.reply_to is None:
        return None
    if isinstance(ending, Completed):
        silent = ending.finish_reason is FinishReason.CANCELLED and not (ending.text or ending.attachments)
        if silent or ending.finish_reason is FinishReason.JOINED:
            return None
    session = key.session
    named = encode((session.workspace, session.session, key.ordinal, turn.request_id))
    return NewDelivery(
        id=hashlib.blake2b(named, digest_size=_KEY_BYTES).hexdigest(),
        place=turn.reply_to,
        request_id=turn.request_id,
        ending=without_thoughts(ending),
    )


def without_thoughts(ending: Completed | Failed) -> Completed | Failed:
    """Return the end of a turn without what its model thought."""
    return replace(ending, reasoning="") if isinstance(ending, Completed) and ending.reasoning else ending


def not_found() -> DeliveryNotFound:
    """Return what is told of a delivery that there is not."""
    return DeliveryNotFound("there is no such delivery in this workspace")


def never_leased() -> LeaseLost:
    """Return what is told of a delivery that nobody can have posted."""
    return LeaseLost("nobody has been given this delivery yet; receive it first")


def lease_lost() -> LeaseLost:
    """Return what a receiver is told that gives back what it has not any more."""
    return LeaseLost("this attempt is over: the delivery was given out again, or has been posted")
