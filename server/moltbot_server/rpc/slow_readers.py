"""Streams whose reader takes nothing any more: they are ended, so that nothing is held for who may never come back."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from moltbot_server.errors import SlowConsumer

LONGEST = 60.0
"""Seconds without a message taken, after which a stream that has one to give ends."""
LOOKS = 6
"""How often they are looked at within that time."""


class Reader:
    """A stream with a reader, in a block of its own.

    Whoever writes adds one to `steps` before each message and one after it: to do so here would be a coroutine more for
    each. A write waits until there is room for its message.
    """

    __slots__ = ("_looks", "_readers", "_seen", "_stalled", "_task", "steps")

    def __init__(self, readers: SlowReaders) -> None:
        self._readers = readers
        self._task = asyncio.current_task()
        self._seen = self._looks = self.steps = 0
        self._stalled = False

    def look(self) -> None:
        """Let the stream end if the same message has waited for as many looks as there are."""
        waits = self.steps % 2 == 1 and self.steps == self._seen
        self._looks = self._looks + 1 if waits else 0
        self._seen = self.steps
        if self._looks >= LOOKS and self._task is not None:
            self._stalled = True
            self._task.cancel()

    def __enter__(self) -> Self:
        self._readers.begin(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._readers.end(self)
        if self._stalled and kind is asyncio.CancelledError and self._task is not None:
            self._task.uncancel()
            text = f"nothing was taken from the stream for {LONGEST:g} s"
            raise SlowConsumer(f"{text}: resume the turn after the event that you saw last") from None


class SlowReaders:
    """All readers of a server; they are looked at together, as long as there are any."""

    def __init__(self) -> None:
        self._readers = set[Reader]()
        self._looking: asyncio.TimerHandle | None = None

    def begin(self, reader: Reader) -> None:
        """Look at a reader from now on."""
        self._readers.add(reader)
        if self._looking is None:
            self._look_later()

    def end(self, reader: Reader) -> None:
        """Look at a reader no more."""
        self._readers.discard(reader)

    def new(self) -> Reader:
        """Return the reader of a stream of this task."""
        return Reader(self)

    def _look_later(self) -> None:
        self._looking = asyncio.get_running_loop().call_later(LONGEST / LOOKS, self._look)

    def _look(self) -> None:
        self._looking = None
        for reader in list(self._readers):
            reader.look()
        if self._readers:
            self._look_later()
