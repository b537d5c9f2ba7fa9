"""Replicas in processes of their own, for small models: each has the weights, and nobody to share a lock with.

Measured on 4 processors with the built-in model, see decision 12: a token takes 75 us to write, and in one process with
the event loop its thread waits nearly as long for the interpreter's lock.
"""

from __future__ import annotations

import array
import contextlib
import marshal
import mmap
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from moltbot_server.errors import ModelUnavailable
from moltbot_server.models.engines.local.batch_writing import GATHER, BatchWriting
from moltbot_server.models.engines.local.batches import Batch
from moltbot_server.models.engines.local.standstill import LOOK, Standstill
from moltbot_server.models.folder import ModelFolder
from moltbot_server.models.replica import wire
from moltbot_server.models.replica.nursery import Nursery
from moltbot_server.models.tuning import Tuning

_NUMBERS = 1 << 32
_READ = 1 << 16
_LONGEST_SEND = 10.0  # seconds; it is sent to when it waits for that, so that only one that stands still takes so long


class ReplicaLost(Exception):
    """The process of a replica is gone, or stood still and was ended; the text says how."""


class ProcessReplica:
    """A replica in a process of its own. `close` may be called from any thread, all else is for one."""

    def __init__(
        self, nursery: Nursery, folder: ModelFolder, tuning: Tuning, *, ends: frozenset[int], trial: Sequence[str]
    ) -> None:
        """`ends`: ids of the tokens that end an answer; `trial`: a prompt that a process answers before all others."""
        self._nursery = nursery
        self._folder = folder
        self._order = (str(folder.path), tuning.threads, tuning.compute_type, sorted(ends), GATHER, list(trial))
        self._lock = threading.Lock()
        self._closed = False
        self._link: socket.socket | None = None
        self._cells: memoryview[int] = memoryview(b"")
        self._pid = 0
        self._number = 0

    @property
    def pid(self) -> int:
        """The process; 0 while there is none."""
        return self._pid

    def start(self) -> None:
        """Start the process and have it load the model.

        Raises:
            ModelUnavailable: the text says what was found and what was expected.
        """
        ours, theirs = socket.socketpair()
        memory = _shared_memory()
        try:
            with theirs, self._lock:
                if self._closed:
                    raise ModelUnavailable("The model was closed.")
                self._pid = self._nursery.fork(theirs, memory)
            self._cells = memoryview(mmap.mmap(memory, wire.CELLS * wire.CELL_BYTES)).cast(wire.CELL)
        except OSError as problem:
            ours.close()
            raise ModelUnavailable(f"No process for a replica can be started: {problem}.") from None
        except BaseException:
            ours.close()
            raise
        finally:
            os.close(memory)
        self._link = ours
        try:
            self._send(self._order)
            what, _, content = next(self._frames())
        except ReplicaLost as problem:
            raise ModelUnavailable(f"{self._folder.path} cannot be loaded: its process {problem}.") from None
        if what == wire.FAILED:
            found = content.decode()
            raise ModelUnavailable(
                f"{self._folder.path} cannot be loaded: {found}; expected a whole CTranslate2 decoder model."
            )

    def lives(self) -> bool:
        """Tell whether the process is there: the other end of its socket is open, and it has nothing to say unasked."""
        assert self._link is not None
        try:
            self._link.setblocking(False)
            self._link.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass  # it has died
        self._bury()
        return False

    def write(self, batch: Batch, writing: BatchWriting) -> None:
        """Write a batch to its end.

        Raises:
            ReplicaLost: the process is gone; `start` starts another one.
            RuntimeError: native code has refused the batch.
        """
        self._number = number = (self._number + 1) % _NUMBERS or 1
        cells = self._cells
        for index, row in enumerate(batch.rows):
            row.end_at = (cells, index, number)
            if row.cancelled:  # before it could be seen there
                cells[index] = number
        known, lead = len(batch.lead), list(batch.lead) or None
        prompts = [list(row.prompt[known:]) for row in batch.rows]
        self._send((number, prompts, [row.left for row in batch.rows], lead, tuple(batch.rows[0].sampling)))
        for what, at, content in self._frames():
            if what == wire.DONE:
                # Not when this thread had its turn: on a busy machine that tells nothing of the model.
                (writing.began,), writing.ended = wire.BEGAN.unpack(content), at
                return
            if what == wire.FAILED:
                raise RuntimeError(content.decode())
            pairs = iter(array.array("i", content))
            for index, token in zip(pairs, pairs, strict=True):
                if writing.took(index, token, at):
                    cells[index] = number
            writing.tell()

    def close(self) -> None:
        """End the process at once."""
        with self._lock:
            self._closed = True
            self._end()

    def _send(self, message: tuple[Any, ...]) -> None:
        content = marshal.dumps(message)
        assert self._link is not None
        try:
            self._link.settimeout(_LONGEST_SEND)
            self._link.sendall(wire.SIZE.pack(len(content)) + content)
        except OSError:
            raise ReplicaLost(self._bury()) from None

    def _frames(self) -> Iterator[tuple[int, float, bytes]]:
        """Yield what the process tells: what it is, when that was, and its content."""
        link, data, size = self._link, b"", wire.FRAME.size
        assert link is not None
        try:
            link.settimeout(LOOK)
        except OSError:  # it was closed
            raise ReplicaLost(self._bury()) from None
        standstill = Standstill(self._pid)
        while True:
            at = 0
            while len(data) - at >= size:
                what, length, when = wire.FRAME.unpack_from(data, at)
                end = at + size + length
                if len(data) < end:
                    break
                yield what, when, data[at + size : end]
                at = end
            data, more = data[at:], b""
            try:
                more = link.recv(_READ)
            except TimeoutError:
                if not standstill.look():
                    continue
                self._bury()
                raise ReplicaLost("stood still") from None
            except OSError:
                pass
            if not more:
                raise ReplicaLost(self._bury())
            data += more

    def _bury(self) -> str:
        """Take leave of a process whose socket has closed; return how it ended."""
        with self._lock:
            status = self._end()
        if status is None:
            return "has ended"
        code = os.waitstatus_to_exitcode(status)
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"

    def _end(self) -> int | None:
        pid, self._pid = self._pid, 0
        status = self._nursery.end(pid) if pid else None
        if self._link is not None:
            with contextlib.suppress(OSError):
                self._link.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads
            self._link.close()
        return status


def _shared_memory() -> int:
    """Return a descriptor of memory for `wire.CELLS`, filled with zeros."""
    try:
        descriptor = os.memfd_create("moltbot-cells")
    except (AttributeError, OSError):
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.truncate(descriptor, wire.CELLS * wire.CELL_BYTES)
    return descriptor
