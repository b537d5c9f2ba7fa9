"""A thread that works for the event loop: what comes while it is at work is handed over together when it is done."""

from __future__ import annotations

import asyncio
import math
import sqlite3
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from moltbot_server.errors import StorageUnavailable
from moltbot_server.store.pending import Pending

J = TypeVar("J", bound=Pending[Any])

_LARGEST_GROUP = 512
_NEVER = math.inf
_FEW = 2
"""Rows of one turn: a group of so few is followed by the next at once."""


class GroupThread(ABC, Generic[J]):
    """Carries jobs out on a thread of its own, with a connection of its own, and answers a group of them together.

    A thread that is woken for each job takes the interpreter's lock from the loop each time.
    """

    def __init__(self, connection: sqlite3.Connection, *, name: str, distance: float = 0.0) -> None:
        """Take a connection over; it is closed with the thread. `distance`: seconds between groups while many wait."""
        self._connection = connection
        self._distance = distance
        self._groups: SimpleQueue[list[J] | None] = SimpleQueue()
        self._waiting: list[J] = []
        self._at_work = self._many = False
        self._handed_over = 0.0
        self._until = _NEVER
        self._handing_over: asyncio.Handle | None = None
        self._hands_over_at = _NEVER
        self._idle: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._thread.start()

    @abstractmethod
    def carry_out(self, connection: sqlite3.Connection, group: list[J]) -> Sequence[tuple[J, Any]]:
        """Return each job of a group with its outcome; runs on the thread and never raises."""

    def put(self, job: J, *, patience: float = 0.0) -> J:
        """Queue a job; when the thread is closed, it is answered that the store is.

        It may wait for so many seconds until something comes that it can go with.
        """
        if self._closed:
            job.settle(StorageUnavailable("the store is closed"))
        else:
            self._waiting.append(job)
            self._until = min(self._until, self._loop.time() + patience)
            self._hand_over_soon()
        return job

    def hurry(self) -> None:
        """Let nothing that is queued wait for company any longer."""
        if self._waiting:
            self._until = 0.0
            self._hand_over_soon()

    async def close(self) -> None:
        """Carry out what waits, then end the thread."""
        if not self._closed:
            self._closed = True
            if self._waiting or self._at_work:
                self._idle = asyncio.Event()
                await self._idle.wait()
            self._groups.put(None)
            await asyncio.to_thread(self._thread.join)

    def _hand_over_soon(self) -> None:
        """Hand over what waits once the loop has gone through what it has at hand, which may bring more.

        While many come, groups keep a distance: each one makes the thread and the loop wait for each other.
        """
        if not self._waiting or self._at_work:
            return
        at = max(self._until, self._handed_over + self._distance if self._many else 0.0)
        if self._handing_over is not None:
            if at >= self._hands_over_at:
                return
            self._handing_over.cancel()
        self._hands_over_at = at
        if at > self._loop.time():
            self._handing_over = self._loop.call_at(at, self._hand_over)
        else:
            self._handing_over = self._loop.call_soon(self._hand_over)

    def _hand_over(self) -> None:
        self._handing_over, self._at_work = None, True
        self._handed_over = self._loop.time()
        self._many = len(self._waiting) > _FEW
        self._groups.put(self._waiting[:_LARGEST_GROUP])
        del self._waiting[:_LARGEST_GROUP]
        self._until = 0.0 if self._waiting else _NEVER

    def _answer(self, outcomes: Sequence[tuple[J, Any]]) -> None:
        """Answer a group's jobs and hand the next group over; runs on the loop's thread."""
        self._at_work = False
        for job, outcome in outcomes:
            job.settle(outcome)
        self._hand_over_soon()
        if self._idle is not None and not self._waiting:
            self._idle.set()

    def _run(self) -> None:
        try:
            while (group := self._groups.get()) is not None:
                self._loop.call_soon_threadsafe(self._answer, self.carry_out(self._connection, group))
        finally:
            self._connection.close()
