"""Keeps the processes of `moltbot start` alive, and takes them down in order.

One thread, woken by events, and now and then to see whether cores and adapters still answer.
"""

from __future__ import annotations

import json
import logging
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import IO, Any

from moltbot_server.cli import pulse
from moltbot_server.cli.children import Child, status_in_words
from moltbot_server.cli.plans import ENGINE_STAGE
from moltbot_server.cli.terminal import Exit
from moltbot_server.cli.watcher import EVERY, Watcher

log = logging.getLogger("moltbot_server.start")

_LOOK = 0.02  # how often an adapter is asked whether it serves, until all do
_LONGEST_START = 60.0
_AFTER_GRACE = 5.0
_RELOAD_GRACE = 2.0
_KILLED_AT_START = 3  # times that a process may be ended by a signal before it has served


class Supervisor:
    """Runs children until it is asked to stop. `run` returns the exit status.

    `serving` is asked, when all that tell it have told that they serve, whether callers are served; `on_ready` is
    called once when everything serves, with what the first process has told, `on_change` whenever a process was
    replaced after that, and `on_stop` once when all of it begins to leave. `reap` is called when some process of ours
    may have ended, for those that are no children of the supervisor. With a `watcher`, `renew` is asked at each
    change whether everything shall be started again by plans that it may have replaced. On SIGUSR1 it is asked as well;
    then cores and adapters are started again one after the other, each when the one before serves, so that callers
    notice nothing where there are several.
    """

    def __init__(
        self,
        children: Sequence[Child],
        *,
        grace: float,
        serving: Callable[[], bool],
        on_ready: Callable[[Mapping[str, Any]], None],
        on_change: Callable[[], None],
        on_stop: Callable[[], None],
        renew: Callable[[], bool],
        reap: Callable[[], None],
        watcher: Watcher | None = None,
    ) -> None:
        self._children = children
        self._grace = grace
        self._serving = serving
        self._on_ready = on_ready
        self._on_change = on_change
        self._on_stop = on_stop
        self._renew = renew
        self._reap = reap
        self._watcher = watcher
        self._selector = selectors.DefaultSelector()
        self._pulse = pulse.Pulse(self._selector)
        self._look_at = 0.0  # when cores and adapters are asked next how they are
        self._said: dict[str, Mapping[str, Any]] = {}  # by the names of those that told that they serve
        self._problems: dict[str, str] = {}  # by name: why a process could not start, until it can
        self._ready = False
        self._asked = 0  # how often somebody asked us to stop
        self._wanted_anew = False
        self._turn: list[Child] = []  # which are to be started again, one after the other
        self._leaves_by = 0.0  # until when the first of them has to have left; 0 before it was told to
        self._told_anew = True  # whether it was said that all of them have been started again
        self._stage: int | None = None  # which children are being stopped
        self._grace_ends = 0.0  # when they need not be waited for any more, if they stand still
        self._deadline = 0.0
        self._status = int(Exit.OK)
        self._killed = Counter[str]()

    def run(self) -> int:
        """Start the children and stay until they are gone; return the exit status."""
        with self._signals():
            self._deadline = time.monotonic() + _LONGEST_START
            for child in self._children:
                self._start(child)
            while self._stage is None or any(child.process for child in self._children):
                self._wait()
                self._bury()
                if self._asked >= 2:
                    self._leave_at_once()
                elif self._stage is not None:
                    self._stop_next()
                elif self._asked:
                    self._begin_to_stop()
                else:
                    self._serve()
        return self._status

    # --- waiting ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _signals(self) -> Iterator[None]:
        reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)
        self._selector.register(reader, selectors.EVENT_READ, lambda: reader.recv(4096))
        asking = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup asks to outlive the terminal
            asking.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._ask) for number in asking}
        before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._want_anew)
        before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
        wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            for child in self._children:
                child.send(signal.SIGKILL)  # only after a fault of ours is there anything left
            self._pulse.close()
            self._selector.close()
            reader.close()
            writer.close()

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self._asked += 1
        if self._asked >= 2:
            # At once means now: whatever this thread waits for is one of those, and ends with them.
            for child in self._children:
                child.send(signal.SIGKILL)

    def _want_anew(self, _number: int, _frame: FrameType | None) -> None:
        self._wanted_anew = True

    def _wait(self) -> None:
        now = time.monotonic()
        times = [child.due for child in self._children if child.due is not None and self._stage is None]
        if not self._ready and self._stage is None:
            times.append(now + _LOOK if self._all_said else self._deadline)
        if self._stage is not None:
            times.append(self._deadline)
            if now < self._grace_ends:
                times.append(self._grace_ends)
        if self._stage is not None or self._ready:
            times.append(self._look_at)
        if self._watcher:
            times.append(now + EVERY)
        if self._turn:
            times.append(now + _LOOK if self._leaves_by == 0.0 else self._leaves_by)
        elif not self._told_anew:
            times.append(now + _LOOK)
        # Without a time there is nothing to do before an event; the wait is cut all the same, as a net.
        for key, _ in self._selector.select(max(0.0, min(times, default=now + 60) - now)):
            key.data()

    def _bury(self) -> None:
        self._reap()
        now = time.monotonic()
        for child in self._children:
            pid = child.pid
            stdout = child.process.stdout if child.process else None
            if child.process is None or child.process.poll() is None:
                continue
            if stdout and stdout in self._selector.get_map():
                self._read(child, stdout)
                if stdout in self._selector.get_map():
                    self._selector.unregister(stdout)
            status = child.ended(now)
            if status is not None and self._stage is None and not self._asked:
                self._mourn(child, pid, status, now)

    def _mourn(self, child: Child, pid: int, status: int, now: float) -> None:
        fields = {"child": child.plan.name, "child_pid": pid, "how": status_in_words(status)}
        if self._watcher and not self._ready:
            child.due = None
            log.error("a process ended; waiting for a changed file", extra=fields)
        elif self._turn and child is self._turn[0] and self._leaves_by:
            del self._turn[0]
            self._leaves_by, child.due, child.pause = 0.0, now, 0.0
        elif not self._ready and not self._was_killed(child, status):
            # A child that never served will not serve the next time either; its own message says why.
            log.error("a process could not start, so everything stops", extra=fields)
            self._status = status if status > 0 else int(Exit.FAILED)
            self._begin_to_stop()
        else:
            assert child.due is not None
            fields["in_seconds"] = round(child.due - now, 1)
            if status in (Exit.CONFIG, Exit.UNAVAILABLE):
                # Its own message says why. What it needs may come back, and the others may serve meanwhile.
                log.error("a process cannot start as things are; it is tried again", extra=fields)
            else:
                log.warning("a process ended and is started again", extra=fields)

    def _was_killed(self, child: Child, status: int) -> bool:
        """Return whether a signal ended a process that was starting, and not so often that it looks like a bug."""
        self._killed[child.plan.name] += status < 0
        return status < 0 and self._killed[child.plan.name] <= _KILLED_AT_START

    # --- serving ---------------------------------------------------------------------------------------------------

    @property
    def _all_said(self) -> bool:
        return all(child.plan.name in self._said for child in self._children if child.plan.tells)

    @property
    def _all_serve(self) -> bool:
        return self._all_said and all(child.process for child in self._children) and self._serving()

    def _start(self, child: Child) -> None:
        self._said.pop(child.plan.name, None)
        child.start(time.monotonic())
        assert child.process is not None
        if (stdout := child.process.stdout) is not None:
            self._selector.register(stdout, selectors.EVENT_READ, lambda: self._read(child, stdout))

    def _read(self, child: Child, stdout: IO[bytes]) -> None:
        line = stdout.readline()
        if not line:
            self._selector.unregister(stdout)
            return
        try:
            said = json.loads(line)
        except ValueError:
            said = None
        if isinstance(said, dict) and said.get("ready"):
            self._problems.pop(child.plan.name, None)
            self._said[child.plan.name] = said
        elif isinstance(said, dict) and "problem" in said:
            self._tell_once(child, str(said["problem"]))
        else:
            print(line.decode("utf-8", "replace"), end="", file=sys.stderr, flush=True)

    def _tell_once(self, child: Child, problem: str) -> None:
        """Say why a process cannot start; several workers, and the next attempts, have the same to say."""
        known = problem in self._problems.values()
        self._problems[child.plan.name] = problem
        if not known:
            print(f"moltbot: {problem}", file=sys.stderr, flush=True)

    def _serve(self) -> None:
        now = time.monotonic()
        for child in self._children:
            if child.due is not None and child.due <= now:
                self._start(child)
                log.info("a process was started again", extra={"child": child.plan.name, "child_pid": child.pid})
                if self._ready:
                    self._on_change()
        if not self._ready:
            if self._all_said and self._serving():
                self._ready = True
                told = (self._said[child.plan.name] for child in self._children if child.plan.tells)
                self._on_ready(next(told))
            elif now >= self._deadline and not self._watcher:
                log.error("MoltBot did not become ready in time", extra={"seconds": _LONGEST_START})
                self._status = int(Exit.FAILED)
                self._begin_to_stop()
        if self._ready:
            self._look(now)
        if self._wanted_anew and self._ready:
            self._wanted_anew = False
            if not self._turn and self._renew():
                log.info("cores and adapters are started again, one after the other")
                self._turn = [child for child in self._children if child.plan.stage < ENGINE_STAGE]
                self._told_anew = False
        if self._turn:
            self._go_round(now)
        elif not self._told_anew and self._all_serve:
            self._told_anew = True
            log.info("cores and adapters have been started again")
        if self._watcher and (changed := self._watcher.changed()):
            log.info("a file has changed", extra={"file": changed[0].name})
            if self._renew():
                self._start_all_again()

    def _look(self, now: float) -> None:
        """Kill what stands still: others have the turns of a core, and the callers of an adapter, when it is gone."""
        if now < self._look_at:
            return
        self._look_at = now + pulse.EVERY
        running = {child.plan.name: child for child in self._children if child.process}
        places = {name: said.get("metrics") or said.get("pulse") for name, said in self._said.items()}
        told = {name: str(place) for name, place in places.items() if place}
        asked = {name: address for name, address in told.items() if name in running}
        stops = self._stage is not None
        patience = {name: pulse.PATIENCE if stops else running[name].plan.patience for name in asked}
        for name in self._pulse.look(asked, patience):
            fields = {"child": name, "child_pid": running[name].pid, "seconds": pulse.EVERY * patience[name]}
            log.warning("a process does not answer and is killed", extra=fields)
            running[name].send(signal.SIGKILL)

    def _go_round(self, now: float) -> None:
        """Tell the next process to leave when all others serve; kill it when it does not."""
        child = self._turn[0]
        if self._leaves_by:
            if now >= self._leaves_by:
                log.warning("a process did not leave in time and is killed", extra={"child": child.plan.name})
                child.send(signal.SIGKILL)
                self._leaves_by = now + _LONGEST_START
        elif child.process is None:
            del self._turn[0]  # it has died by itself, and is started again anyway
        elif self._all_serve:
            self._leaves_by = now + self._grace + _AFTER_GRACE
            child.send(signal.SIGTERM)

    def _start_all_again(self) -> None:
        for child in self._children:
            child.send(signal.SIGTERM)
        for child in self._children:
            if child.process is not None:
                try:
                    child.process.wait(_RELOAD_GRACE)
                except subprocess.TimeoutExpired:
                    child.send(signal.SIGKILL)
        self._bury_quietly()
        if self._asked:
            return
        for child in self._children:
            child.pause = 0.0
            self._start(child)
        if self._ready:
            self._on_change()

    def _bury_quietly(self) -> None:
        for child in self._children:
            if child.process is not None:
                stdout = child.process.stdout
                if stdout and stdout in self._selector.get_map():
                    self._selector.unregister(stdout)
                child.process.wait()
                child.ended(time.monotonic())

    # --- stopping --------------------------------------------------------------------------------------------------

    def _begin_to_stop(self) -> None:
        running = [child for child in self._children if child.process]
        if self._asked and running:
            text = f"Stopping: answers under way may end first, {self._grace:g} s at most. Ctrl-C again leaves at once."
            print(f"\n{text}", file=sys.stderr, flush=True)
        self._stage = -1
        if self._ready:
            self._on_stop()
        self._stop_next()

    def _stop_next(self) -> None:
        """Stop the children of the next stage when those of the last one are gone; kill those over their time.

        One that answers has a moment more than the grace, to put away what it has.
        """
        now = time.monotonic()
        self._look(now)
        running = [child for child in self._children if child.process]
        current = [child for child in running if child.plan.stage == self._stage]
        if current and now >= self._deadline:
            self._kill_late(current)
            self._deadline = now + 60
        elif current and now >= self._grace_ends:
            still = self._pulse.silent([child.plan.name for child in current], pulse.OVERDUE)
            self._kill_late([child for child in current if child.plan.name in still])
        elif not current and running:
            self._stage = min(child.plan.stage for child in running)
            self._grace_ends = now + self._grace
            self._deadline = self._grace_ends + _AFTER_GRACE
            for child in running:
                if child.plan.stage == self._stage:
                    child.send(signal.SIGTERM)

    def _kill_late(self, late: Sequence[Child]) -> None:
        for child in late:
            log.warning("a process did not leave in time and is killed", extra={"child": child.plan.name})
            child.send(signal.SIGKILL)

    def _leave_at_once(self) -> None:
        if self._status == Exit.OK:
            print("\nLeft at once: answers under way were cut.", file=sys.stderr, flush=True)
        self._status = int(Exit.INTERRUPTED)
        self._stage = self._stage if self._stage is not None else -1
        for child in self._children:
            child.send(signal.SIGKILL)
        self._bury_quietly()
