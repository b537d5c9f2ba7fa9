"""One timer for all that waits a moment, on loops of any kind."""

from __future__ import annotations

import asyncio
from typing import Any

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
