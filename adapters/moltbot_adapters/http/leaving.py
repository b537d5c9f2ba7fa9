"""Requests that are being handled when the process leaves: they may end by themselves for a while."""

import asyncio
import contextlib
from collections.abc import Iterator


class Handling:
    """A request that is being handled, by the task that makes this."""

    def __init__(self) -> None:
        self._task = asyncio.current_task()
        self.out_of_time = False
        """True when the process leaves and could wait no longer for it."""

    def cut(self) -> None:
        """End it."""
        self.out_of_time = True
        if self._task is not None:
            self._task.cancel()


class Leaving:
    """Knows all requests that are being handled, and ends those that take too long when the process leaves."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._handled: set[Handling] = set()
        self._empty = asyncio.Event()
        self._empty.set()
        self._leaving: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def handling(self) -> Iterator[Handling]:
        """Counts a request among those that are being handled until the block ends."""
        handled = Handling()
        self._handled.add(handled)
        self._empty.clear()
        try:
            yield handled
        finally:
            self._handled.discard(handled)
            if not self._handled:
                self._empty.set()

    def begin(self) -> None:
        """Lets requests end by themselves for the grace; those that are left then are ended."""
        self._leaving = asyncio.create_task(self._leave())

    @property
    def begun(self) -> bool:
        """True when the process leaves."""
        return self._leaving is not None

    async def ended(self) -> None:
        """Waits until nothing is to be waited for any more, if leaving was begun."""
        if self._leaving is not None:
            await self._leaving

    async def _leave(self) -> None:
        try:
            async with asyncio.timeout(self._grace_s):
                await self._empty.wait()
        except TimeoutError:
            for handled in tuple(self._handled):
                handled.cut()
