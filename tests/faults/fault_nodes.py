"""Nodes as processes: cores that are killed, stopped, told to leave, and started again on what they left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from fault_history import Entry, Fault
from moltbot_server.testing import free_port
from moltbot_server.workspace import Workspace

START = 60.0
"""Seconds within which a core serves, on a machine with much else to do."""
_LAST = 10  # lines of a log
SCRIPT = """
rules:
  - {match: '^q\\d+\\.\\d+ quick', template: 'said {text}'}
  - {match: '^q\\d+\\.\\d+ steady', template: 'said {text} one two three four five six seven eight nine', pace: 0.06}
  - {match: '^q\\d+\\.\\d+ late', template: 'said {text} one two three', first_delay: 0.5, pace: 0.05}
  - {match: '^q\\d+\\.\\d+ long', template: 'said {text} one two three four five six seven eight nine', pace: 0.15}
"""
TAILS = {
    "quick": "",
    "steady": " one two three four five six seven eight nine",
    "late": " one two three",
    "long": " one two three four five six seven eight nine",
}
"""What the scripted model says behind a question of each kind."""


class NotServing(TimeoutError):
    """A node does not serve in time; the text has the last lines of its log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What the nodes of a run are: their folder, their model and their store. `environ` says more of them."""

    folder: Path
    model: str = "scripted"
    grace: float = 5.0
    environ: dict[str, str] = field(default_factory=dict)

    def prepare(self) -> None:
        """Make the workspace and the script."""
        Workspace(folder=self.folder).create()
        (self.folder / "script.yaml").write_text(SCRIPT)

    @property
    def key(self) -> str:
        """The key of the workspace."""
        return Workspace(folder=self.folder).read_key()

    @property
    def variables(self) -> dict[str, str]:
        """The environment of a node."""
        known = {name: value for name, value in os.environ.items() if not name.startswith("MOLTBOT_")}
        model = {"MODEL_TYPE": "scripted", "MODEL_PATH": str(self.folder / "script.yaml")}
        own = {"MOLTBOT_DRAIN_GRACE": str(self.grace), "MOLTBOT_FIRST_TUNING": "off"}
        return {**known, **(model if self.model == "scripted" else {}), **own, **self.environ}


class Node:
    """A core on a port of its own, which stays the same when it is started again."""

    def __init__(self, setup: Setup, name: str, note: Callable[[Entry], None]) -> None:
        """`note` hears of what is done to it."""
        self.name = name
        self.port = free_port()
        self.serving = asyncio.Event()
        self.log = setup.folder / f"{name}.log"
        self.codes: list[int] = []
        self.told: dict[str, Any] = {}
        self.setup = setup
        self._note = note
        self._process: Process | None = None
        self._watching: asyncio.Task[None] | None = None

    @property
    def process_id(self) -> int:
        """The number of its process."""
        assert self._process is not None
        return self._process.pid

    @property
    def address(self) -> str:
        """Its gRPC address."""
        return f"127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        """Return the command that starts it."""
        return [
            *(sys.executable, "-m", "moltbot_server", "--workspace", str(self.setup.folder), "--no-notices"),
            *("--grpc-port", str(self.port), "--metrics-port", "0"),
        ]

    async def start(self) -> None:
        """Start the process; it serves later."""
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self.command(),
                env=self.setup.variables,
                stdin=DEVNULL,
                stdout=PIPE,
                stderr=log,
                start_new_session=True,
            )
        self._note(Fault(at=time.monotonic(), what="start", node=self.name))
        self._watching = asyncio.create_task(self._watch(self._process))

    async def _watch(self, process: Process) -> None:
        assert process.stdout is not None
        line = await process.stdout.readline()
        self.told = json.loads(line) if line else {}
        if self.told.get("ready"):
            self._note(Fault(at=time.monotonic(), what="serves", node=self.name))
            self.serving.set()

    async def ready(self) -> None:
        """Wait until it serves.

        Raises:
            NotServing: it takes too long.
        """
        try:
            await asyncio.wait_for(self.serving.wait(), START)
        except TimeoutError:
            last = "".join(f"\n  {line}" for line in self.log.read_text(errors="replace").splitlines()[-_LAST:])
            raise NotServing(f"{self.name} does not serve within {START:g} s; the end of its log:{last}") from None

    async def ends_counted(self) -> int:
        """Return how many turns it has counted that ended."""
        reader, writer = await asyncio.open_connection(*self.told["metrics"].rsplit(":", 1))
        writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
        page = (await reader.read(-1)).decode()
        writer.close()
        return sum(int(float(line.split()[1])) for line in page.splitlines() if line.startswith("moltbot_turns_total"))

    def send(self, number: signal.Signals, what: str) -> None:
        """Send it a signal."""
        assert self._process is not None
        self._note(Fault(at=time.monotonic(), what=what, node=self.name))
        self._process.send_signal(number)

    async def end(self, within: float = 30.0) -> int:
        """Wait for its end and return its exit code."""
        assert self._process is not None
        assert self._watching is not None
        self.serving.clear()
        code = await asyncio.wait_for(self._process.wait(), within)
        await self._watching
        self.serving.clear()
        self.codes.append(code)
        return code

    async def kill(self) -> None:
        """End it at once."""
        assert self._process is not None
        if self._process.returncode is None:
            self.send(signal.SIGKILL, "kill")
        await self.end()

    async def end_all(self) -> None:
        """End everything that runs still."""
        if self._process is not None and self._process.returncode is None:
            await self.kill()

    async def restart(self, grace: float) -> int:
        """Tell it to leave, wait for that, start it again, and return the code with which it left."""
        self.send(signal.SIGTERM, "leave")
        code = await self.end(grace + 20.0)
        await self.start()
        await self.ready()
        return code


class Supervised(Node):
    """A whole installation, `moltbot start`: its core is ended, and its supervisor starts it again."""

    def command(self) -> list[str]:
        """Return the command that starts it."""
        return [
            *(sys.executable, "-m", "moltbot_server.cli", "start", "--workspace", str(self.setup.folder)),
            *("--port", "0", "--grpc-port", str(self.port), "--metrics-port", "0"),
        ]

    async def _watch(self, process: Process) -> None:
        """Serve as long as somebody listens on the core's port; what the supervisor says is read and dropped."""
        assert process.stdout is not None
        looking = asyncio.create_task(self._look())
        while await process.stdout.readline():
            pass
        looking.cancel()
        await asyncio.wait({looking})

    async def _look(self) -> None:
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            except OSError:
                self.serving.clear()
            else:
                writer.close()
                if not self.serving.is_set():
                    self._note(Fault(at=time.monotonic(), what="serves", node=self.name))
                    self.serving.set()
            await asyncio.sleep(0.05)  # nobody announces what a supervisor does

    def cores(self) -> list[psutil.Process]:
        """Return the cores among the processes that the supervisor has started."""
        found = []
        for process in psutil.Process(self.process_id).children():
            with contextlib.suppress(psutil.Error):
                line = process.cmdline()
                if "moltbot_server" in line and "engine" not in line:
                    found.append(process)
        return found

    async def kill(self) -> None:
        """End the core at once; the rest stays and starts it again."""
        cores = self.cores()
        if not cores:
            return  # it is being started again
        self._note(Fault(at=time.monotonic(), what="kill", node=self.name))
        cores[0].kill()
        self.serving.clear()
        await asyncio.sleep(0.1)  # it is gone when the system has taken it away; its port tells the rest

    async def start(self) -> None:
        """Start the installation; later, leave it to its supervisor to start its core."""
        if self._process is None:
            await super().start()

    async def end_all(self) -> None:
        """End everything."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
            await self._process.wait()


class Workers(Supervised):
    """An installation of several cores on one port: one of them is ended, and the others stand in for it."""

    def __init__(self, setup: Setup, name: str, note: Callable[[Entry], None]) -> None:
        super().__init__(setup, name, note)
        self._dice = random.Random(name)

    async def kill(self) -> None:
        """End one of the cores at once."""
        if cores := self.cores():
            self._note(Fault(at=time.monotonic(), what="kill", node=self.name))
            self._dice.choice(cores).kill()

    async def restart(self, grace: float) -> int:
        """Tell one of the cores to leave, and wait until its supervisor has started it again; 0 if that took no force.

        What it left with is known to the supervisor alone.
        """
        cores = self.cores()
        leaving = self._dice.choice(cores)
        began = time.monotonic()
        self._note(Fault(at=began, what="leave", node=self.name))
        leaving.terminate()
        async with asyncio.timeout(START):
            while leaving.is_running() or len(self.cores()) < len(cores):  # noqa: ASYNC110 - it is another's child
                await asyncio.sleep(0.05)
        return 0
