"""A real Redis for the tests, on a port of its own, that can be hung, killed and started again."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
from asyncio.subprocess import DEVNULL, Process
from pathlib import Path

import pytest

_TOOLS = Path(__file__).parents[2] / ".tools" / "bin"
_WITHIN = 10.0


class RedisProcess:
    """A `redis-server` that keeps nothing on the disk."""

    def __init__(self, password: str = "", *options: str) -> None:
        """Choose a port; `options` are of the command line."""
        found = shutil.which("redis-server", path=f"{_TOOLS}{os.pathsep}{os.environ['PATH']}")
        if found is None:
            pytest.skip("redis-server is not installed: type  scripts/tools redis")
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port: int = listener.getsockname()[1]
        self._command = [found, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self._command += [*(["--requirepass", password] if password else []), *options]
        self._process: Process | None = None

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
