"""The processes that write: `python -m moltbot_server.models.replica.program DESCRIPTOR`.

First there is a nursery. It has imported what a replica needs, runs no thread, and forks a replica whenever it is asked
through its socket, which takes a few milliseconds and shares all memory that is not written to. A replica loads a
model, and writes one batch after the other for the engine that holds the other end of its own socket. In it nobody
else wants the interpreter's lock, so that being called by native code for each token costs next to nothing.

All of them end when the other end of their socket does, however that ended.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import gc
import marshal
import mmap
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, NoReturn

import ctranslate2

from moltbot_server.models.replica import wire

_SET_NAME = 15  # PR_SET_NAME of prctl
_hold = ctypes.pythonapi.PyGILState_Ensure


def nursery(control: socket.socket) -> None:
    """Fork and end processes as the other end asks, until it is closed."""
    _call_myself(b"moltbot-nursery")
    # The terminal and service managers signal whole groups; those who write end with their engine and not before it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    gc.collect()
    gc.freeze()  # the collector's marks would copy shared pages
    while True:
        asked, descriptors, _, _ = socket.recv_fds(control, wire.ASK.size, 2)
        if len(asked) < wire.ASK.size:
            return
        what, pid = wire.ASK.unpack(asked)
        try:
            answer = _fork(control, descriptors) if what == wire.FORK else _end(pid)
        except OSError as problem:
            answer = wire.REFUSED - (problem.errno or 0)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        control.sendall(wire.ANSWER.pack(answer))


def _fork(control: socket.socket, descriptors: Sequence[int]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        control.close()
        _call_myself(b"moltbot-replica")
        link, memory = descriptors
        cells = memoryview(mmap.mmap(memory, wire.CELLS * wire.CELL_BYTES)).cast(wire.CELL)
        Replica(socket.socket(fileno=link), cells).run()
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


def _end(pid: int) -> int:
    """Kill a process, unless it is dead, and return the status with which it ended."""
    os.kill(pid, signal.SIGKILL)  # a dead one keeps its number until it is waited for
    return os.waitpid(pid, 0)[1]


class Replica:
    """One model in this process, and who has its answers written here."""

    def __init__(self, link: socket.socket, cells: memoryview[int]) -> None:
        """`cells` tell which rows are to end, see `wire.CELLS`."""
        self._link = link
        self._asked = link.makefile("rb")
        self._cells = cells
        self._ends: frozenset[int] = frozenset()
        self._steps = _Steps(self._tell, 0.0)
        self._generator: Any = None

    def run(self) -> None:
        """Load the model and write batches until nobody asks any more."""
        path, threads, kind, ends, gather, trial = self._read()
        self._ends = frozenset(ends)
        self._steps = _Steps(self._tell, gather)
        try:
            self._generator = ctranslate2.Generator(
                path, device="cpu", inter_threads=1, intra_threads=threads, compute_type=kind, max_queued_batches=-1
            )
            # The first batch takes longer than others: nobody shall wait for that.
            self._generator.generate_batch([trial], max_length=2, end_token=ends)
        except (RuntimeError, ValueError, MemoryError) as problem:
            self._tell(wire.FAILED, str(problem).encode())
            return
        self._tell(wire.LOADED)
        while True:
            self._write(*self._read())

    def _write(
        self,
        number: int,
        prompts: list[list[str]],
        limits: list[int],
        lead: list[str] | None,
        sampling: tuple[int, float, float, float],
    ) -> None:
        topk, topp, temperature, penalty = sampling
        listener = self._steps.listener(number, limits, self._cells, self._ends)
        trouble, began = "", perf_counter()
        try:
            self._generator.generate_batch(
                prompts,
                max_length=max(limits),
                end_token=list(self._ends),
                include_prompt_in_result=False,
                static_prompt=lead,
                cache_static_prompt=True,
                sampling_topk=topk,
                sampling_topp=topp,
                sampling_temperature=temperature,
                repetition_penalty=penalty,
                callback=listener,
            )
        except Exception as problem:
            trouble = f"{type(problem).__name__}: {problem}"
        self._steps.flush()
        if trouble:
            self._tell(wire.FAILED, trouble.encode())
        else:
            self._tell(wire.DONE, wire.BEGAN.pack(began), perf_counter())

    def _read(self) -> Any:
        (size,) = wire.SIZE.unpack(self._exactly(wire.SIZE.size))
        return marshal.loads(self._exactly(size))

    def _exactly(self, size: int) -> bytes:
        read = b""
        with contextlib.suppress(ConnectionError):
            read = self._asked.read(size)
        if len(read) < size:
            _leave()
        return read

    def _tell(self, what: int, content: bytes = b"", at: float = 0.0) -> None:
        try:
            self._link.sendall(wire.FRAME.pack(what, len(content), at) + content)
        except OSError:
            _leave()


class _Steps:
    """Gathers what is written, and tells the engine: first tokens and ends with their step, others later."""

    def __init__(self, tell: Callable[[int, bytes, float], None], gather: float) -> None:
        self._tell = tell
        self._gather = gather
        self._tokens: list[int] = []
        self._at = self._told = 0.0

    def flush(self) -> None:
        """Tell what was gathered."""
        self._told = self._at
        if self._tokens:
            self._tell(wire.TOKENS, array.array("i", self._tokens).tobytes(), self._at)
            self._tokens.clear()

    def listener(
        self, number: int, limits: Sequence[int], cells: memoryview[int], ends: frozenset[int]
    ) -> Callable[[ctranslate2.GenerationStepResult], bool]:
        """Return what native code calls once per row and step of a batch, in the order of the rows.

        It is a closure because it is called for each token: as a method it took 1 us more of 8.
        """
        left = list(limits)
        alive = set(range(len(limits)))
        last, before, due = len(limits) - 1, len(limits), False
        take = self._tokens.append

        def wrote(step: ctranslate2.GenerationStepResult) -> bool:
            nonlocal last, before, due
            index = step.batch_id
            if index <= before:  # the first row of a step
                self._began_step()
            before = index
            over: bool = cells[index] == number
            if not over:
                token = step.token_id
                take(index)
                take(token)
                rest = left[index]
                left[index] = rest - 1
                if rest == 1 or token in ends:
                    over = due = True
                elif rest == limits[index]:
                    due = True
            if index >= last and (due or self._at - self._told >= self._gather):
                due = False
                self.flush()
            if over:
                alive.discard(index)
                last = max(alive, default=-1)
            return over

        return wrote

    def _began_step(self) -> None:
        if not self._at:
            _hold()  # for good: native code calls from one thread of its own, see `threads.ThreadReplica`
        self._at = perf_counter()


def _leave() -> NoReturn:
    """End this process, also from a thread of native code."""
    os._exit(0)


def _call_myself(name: bytes) -> None:
    """Say in lists of processes what this one is, where the system lets it."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_SET_NAME, name, 0, 0, 0)


if __name__ == "__main__":
    nursery(socket.socket(fileno=int(sys.argv[1])))
