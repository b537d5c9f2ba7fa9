"""What a process asks of its disk and its sockets, read by strace; and calls that strace lets fail."""

from __future__ import annotations

import asyncio
import re
import shutil
import signal
import subprocess
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

_CALL = re.compile(r"^(?P<thread>\d+) +(?P<time>\d+\.\d+) (?P<name>\w+)\((?P<rest>.*)$")
_RESUMED = re.compile(r"^(?P<thread>\d+) +(?P<time>\d+\.\d+) <\.\.\. (?P<name>\w+) resumed>(?P<rest>.*)$")
_ANSWER = re.compile(r"= (-?\d+)(?: (E\w+))?(?: \(.*\))?$")


def why_not() -> str:
    """Return why nothing can be traced here; empty when it can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    tried = subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, text=True, check=False)
    return f"strace may not trace here: {tried.stderr.strip()[:100]}" if tried.returncode else ""


@asynccontextmanager
async def traced(process: int, output: Path, *flags: str) -> AsyncGenerator[None, None]:
    """Trace a process and all of its threads while the body runs."""
    command = ["strace", "-f", "-ttt", "-s", "5000", *flags, "-o", str(output), "-p", str(process)]
    strace = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL, stdout=DEVNULL, stderr=PIPE)
    assert strace.stderr is not None
    try:
        attached = await asyncio.wait_for(strace.stderr.readline(), 10)
        assert b"attached" in attached, attached
        yield
    finally:
        strace.send_signal(signal.SIGINT)
        await asyncio.wait_for(strace.communicate(), 30)


def failing(call: str, error: str) -> tuple[str, ...]:
    """Return the flags with which a system call fails each time."""
    return "-e", f"trace={call}", "-e", f"inject={call}:error={error}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemCall:
    """One call: when it was made and when it was answered, in the order of the trace; `error` is empty or a name."""

    name: str
    began: int
    ended: int
    given: str
    error: str


def calls(output: Path) -> Iterator[SystemCall]:
    """Yield the calls of a trace, in the order in which they were answered."""
    open_calls: dict[str, tuple[int, str]] = {}
    for place, line in enumerate(output.read_text("utf-8", errors="replace").splitlines()):
        if (match := _RESUMED.match(line)) is not None:
            began, given = open_calls.pop(match["thread"], (place, ""))
            yield _call(match["name"], began, place, given + match["rest"])
        elif (match := _CALL.match(line)) is not None:
            if match["rest"].endswith("<unfinished ...>"):
                open_calls[match["thread"]] = (place, match["rest"])
            else:
                yield _call(match["name"], place, place, match["rest"])


def _call(name: str, began: int, ended: int, given: str) -> SystemCall:
    answer = _ANSWER.search(given)
    return SystemCall(name=name, began=began, ended=ended, given=given, error=(answer[2] or "") if answer else "?")
