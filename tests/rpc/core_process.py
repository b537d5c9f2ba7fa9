"""The core as a process of its own, on a workspace of the test, with the scripted engine."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
from grpc import aio
from moltbot_server.workspace import Workspace
from rpc_calls import Api

START = 20.0


class CoreProcess:
    """A core that runs: its address, its key, its memory, its end."""

    def __init__(self, process: asyncio.subprocess.Process, folder: Path) -> None:
        self.process = process
        self.folder = folder
        self.address = ""
        self.log: list[str] = []
        self._reading = asyncio.create_task(self._read_log())

    @classmethod
    async def start(cls, folder: Path, *flags: str, **environ: str) -> CoreProcess:
        """Start a core; return before it serves."""
        Workspace(folder=folder).create()
        known = {name: value for name, value in os.environ.items() if not name.startswith("MOLTBOT_")}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "moltbot_server", "--workspace", str(folder)),
            *("--grpc-port", "0", "--metrics-port", "0", *flags),
            env={**known, "MODEL_TYPE": "scripted", **environ},
            cwd=folder,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        return cls(process, folder)

    async def serving(self) -> CoreProcess:
        """Wait for the line that says that it serves."""
        assert self.process.stdout is not None
        line = await asyncio.wait_for(self.process.stdout.readline(), START)
        assert line, f"the core did not start: {await self.whole_log()}"
        ready = json.loads(line)
        assert ready["ready"] is True
        self.address = ready["grpc"]
        return self

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata that a call needs."""
        return (("authorization", f"Bearer {Workspace(folder=self.folder).read_key()}"),)

    def api(self) -> Api:
        """Return all services on a new channel; the caller closes it."""
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        return Api(aio.insecure_channel(self.address, options=options), self.metadata)

    @property
    def memory(self) -> int:
        """Bytes of memory that the process takes."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    async def end(self, within: float = 10.0) -> int:
        """Wait for the process' end and return its exit code."""
        return await asyncio.wait_for(self.process.wait(), within)

    async def whole_log(self) -> str:
        """Return what it wrote to its log, when it has ended."""
        await asyncio.wait_for(self._reading, START)
        return "\n".join(self.log)

    async def _read_log(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.log.append(line.decode().rstrip())


@asynccontextmanager
async def core_process(folder: Path, *flags: str, **environ: str) -> AsyncGenerator[CoreProcess, None]:
    """Run a core in a process; one that still runs at the end is killed."""
    core = await CoreProcess.start(folder, *flags, **environ)
    try:
        yield core
    finally:
        if core.process.returncode is None:
            core.process.kill()
        await core.process.wait()
        await core.whole_log()
