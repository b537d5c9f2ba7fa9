"""A world in virtual time: one seed decides what happens when, so that every run can be had again.

Each process of the world has an event loop of its own, which keeps asyncio's promises (first come, first served) and
nothing more: what comes from elsewhere, from disks, networks and clients, comes when the world says so. Between any two
steps of a process it can be killed or stopped.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from collections import deque
from collections.abc import Callable
from typing import Any

EPOCH = 1_600_000_000.0
"""The Unix time at which the world begins."""
_NEVER = float("inf")
_SLOW = 0.05
"""Seconds for which a process that has something to do may be kept from it, as on a machine with too much to do."""


class World:
    """Virtual time, chance, and what is to happen."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.steps = 0
        self.loops: list[SimulatedLoop] = []
        self.failures: list[str] = []
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def after(self, delay: float, happen: Callable[[], None]) -> None:
        """Have something happen after so many seconds."""
        self.at(self.now + delay, happen)

    def at(self, moment: float, happen: Callable[[], None]) -> None:
        """Have something happen at a moment; of several at one moment the first that was asked for comes first."""
        self._count += 1
        heapq.heappush(self._agenda, (moment, self._count, happen))

    def soon(self, longest: float, happen: Callable[[], None]) -> None:
        """Have something happen within so many seconds: often nearly at once, sometimes late."""
        chance = self.random.random()
        self.after(longest * chance * chance * chance, happen)

    def run(self, most_steps: int = 100_000) -> None:
        """Let happen what is to happen, to the end.

        Raises:
            RuntimeError: there is no end.
        """
        chance = self.random.random
        agenda, loops = self._agenda, self.loops
        while True:
            self.steps += 1
            if self.steps > most_steps:
                raise RuntimeError("the world does not come to rest")
            moment = agenda[0][0] if agenda else _NEVER
            ready = [loop for loop in loops if loop._ready and not loop.stopped]
            if ready and (moment > self.now + _SLOW or chance() > 0.15):
                loop = ready[0] if len(ready) == 1 else ready[int(chance() * len(ready))]
                loop.step()
                continue
            timers = min([loop.next_timer for loop in loops], default=_NEVER)
            if timers < moment:
                self.now = max(self.now, timers)
                for loop in loops:
                    loop.ring()
            elif agenda:
                self.now, _, happen = heapq.heappop(agenda)
                happen()
            else:
                return


class Clock:
    """Stands in for the module `time` where code of the core asks it."""

    def __init__(self) -> None:
        self.world: World | None = None

    def monotonic(self) -> float:
        """Return the virtual seconds since the world began."""
        assert self.world is not None
        return self.world.now

    perf_counter = monotonic

    def time(self) -> float:
        """Return the virtual Unix time."""
        return EPOCH + self.monotonic()


class SimulatedLoop(asyncio.AbstractEventLoop):
    """The event loop of one process: as much of it as the core uses."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.alive = True
        self.stopped = False
        self.kill_at = -1
        self.on_kill: Callable[[], None] = lambda: None
        self.taken = 0
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._count = 0
        self._tasks: list[asyncio.Task[Any]] = []
        world.loops.append(self)

    # --- what the world does with it ------------------------------------------------------------------------------

    @property
    def next_timer(self) -> float:
        """When the next timer is due."""
        timers = self._timers
        while timers and timers[0][2].cancelled():
            heapq.heappop(timers)
        return timers[0][0] if timers and not self.stopped else _NEVER

    def ring(self) -> None:
        """Make the callbacks of timers that are due ready."""
        while self.next_timer <= self.world.now:
            self._ready.append(heapq.heappop(self._timers)[2])

    def step(self) -> None:
        """Run one callback; or be killed before it."""
        if self.taken == self.kill_at:
            self.on_kill()
            return
        self.taken += 1
        handle = self._ready.popleft()
        if not handle.cancelled():
            self.within(handle._run)

    def within(self, call: Callable[[], Any]) -> Any:
        """Call something as if from a callback of this loop."""
        outer = asyncio._get_running_loop()
        asyncio._set_running_loop(self)
        try:
            return call()
        finally:
            asyncio._set_running_loop(outer)

    def die(self) -> None:
        """Do nothing any more."""
        self.alive = False
        if self in self.world.loops:
            self.world.loops.remove(self)
        self._ready.clear()
        self._timers.clear()

    def bury(self) -> None:
        """Close what was under way when the process died, so that nothing of it speaks up later."""
        self.alive = False
        for task in self._tasks:
            if not task.done():
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                coroutine: Any = task.get_coro()
                try:
                    self.within(coroutine.close)
                except RuntimeError:
                    continue  # it waits for something in its `finally`, as a process that is gone cannot
        self._tasks.clear()
        self.die()

    # --- what asyncio wants of it ---------------------------------------------------------------------------------

    def time(self) -> float:
        """Return the virtual time."""
        return self.world.now

    def get_debug(self) -> bool:
        """Return False."""
        return False

    def is_running(self) -> bool:
        """Tell whether the process lives."""
        return self.alive

    def is_closed(self) -> bool:
        """Return False: a dead process is asked nothing."""
        return False

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:
        """Run a callback when those before it have run."""
        handle = asyncio.Handle(callback, args, self, context)
        if self.alive:
            self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
        """Run a callback at a time."""
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._count += 1
        if self.alive:
            heapq.heappush(self._timers, (when, self._count, handle))
        return handle

    def call_later(self, delay: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
        """Run a callback after some seconds."""
        return self.call_at(self.world.now + delay, callback, *args, context=context)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Do nothing: `next_timer` drops it."""

    def create_future(self) -> asyncio.Future[Any]:
        """Return a future."""
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: str | None = None, context: Any = None) -> asyncio.Task[Any]:
        """Run a coroutine."""
        task = asyncio.Task(coro, loop=self, name=name, context=context)
        self._tasks.append(task)
        return task

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """Call something as a thread would, some time later."""
        future = self.create_future()

        def work() -> None:
            if not self.alive:
                return
            try:
                result = func(*args)
            except Exception as error:
                self.call_soon(_settle, future, None, error)
            else:
                self.call_soon(_settle, future, result, None)

        self.world.soon(0.05, work)
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Take note of what nobody caught: in a process that lives, it is a fault of the core."""
        if self.alive:
            self.world.failures.append(f"{context.get('message')}: {context.get('exception')!r}")


def _settle(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
