"""Several cores on one store in virtual time: who is there, and the calls that one makes at another for its callers."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Protocol

from moltbot_server.errors import MoltBotError, NotServing
from moltbot_server.turns import Event, TurnInput, TurnKey


class Place(Protocol):
    """A core, as the others see it."""

    name: str
    world: Any
    loop: Any
    serving: bool
    is_gone: bool

    def take(self, stream: Any) -> None:
        """Serve a stream."""

    def hang_up(self, stream: Any) -> None:
        """Let the call of a client that is gone end."""


class Nodes:
    """Who shares the store, as one of them knows it. Who stands still counts as gone, as when a lease is over."""

    shared = True

    def __init__(self, name: str, places: Sequence[Place]) -> None:
        """`places` are all cores that there ever were; more come."""
        self.node = name
        self._places = places
        self._struck: set[str] = set()

    def join(self) -> None:
        """Do nothing: the world knows."""

    def leave(self) -> None:
        """Do nothing: the world knows."""

    def find(self, node: str) -> Place | None:
        """Return a node that is there."""
        there = (place for place in self._places if not place.is_gone and not place.loop.stopped)
        return next((place for place in there if place.name == node), None)

    def address_of(self, node: str) -> str:
        """Return the name of a node that is there."""
        return node if self.find(node) is not None else ""

    def gone(self, nodes: Iterable[str]) -> Collection[str]:
        """Return those of some nodes that are gone."""
        return {node for node in nodes if node != self.node and self.find(node) is None}

    def left(self) -> Collection[str]:
        """Return the nodes that are gone and not struck yet."""
        stopped = {place.name for place in self._places if place.loop.stopped}
        return self.gone(place.name for place in self._places if place.name not in self._struck) | stopped

    def strike(self, nodes: Iterable[str]) -> None:
        """Let nodes that are gone be known no more."""
        self._struck.update(nodes)


class Leg:
    """The second part of the way of a call: from the core that was asked to the one that has the turn."""

    def __init__(self, here: Place, there: Place, turn: TurnInput, key: TurnKey | None, after: int, deadline: float):
        self._here, self._there = here, there
        self.input, self.key, self.after, self.deadline = turn, key, after, deadline
        self.is_forwarded = True
        self.begun = self._over = False
        self._arrived: list[Event | MoltBotError | None] = []
        self._waiting: asyncio.Future[None] | None = None
        self._last = 0.0

    # --- what the other core does with it -----------------------------------------------------------------------------

    def send(self, event: Event) -> None:
        """Send an event."""
        self._deliver(event)

    def end(self) -> None:
        """End well."""
        self._deliver(None)

    def fail(self, code: str, reason: str) -> None:
        """End with a status."""
        refusal = type(reason, (MoltBotError,), {"reason": reason, "status": _Status(code)})
        self._deliver(refusal(reason))

    def cut(self) -> None:
        """Break."""
        self._deliver(_lost())

    def _deliver(self, what: Event | MoltBotError | None) -> None:
        world = self._here.world
        self._last = max(self._last, world.now + 0.005 * world.random.random())
        world.at(self._last, lambda: self._arrive(what))

    def _arrive(self, what: Event | MoltBotError | None) -> None:
        if self._over or self._here.is_gone:
            return
        self._arrived.append(what)
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._here.loop.within(lambda: waiting.done() or waiting.set_result(None))

    # --- what this core does with it ----------------------------------------------------------------------------------

    def open(self) -> None:
        """Make the call."""
        self._there.take(self)
        self._watch()

    async def next(self) -> Event | None:
        """Return what arrives next; None for a good end.

        Raises:
            MoltBotError: as the other core told it, or because it is gone.
        """
        while not self._arrived:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        what = self._arrived.pop(0)
        if isinstance(what, MoltBotError):
            raise what
        return what

    def close(self) -> None:
        """Hang up."""
        if not self._over:
            self._over = True
            self._there.hang_up(self)

    def _watch(self) -> None:
        """Break when the other core has stood still for too long; when this one is killed, the other one sees it."""
        if self._here.is_gone:
            self.close()
        elif self._there.loop.stopped:
            self._arrive(_lost())
        if not self._over and not self._there.is_gone:
            self._here.world.after(0.5, self._watch)


class _Status:
    """A status by its name."""

    def __init__(self, name: str) -> None:
        self.name = name


def _lost() -> NotServing:
    return NotServing("the other core is gone", retry_after=0.1)


def way_to(here: Place, nodes: Any, elsewhere: NotServing, stream: Any) -> Leg:
    """Return the way to the core that has what a stream asks for.

    Raises:
        NotServing: it is gone, or the stream has gone one way already.
    """
    there = nodes.find(elsewhere.node) if elsewhere.node and not getattr(stream, "is_forwarded", False) else None
    if there is None or not there.serving:
        raise elsewhere
    return Leg(here, there, stream.input, stream.key, stream.after, stream.deadline)
