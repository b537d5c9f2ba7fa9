"""A write under way, and whoever waits for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Generator
from typing import Any, Generic, TypeVar

from moltbot_server.errors import MoltBotError

log = logging.getLogger(__name__)

T = TypeVar("T")


class Pending(Generic[T]):
    """A write that a store has not answered yet; belongs to the event loop's thread.

    It can be awaited, or one listener hears the outcome: at once, beside all others of its group, where futures would
    send each of them around the loop twice.
    """

    __slots__ = ("_hear", "_outcome")

    def __init__(self) -> None:
        self._outcome: Any = _UNKNOWN
        self._hear: Callable[[T | MoltBotError], None] | None = None

    def then(self, hear: Callable[[T | MoltBotError], None]) -> None:
        """Have the outcome told when it is known, never before this returns."""
        if self._outcome is _UNKNOWN:
            self._hear = hear
        else:
            asyncio.get_running_loop().call_soon(hear, self._outcome)

    def settle(self, outcome: T | MoltBotError) -> None:
        """Tell the outcome; a store does this once. A listener that raises hurts no other."""
        self._outcome = outcome
        # Forgotten first: whoever still holds this holds no turn that has ended.
        hear, self._hear = self._hear, None
        if hear is not None:
            try:
                hear(outcome)
            except Exception:
                log.exception("the outcome of a write could not be told")

    def __await__(self) -> Generator[Any, None, T]:
        """Wait for the outcome.

        Raises:
            MoltBotError: the store could not do it.
        """
        waiter: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def hear(outcome: T | MoltBotError) -> None:
            if waiter.done():
                return
            if isinstance(outcome, MoltBotError):
                waiter.set_exception(outcome)
            else:
                waiter.set_result(outcome)

        self.then(hear)
        return (yield from waiter)


_UNKNOWN = object()
