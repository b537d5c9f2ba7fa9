"""One timer for all that waits a moment, on loops of any kind."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from moltbot_server.ticker import Ticker, timer_at


class HurriedLoop(asyncio.SelectorEventLoop):
    """A loop that answers a timer without a time of its own where no millisecond is left, as uvloop's does.

    Its clock jumps ahead between the first looks at it, as it does for a process that others keep from running.
    """

    jumps = 0
    asked = 0.0

    def time(self) -> float:
        """Return the time; later by a moment than the system's for each jump."""
        if self.jumps:
            self.jumps -= 1
            self.asked += 0.002
        return super().time() + self.asked

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> Any:
        """Call back at a time, or at once."""
        if when - self.time() < 0.0005:
            return self.call_soon(callback, *args, context=context)
        return super().call_at(when, callback, *args, context=context)


def test_a_timer_knows_when_it_is_due_on_a_machine_with_too_much_to_do() -> None:
    called: list[str] = []

    async def wait() -> None:
        loop.jumps = 6
        timer = timer_at(loop.time(), lambda: called.append("once"))
        assert timer.when() > 0
        await asyncio.sleep(0.05)

    loop = HurriedLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(wait())

    assert called == ["once"]


def test_what_waits_is_called_in_time_though_the_clock_jumps() -> None:
    called: list[str] = []

    async def wait() -> None:
        ticker = Ticker()
        loop.jumps = 4
        ticker.call_within(0.001, lambda: called.append("first"))
        ticker.call_within(0.02, lambda: called.append("second"))
        await asyncio.sleep(0.1)

    loop = HurriedLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(wait())

    assert called == ["first", "second"]


async def test_a_callback_that_fails_or_forgets_another_stops_neither_the_rest_nor_the_ticking(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ticker, called, over = Ticker(), [], asyncio.Event()

    def fails() -> None:
        called.append("fails")
        raise RuntimeError

    def forgets() -> None:
        called.append("forgets")
        ticker.forget(forgotten)
        ticker.call_within(0, later)

    def forgotten() -> None:
        called.append("forgotten")

    def goes_on() -> None:
        called.append("goes on")

    def later() -> None:
        called.append("later")
        over.set()

    for callback in (fails, forgets, forgotten, goes_on):
        ticker.call_within(0, callback)
    await asyncio.wait_for(over.wait(), 5)

    assert called == ["fails", "forgets", "goes on", "later"]
    assert [(record.message, record.exc_info is not None) for record in caplog.records] == [
        ("a callback of the ticker failed", True)
    ]
