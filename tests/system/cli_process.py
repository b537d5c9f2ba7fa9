"""The command `moltbot` as people run it: a process with a home and a workspace of its own."""

import asyncio
import json
import os
import random
import signal
import socket
import sys
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

COMMAND = [sys.executable, "-m", "moltbot_server.cli"]
ANY_PORTS = ("--port", "0", "--grpc-port", "0", "--metrics-port", "0")
_LONG = 30.0


_QUIET = {"PROMPT_TOOLKIT_NO_CPR": "1", "MOLTBOT_FIRST_TUNING": "off"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The standard output as JSON."""
        return json.loads(self.out)


@dataclass(slots=True)
class Home:
    """A person's home folder with a workspace; commands run in it know of no other."""

    folder: Path
    variables: dict[str, str] = field(default_factory=lambda: {"MODEL_TYPE": "scripted"})

    @property
    def workspace(self) -> Path:
        """The workspace folder."""
        return self.folder / ".moltbot"

    @property
    def environ(self) -> dict[str, str]:
        """The whole environment of a command."""
        return {"PATH": os.environ["PATH"], "HOME": str(self.folder), **_QUIET, **self.variables}

    async def spawn(self, *arguments: str, **options: Any) -> Process:
        """Start a command in a process group of its own, as a shell does."""
        options = {"stdin": asyncio.subprocess.DEVNULL, "stdout": PIPE, "stderr": PIPE, **options}
        return await asyncio.create_subprocess_exec(
            *COMMAND, *arguments, cwd=self.folder, env=self.environ, process_group=0, **options
        )

    async def run(self, *arguments: str, text: str | None = None) -> Ended:
        """Run a command to its end."""
        process = await self.spawn(*arguments, stdin=asyncio.subprocess.DEVNULL if text is None else PIPE)
        async with asyncio.timeout(_LONG):
            out, err = await process.communicate(None if text is None else text.encode())
        assert process.returncode is not None
        return Ended(status=process.returncode, out=out.decode(), err=err.decode())

    @asynccontextmanager
    async def started(self, *arguments: str) -> AsyncIterator["Started"]:
        """Run `moltbot start` on free ports until it is ready; it is stopped at the end if it still runs."""
        started = Started(self, await self.spawn("start", *ANY_PORTS, *arguments, stderr=STDOUT))
        try:
            await started.line("MoltBot is ready")
            if self.variables.get("MOLTBOT_LOG_JSON") != "true":
                await started.line("Stop: Ctrl-C")
            yield started
        finally:
            if started.process.returncode is None:
                started.process.send_signal(signal.SIGTERM)
            try:
                await started.rest()
            finally:
                await started.gone()


@dataclass(slots=True)
class Started:
    """A `moltbot start` that runs. Its two outputs are read as one."""

    home: Home
    process: Process
    seen: list[str] = field(default_factory=list)

    async def line(self, holding: str) -> str:
        """Read on to a line that holds a text, and return it."""
        assert self.process.stdout is not None
        async with asyncio.timeout(_LONG):
            while line := (await self.process.stdout.readline()).decode():
                self.seen.append(line)
                if holding in line:
                    return line
        raise AssertionError(f"{holding!r} was not said:\n{''.join(self.seen)}")

    async def rest(self) -> int:
        """Read to the end and return the exit status."""
        assert self.process.stdout is not None
        async with asyncio.timeout(_LONG):
            while line := (await self.process.stdout.readline()).decode():
                self.seen.append(line)
            return await self.process.wait()

    async def gone(self) -> None:
        """Make an end of it, however slow the machine is: what runs on would be the fault of a later test."""
        if self.process.returncode is None:
            for each in self.processes():
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            await self.process.wait()

    @property
    def said(self) -> str:
        """All that was read."""
        return "".join(self.seen)

    def told(self) -> Any:
        """What it tells other commands."""
        return json.loads((self.home.workspace / "run" / "start.json").read_text())

    def processes(self) -> list[psutil.Process]:
        """Its children, and itself."""
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]


async def all_gone(processes: list[psutil.Process]) -> bool:
    """Return whether processes are gone, after some time if need be."""
    _, alive = await asyncio.to_thread(psutil.wait_procs, processes, _LONG)
    return not alive


@contextmanager
def taken_behind_a_free_one() -> Iterator[int]:
    """Hold a port, and give the one before it, which is free; both of those that the system gives to nobody."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port + 1)) as taken:
            with socket.create_server(("127.0.0.1", port)):
                pass
            assert taken.getsockname()[1] == port + 1
            yield port
            return
