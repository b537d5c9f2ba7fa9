"""Who starts processes that write: an engine's side of `program.nursery`."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

from moltbot_server.models.replica import wire

_LEAVES = 5.0  # seconds
_ANSWERS = 10.0  # seconds; it forks in some milliseconds, and one that stands still is as one that is gone


class Nursery:
    """A process that forks others, started when it is first needed. Its methods may be called from any thread."""

    def __init__(self) -> None:
        """Start nothing yet."""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._born: set[int] = set()

    @staticmethod
    def possible() -> bool:
        """Tell whether this system has what it takes; elsewhere replicas are threads."""
        return sys.platform == "linux"

    @property
    def pid(self) -> int | None:
        """The process that forks; None while there is none."""
        return None if self._process is None else self._process.pid

    @property
    def born(self) -> int:
        """How many processes it has forked that were not ended."""
        return len(self._born)

    def start(self) -> None:
        """Start the process, if it does not run; it is ready by itself in a tenth of a second.

        Raises:
            OSError: it cannot be started.
        """
        with self._lock:
            self._start()

    def fork(self, link: socket.socket, memory: int) -> int:
        """Have a replica made that talks through a socket and looks at shared memory; return its process.

        Raises:
            OSError: the system has no room for another process.
        """
        with self._lock:
            pid = self._ask(wire.FORK, 0, (link.fileno(), memory))
            if pid is None:  # it was killed: those that it has forked live on, and another one forks from now on
                pid = self._ask(wire.FORK, 0, (link.fileno(), memory))
            if pid is None:
                raise OSError(errno.ECHILD, "the process that forks replicas ends by itself")
            self._born.add(pid)
            return pid

    def end(self, pid: int) -> int | None:
        """Kill a replica, unless it is dead, and return its wait status; None where the system took care of it."""
        with self._lock:
            status = None
            if pid in self._born:
                self._born.discard(pid)
                status = self._ask(wire.END, pid, ())
            if status is None:
                _end_orphan(pid)
            return status

    def close(self) -> None:
        """End the process. Replicas that were not ended live as long as the other ends of their sockets."""
        with self._lock:
            self._close()

    def _start(self) -> socket.socket:
        if self._control is not None:
            return self._control
        ours, theirs = socket.socketpair()
        with theirs:
            number = theirs.fileno()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "moltbot_server.models.replica.program", str(number)],
                pass_fds=(number,),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # who waits for the end of the engine's output shall not wait for this
            )
        self._control = ours
        return ours

    def _close(self) -> None:
        self._born.clear()
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            try:
                self._process.wait(_LEAVES)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def _ask(self, what: int, pid: int, descriptors: tuple[int, ...]) -> int | None:
        """Ask the process something; None where it is gone."""
        control, told = self._start(), b""
        control.settimeout(_ANSWERS)
        with contextlib.suppress(ConnectionError, TimeoutError):
            socket.send_fds(control, [wire.ASK.pack(what, pid)], descriptors)
            told = control.recv(wire.ANSWER.size, socket.MSG_WAITALL)
        if len(told) < wire.ANSWER.size:
            self._close()
            return None
        (answer,) = wire.ANSWER.unpack(told)
        if answer <= wire.REFUSED:
            number = wire.REFUSED - answer or errno.EIO
            raise OSError(number, os.strerror(number))
        return int(answer)


def _end_orphan(pid: int) -> None:
    """Kill a replica whose nursery is gone: it goes with its socket, unless it stands still."""
    with contextlib.suppress(OSError):
        # Its number may be another process's by now.
        if Path(f"/proc/{pid}/comm").read_text() == "moltbot-replica\n":
            os.kill(pid, signal.SIGKILL)
