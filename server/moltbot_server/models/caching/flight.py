"""One answer for everybody who asks the same thing at the same time."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from moltbot_server.models.engine import Finished, Generation, Listener
from moltbot_server.turns import Notice, Reset, Routed


class Flight:
    """An answer on its way to all who listen: a `Listener` of the engine, and the place where others join.

    Who joins late hears at once what was written before. Who stops leaves the others alone; with the last one the
    engine is stopped. Belongs to the event loop's thread.
    """

    __slots__ = ("_done", "_hearing", "_left", "_place", "_seats", "generation", "notes", "over", "pieces", "thoughts")

    def __init__(self, done: Callable[[Flight, Finished | Exception], None], left: Callable[[Flight], None]) -> None:
        """`done` hears of the end before anybody else; `left` hears that nobody listens any more."""
        self._done, self._left = done, left
        self._seats: dict[Seat, None] = {}
        self._hearing: tuple[Seat, ...] = ()
        self._place = 0
        self.generation: Generation | None = None
        self.notes: list[Routed | Notice] = []
        self.thoughts: list[str] = []
        self.pieces: list[tuple[str, int]] = []
        self.over = False

    def join(self, listener: Listener) -> Seat:
        """Let a listener hear what there is so far, and everything from now on."""
        for note in self.notes:
            listener.noted(note)
        if self.thoughts:
            listener.thought("".join(self.thoughts))
        if self.pieces:
            listener.wrote("".join(text for text, _ in self.pieces), sum(tokens for _, tokens in self.pieces))
        elif self._place and not self.thoughts:
            listener.queued(self._place)
        seat = Seat(self, listener)
        self._seats[seat] = None
        self._hearing = ()
        return seat

    def leave(self, seat: Seat) -> None:
        """Let a listener hear no more."""
        self._seats.pop(seat, None)
        self._hearing = ()
        if not self._seats and not self.over:
            self.over = True
            self._left(self)
            if self.generation is not None:
                self.generation.stop()
                self.generation = None

    # --- what the engine tells ---------------------------------------------------------------------------------------

    def queued(self, position: int) -> None:
        """Pass on the place in the queue."""
        self._place = position
        for seat in self._hearing or self._all():
            if seat.listener is not None:
                seat.listener.queued(position)

    def wrote(self, text: str, tokens: int) -> None:
        """Pass on another piece."""
        self.pieces.append((text, tokens))
        for seat in self._hearing or self._all():
            if seat.listener is not None:  # the one before may have ended its listening
                seat.listener.wrote(text, tokens)

    def thought(self, text: str) -> None:
        """Pass on what the model thinks."""
        self.thoughts.append(text)
        for seat in self._hearing or self._all():
            if seat.listener is not None:
                seat.listener.thought(text)

    def noted(self, what: Routed | Notice | Reset) -> None:
        """Pass on who answers, or that what was written is void; then nobody who joins hears of it any more."""
        if isinstance(what, Reset):
            self.thoughts.clear()
            self.pieces = [(what.text, 0)] if what.text else []
        else:
            self.notes.append(what)
        for seat in self._hearing or self._all():
            if seat.listener is not None:
                seat.listener.noted(what)

    def ended(self, end: Finished | Exception) -> None:
        """Pass on the end. For all but one it cost nothing: their answer was asked for by somebody else."""
        if self.over:
            return
        self.over = True
        self._done(self, end)
        seats, self._seats, self._hearing, self.generation = self._seats, {}, (), None
        for seat in seats:
            listener, seat.listener = seat.listener, None
            if listener is not None:
                listener.ended(end)
                end = _given(end)

    def _all(self) -> tuple[Seat, ...]:
        """Return those who listen, as they are while one of them is told something: telling may change who listens."""
        self._hearing = tuple(self._seats)
        return self._hearing


class Seat:
    """One listener's part in a flight: a `Generation`."""

    __slots__ = ("_flight", "listener")

    def __init__(self, flight: Flight, listener: Listener) -> None:
        self._flight = flight
        self.listener: Listener | None = listener

    def stop(self) -> None:
        """Hear no more; does nothing after the end."""
        if self.listener is not None:
            self.listener = None
            self._flight.leave(self)


def _given(end: Finished | Exception) -> Finished | Exception:
    if isinstance(end, Finished) and not end.cached:
        return msgspec.structs.replace(end, cached=True, queue=0.0, attempts=())
    return end
