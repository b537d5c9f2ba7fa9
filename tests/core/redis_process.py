"""A real Redis for the tests, on a port of its own, that can be hung, killed and started again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from asyncio.subprocess import DEVNULL, Process
from pathlib import Path

import pytest
from moltbot_server.testing import free_port

_TOOLS = Path(__file__).parents[2] / ".tools" / "bin"
_WITHIN = 10.0


def redis_server() -> str:
    """Return the path of the server; skips the test where there is none."""
    found = shutil.which("redis-server", path=f"{_TOOLS}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip("redis-server is not installed: type  scripts/tools redis")
    return found


class KeepingRedis:
    """A `redis-server` for many tests that writes down all that it is given; it runs inside a `with` block."""

    def __init__(self, folder: Path, *options: str) -> None:
        """`options` are of the command line."""
        self.port = free_port()
        self._command = [redis_server(), "--bind", "127.0.0.1", "--dir", str(folder)]
        self._command += ["--save", "", "--appendonly", "yes", "--appendfsync", "always", *options]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> KeepingRedis:
        self._start()
        until = time.monotonic() + _WITHIN
        while not self._answers():
            assert time.monotonic() < until, "redis-server does not listen"
            if self._process is not None and self._process.poll() is not None:
                self.port = free_port()  # somebody else came to listen at the other one first
                self._start()
            time.sleep(0.01)
        return self

    def _start(self) -> None:
        command = [*self._command, "--port", str(self.port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def _answers(self) -> bool:
        """Tell whether it is this server that listens."""
        assert self._process is not None
        told = b""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=2.0) as line:
            line.sendall(b"INFO server\r\n")
            while b"process_id:" not in told.rpartition(b"\r\n")[0] and (data := line.recv(65536)):
                told += data
        return f"process_id:{self._process.pid}\r\n".encode() in told

    def __exit__(self, *failed: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class RedisProcess:
    """A `redis-server` that keeps nothing on the disk, or what it is told to; it runs inside an `async with` block."""

    def __init__(self, password: str = "", *options: str) -> None:
        """Choose a port; `options` are of the command line."""
        self.port = free_port()
        self._command = [
            redis_server(),
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
        ]
        self._command += [*(["--requirepass", password] if password else []), *options]
        self._process: Process | None = None

    @classmethod
    def keeping(cls, folder: Path) -> RedisProcess:
        """Return one that writes down all that it is given."""
        return cls("", "--appendonly", "yes", "--appendfsync", "always", "--dir", str(folder))

    async def __aenter__(self) -> RedisProcess:
        await self.start()
        return self

    async def __aexit__(self, *failed: object) -> None:
        await self.kill()

    async def start(self) -> None:
        """Start it and wait until it listens."""
        self._process = await asyncio.create_subprocess_exec(*self._command, stdout=DEVNULL, stderr=DEVNULL)
        async with asyncio.timeout(_WITHIN):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                except ConnectionRefusedError:
                    await asyncio.sleep(0.01)
                else:
                    writer.close()
                    await writer.wait_closed()
                    return

    def hang(self) -> None:
        """Let it take calls and answer none."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it answer again."""
        self._signal(signal.SIGCONT)

    async def kill(self) -> None:
        """End it at once."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            await process.wait()

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)
