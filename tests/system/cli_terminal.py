"""A terminal for tests, with a command in it."""

import asyncio
import fcntl
import os
import pty
import struct
import sys
import termios
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from cli_process import COMMAND, Home

# What makes the terminal that of the command. No code of ours may run between fork and exec where gRPC has threads.
_TAKE = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"


class Terminal:
    """A terminal with a command in it."""

    def __init__(self, process: Process, descriptor: int) -> None:
        self.process = process
        self._descriptor = descriptor
        self._arrived = asyncio.Event()
        self.shown = ""
        asyncio.get_running_loop().add_reader(descriptor, self._read)

    def _read(self) -> None:
        try:
            self.shown += os.read(self._descriptor, 65536).decode("utf-8", "replace")
        except OSError:  # Linux says that the other end is closed
            self.close()
        self._arrived.set()

    async def until(self, text: str, *, after: int = 0) -> int:
        """Wait for a text on the screen; return where it ends."""
        async with asyncio.timeout(20):
            while (found := self.shown.find(text, after)) < 0:
                self._arrived.clear()
                await self._arrived.wait()
        return found + len(text)

    def type(self, text: str) -> None:
        """Type a text; `\\udcff` in it is a byte that is none."""
        os.write(self._descriptor, os.fsencode(text))

    def close(self) -> None:
        """Look no longer."""
        asyncio.get_running_loop().remove_reader(self._descriptor)


@asynccontextmanager
async def terminal(
    home: Home, *arguments: str, command: str = "chat", file: Path | None = None
) -> AsyncIterator[Terminal]:
    """Run `moltbot chat`, or another command, at a terminal of 100 columns; its standard output may go to a `file`."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    home.variables["TERM"] = "xterm"
    out = None if file is None else file.open("wb")

    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _TAKE, *COMMAND, command, *arguments),
        cwd=home.folder,
        env=home.environ,
        stdin=theirs,
        stdout=theirs if out is None else out,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    if out is not None:
        out.close()
    screen = Terminal(process, ours)
    try:
        yield screen
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        screen.close()
        os.close(ours)


async def answer_when_asked(answer: str, question: str, home: Home, *words: str, command: str) -> None:
    """Answer the question of a command with y or n, and see that it ends with 0 or with 1."""
    async with terminal(home, *words, command=command) as screen:
        await screen.until(question)
        screen.type(f"{answer}\n")
        async with asyncio.timeout(20):
            assert await screen.process.wait() == (0 if answer == "y" else 1)
