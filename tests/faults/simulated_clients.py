"""Clients in virtual time: they ask, are told, lose the line, and go on where they were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from fault_history import Cancelled, Closed, Entry, Fault, Left, Opened, Told, name_of, ordinal_of
from moltbot_server.turns import (
    Accepted,
    Completed,
    Event,
    Failed,
    Notice,
    Queued,
    Reset,
    Routed,
    SessionKey,
    TextDelta,
    TurnInput,
    TurnKey,
)
from simulated_core import WORKSPACE, Node, asked
from simulated_world import EPOCH, World

KINDS: dict[type, str] = {
    Accepted: "accepted",
    Queued: "queued",
    Routed: "routed",
    TextDelta: "text_delta",
    Reset: "reset",
    Notice: "notice",
    Completed: "completed",
    Failed: "failed",
}
_AGAIN = frozenset({"UNAVAILABLE", "RESOURCE_EXHAUSTED"})
_PATIENCE = 200
"""Calls after which a client gives up; none should ever need so many."""


class Town(Protocol):
    """Where clients live: their world, the nodes that they find, and the history of it all."""

    world: World
    history: list[Entry]
    streams: int
    asking_anew: list[Follower]
    """Those who ask once more for what had failed."""

    def serving(self) -> Sequence[Node]:
        """Return the nodes that take calls."""


def told(stream: int, at: float, event: Event) -> Told:
    """Return what an event tells."""
    kind = event.kind
    turn = text = code = ""
    retryable = False
    if isinstance(kind, Accepted):
        turn = name_of(kind.session, kind.ordinal)
    elif isinstance(kind, TextDelta | Reset):
        text = kind.text
    elif isinstance(kind, Completed):
        text, code = kind.text, str(kind.finish_reason)
    elif isinstance(kind, Failed):
        code, retryable = kind.reason, kind.retryable
    return Told(
        at=at,
        stream=stream,
        sequence=event.sequence,
        kind=KINDS[type(kind)],
        turn=turn,
        text=text,
        code=code,
        retryable=retryable,
    )


class Stream:
    """One call: what the node sends arrives in order, some time later, or not at all when the line is cut."""

    def __init__(self, follower: Follower, node: Node, number: int, turn: TurnInput, key: TurnKey | None, after: int):
        self.follower, self.node, self.number = follower, node, number
        self.input, self.key, self.after = turn, key, after
        self.deadline = follower.deadline
        self._sent = self._arrived = 0
        self._last = 0.0
        self._cut_after: int | None = None
        self.begun = False
        self.is_over = False

    def send(self, event: Event) -> None:
        """Send an event."""
        self._deliver(lambda: self.follower.hear(self, event))

    def end(self) -> None:
        """End well."""
        self._deliver(lambda: self._close("", ""))

    def fail(self, code: str, reason: str) -> None:
        """End with a status."""
        self._deliver(lambda: self._close(code, reason))

    def cut(self) -> None:
        """Break: some of what is on the way arrives still."""
        if self.is_over or self._cut_after is not None:
            return
        world = self.node.world
        self._cut_after = self._arrived + world.random.randint(0, self._sent - self._arrived)
        self._last = max(self._last, world.now) + 0.001
        world.at(self._last, lambda: self._close("UNAVAILABLE", ""))

    def _deliver(self, arrive: Any) -> None:
        world = self.node.world
        self._sent += 1
        number = self._sent
        self._last = max(self._last, world.now + 0.02 * world.random.random())

        def arrives() -> None:
            if not self.is_over and (self._cut_after is None or number <= self._cut_after):
                self._arrived = number
                arrive()

        world.at(self._last, arrives)

    def _close(self, code: str, reason: str) -> None:
        if not self.is_over:
            self.is_over = True
            self.follower.hear_end(self, code, reason)

    def hang_up(self) -> None:
        """Close it from the client's side."""
        self.is_over = True
        self.node.hang_up(self)


class Follower:
    """Somebody who wants one request answered, and stays until it is."""

    def __init__(
        self,
        town: Town,
        name: str,
        session: str,
        request: str,
        *,
        deadline: float = 0.0,
        other: bool = False,
        fields: dict[str, Any] | None = None,
    ) -> None:
        """`deadline` is in the world's time. `other`: asks for something else under the same request_id."""
        self.town, self.name, self.session, self.request = town, name, session, request
        self.deadline, self.other, self.fields = deadline, other, fields or {}
        self.turn = ""
        self.seen = 0
        self.done = False
        self.tries = 0
        self.stream: Stream | None = None

    def open(self) -> None:
        """Ask, or go on where it was."""
        if self.done:
            return
        world = self.town.world
        nodes = self.town.serving()
        self.tries += 1
        late = bool(self.deadline) and world.now > self.deadline
        if self.tries > _PATIENCE or (late and not self.turn):
            self.leave()
            return
        if not nodes:
            world.soon(0.5, self.open)
            return
        if self.turn and not late and world.random.random() < 0.25:
            self.turn, self.seen = "", 0  # repeats the call instead, and is told everything again
        node = nodes[int(world.random.random() * len(nodes))]
        self.town.streams += 1
        key = None
        if self.turn:
            place = SessionKey(workspace=WORKSPACE, session=self.session)
            key = TurnKey(session=place, ordinal=ordinal_of(self.turn))
        question = self.request + " but something else" if self.other else self.request
        turn = asked(self.session, question, self.request, **self.fields)
        self.stream = Stream(self, node, self.town.streams, turn, key, self.seen)
        self._note(
            Opened(
                at=world.now,
                follower=self.name,
                stream=self.stream.number,
                request=self.request,
                session=self.session,
                question=question,
                turn=self.turn,
                after=self.seen,
                deadline=EPOCH + self.deadline if self.deadline else 0.0,
                other=self.other,
            )
        )
        node.take(self.stream)

    def hear(self, stream: Stream, event: Event) -> None:
        """Take note of an event."""
        entry = told(stream.number, self.town.world.now, event)
        self._note(entry)
        self.seen = event.sequence
        if entry.turn:
            self.turn = entry.turn
        if entry.kind in ("completed", "failed"):
            self.done = True
            if entry.kind == "failed" and entry.retryable and self.town.world.random.random() < 0.7:
                self._ask_anew()

    def hear_end(self, stream: Stream, code: str, reason: str) -> None:
        """Take note of the stream's end, and go on if it broke."""
        self._note(Closed(at=self.town.world.now, stream=stream.number, code=code, reason=reason))
        if stream is self.stream and not self.done:
            if code in _AGAIN and not self.other:
                self.town.world.soon(0.3, self.open)
            else:
                self.done = True

    def leave(self) -> None:
        """Go away."""
        if not self.done:
            self.done = True
            self._note(Left(at=self.town.world.now, follower=self.name))
            if self.stream is not None:
                self.stream.hang_up()

    def lose_line(self) -> None:
        """Have the connection break, and go on."""
        if not self.done and self.stream is not None and not self.stream.is_over:
            self.stream.hang_up()
            self.hear_end(self.stream, "UNAVAILABLE", "")

    def cancel(self) -> None:
        """Have the turn cancelled."""
        nodes = self.town.serving()
        if self.turn and not self.done and nodes:
            place = SessionKey(workspace=WORKSPACE, session=self.session)
            name, world = self.turn, self.town.world

            def answered(cancelled: bool) -> None:
                if cancelled:
                    world.soon(0.02, lambda: self._note(Cancelled(at=world.now, turn=name)))

            nodes[0].cancel(TurnKey(session=place, ordinal=ordinal_of(name)), answered)

    def _ask_anew(self) -> None:
        again = Follower(
            self.town,
            f"{self.name}+",
            self.session,
            self.request,
            deadline=self.deadline,
            fields=self.fields,
        )
        self.town.asking_anew.append(again)
        self.town.world.soon(0.5, again.open)

    def _note(self, entry: Entry) -> None:
        self.town.history.append(entry)


def fault(town: Town, what: str, node: Node) -> None:
    """Take note of what was done to a node."""
    town.history.append(Fault(at=town.world.now, what=what, node=node.name))
