"""Adapters in virtual time, and the platform that they post to, which knows a post by its key."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from fault_deliveries import Given, Note, Owed, Posted, Row
from fault_history import name_of
from moltbot_server.store.outbox import Delivery
from moltbot_server.store.sealed import Sealed
from moltbot_server.turns import Completed, Event, Failed, FinishReason
from simulated_core import WORKSPACE, Node
from simulated_world import World

_events: Sealed[tuple[Event, ...]] = Sealed(tuple[Event, ...])
_SILENT = frozenset({FinishReason.CANCELLED, FinishReason.JOINED})
_PATIENCE = 60.0
"""Seconds without any news after which an adapter gives up; none should ever need so many."""


class Town(Protocol):
    """Where adapters live."""

    world: World
    notes: list[Note]
    platform: Platform

    def serving(self) -> Sequence[Node]:
        """Return the nodes that take calls."""

    def all_is_said(self) -> bool:
        """Tell whether nobody asks anything more, and nothing waits to be delivered."""


def kept_deliveries(connection: sqlite3.Connection, places: Mapping[str, str]) -> Iterator[Note]:
    """Yield what turns owe, and what became of their deliveries; `places` tells by request where answers go."""
    for session, ordinal, request, events in connection.execute(
        "SELECT session, ordinal, request_id, events FROM turns WHERE state <> 'running' AND events IS NOT NULL"
    ):
        name, _, mark = request.partition("\x1f")
        last = _events.decode(events)[-1].kind
        if name in places and isinstance(last, Completed | Failed):
            said = isinstance(last, Failed) or last.text or last.finish_reason not in _SILENT
            yield Owed(
                turn=name_of(session, ordinal),
                place=places[name],
                text=last.text if isinstance(last, Completed) else last.reason,
                silent=not said,
                gave_way=bool(mark),
            )
    for id, session, ordinal, place, state in connection.execute(
        "SELECT id, session, ordinal, address, state FROM outbox ORDER BY number"
    ):
        yield Row(key=id, turn=name_of(session, ordinal), place=place, state=state)


class Platform:
    """Shows each post once."""

    def __init__(self, town: Town) -> None:
        self._town = town
        self._known: set[str] = set()

    def post(self, adapter: str, delivery: Delivery) -> None:
        """Show a post, unless its key was seen before."""
        key, ending = delivery.turn, delivery.ending
        shown = delivery.id not in self._known
        self._known.add(delivery.id)
        self._town.notes.append(
            Posted(
                at=self._town.world.now,
                adapter=adapter,
                key=delivery.id,
                turn=name_of(key.session.session, key.ordinal),
                place=delivery.place.address,
                text=ending.text if isinstance(ending, Completed) else ending.reason,
                shown=shown,
            )
        )


class Line:
    """A call of an adapter at a node: what it says arrives in order, some time later, or not at all."""

    def __init__(self, node: Node, hear: Callable[[Any], None], over: Callable[[], None]) -> None:
        self.node = node
        self._hear, self._over = hear, over
        self._last = 0.0
        self.is_over = False
        self.begun = True  # for those who look at calls of all kinds

    def send(self, value: Any) -> None:
        """Say something."""
        self._later(lambda: self._hear(value))

    def end(self) -> None:
        """End, well or not."""
        self._later(self.cut)

    def cut(self) -> None:
        """Break: what is on the way is lost."""
        if not self.is_over:
            self.is_over = True
            self.node.world.soon(0.02, self._over)

    def hang_up(self) -> None:
        """Break it from the adapter's side."""
        self.is_over = True
        self.node.hang_up(self)

    def _later(self, arrive: Callable[[], None]) -> None:
        world = self.node.world
        self._last = max(self._last, world.now + 0.02 * world.random.random())
        world.at(self._last, lambda: None if self.is_over else arrive())


class Adapter:
    """Receives, posts and confirms; is killed at times, and forgets all then."""

    def __init__(self, town: Town, name: str, *, kills: int) -> None:
        self.town, self.name = town, name
        self._kills = kills
        self._line: Line | None = None
        self._life = 0
        self._in_hand: dict[str, Delivery] = {}
        self._news = 0.0

    def start(self) -> None:
        """Begin, or begin again after having been killed."""
        world = self.town.world
        self._news = world.now
        self._open(self._life)
        if self._kills > 0:
            self._kills -= 1
            world.after(world.random.random() * 1.5, self._die)

    def _die(self) -> None:
        self._life += 1
        self._in_hand.clear()
        if self._line is not None:
            self._line.hang_up()
        self.town.world.soon(1.0, self.start)

    def _open(self, life: int) -> None:
        world = self.town.world
        nodes = self.town.serving()
        if life != self._life or self._is_done():
            return
        if not nodes:
            world.soon(0.5, lambda: self._open(life))
            return
        node = nodes[int(world.random.random() * len(nodes))]
        self._line = Line(node, lambda delivery: self._hear(life, delivery), lambda: self._open(life))
        node.hand_out(self._line, most=1 + int(world.random.random() * 4))
        world.after(0.5, lambda: self._look(life))

    def _look(self, life: int) -> None:
        """Leave when there is nothing more to come."""
        if life != self._life or self._line is None:
            return
        if self._is_done():
            self._line.hang_up()
        else:
            self.town.world.after(0.5, lambda: self._look(life))

    def _is_done(self) -> bool:
        return self.town.all_is_said() or self.town.world.now - self._news > _PATIENCE

    def _hear(self, life: int, delivery: Delivery) -> None:
        world = self.town.world
        if life != self._life:
            return
        self._news = world.now
        self.town.notes.append(Given(at=world.now, adapter=self.name, key=delivery.id, attempt=delivery.attempt))
        known = delivery.id in self._in_hand
        self._in_hand[delivery.id] = delivery
        if not known:
            world.soon(0.6, lambda: self._post(life, delivery.id))

    def _post(self, life: int, id: str) -> None:
        world = self.town.world
        # It may have been settled meanwhile, where it was given out again while its confirmation was under way.
        if life != self._life or (delivery := self._in_hand.get(id)) is None:
            return
        chance = world.random.random()
        if chance < 0.1:
            # What somebody else may be about to post is given up by nobody.
            permanent = chance < 0.02 and delivery.attempt == 1
            self._settle(life, id, "reject", delay=world.random.random() * 0.5, permanent=permanent)
            return
        self.town.platform.post(self.name, delivery)
        world.soon(0.6, lambda: self._settle(life, id, "confirm"))

    def _settle(self, life: int, id: str, what: str, **how: Any) -> None:
        """Confirm or reject at any node, again and again until one answers."""
        world = self.town.world
        if life != self._life or (delivery := self._in_hand.get(id)) is None or self._is_done():
            return
        nodes = self.town.serving()
        if not nodes:
            world.soon(0.5, lambda: self._settle(life, id, what, **how))
            return
        node = nodes[int(world.random.random() * len(nodes))]

        attempt = delivery.attempt

        def heard(answered: bool) -> None:
            given_again = what == "reject" and id in self._in_hand and self._in_hand[id].attempt != attempt
            if answered and not given_again:
                self._in_hand.pop(id, None)
            else:
                world.soon(0.3, lambda: self._settle(life, id, what, **how))

        line = Line(node, heard, lambda: heard(False))
        if what == "confirm":
            node.ask(line, lambda: node.deliveries.confirm(WORKSPACE, id, "m"))
        else:
            after, permanent = how["delay"], how["permanent"]
            node.ask(
                line,
                lambda: node.deliveries.reject(
                    WORKSPACE, id, attempt, reason="no", retry_after=after, permanent=permanent
                ),
            )
