"""Child processes of a benchmark: started, read line by line, measured, and ended with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

_TICKS = os.sysconf("SC_CLK_TCK")


class Child:
    """A Python module run as a process that speaks JSON lines."""

    def __init__(self, module: str, *arguments: str, cpus: set[int] | None = None, **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
            process_group=0,  # Ctrl-C at a terminal goes to the benchmark alone, which ends them in order
        )
        if cpus:
            os.sched_setaffinity(self._process.pid, cpus)

    @property
    def pid(self) -> int:
        """The process' id."""
        return self._process.pid

    def tell(self, line: str) -> None:
        """Write a line to the process."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def read(self) -> dict[str, Any]:
        """Return the next line of JSON that the process writes.

        Raises:
            RuntimeError: the process ended instead.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process of the benchmark ended early, with exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def cpu_seconds(self) -> float:
        """Return the processor time that the process has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.terminate()  # first: the end of its input would be an error to one that still waits for a plan
        self._process.stdin.close()
        self._process.wait(timeout=20)
        self._process.stdout.close()


def processor_seconds(processes: Mapping[str, psutil.Process]) -> dict[str, float]:
    """Return how long each has used a processor, with those that it has started, unless these are named themselves.

    What is no more counts for nothing.
    """
    named = {process.pid for process in processes.values()}
    return {name: _seconds(process, named) for name, process in processes.items()}


def _seconds(process: psutil.Process, named: Collection[int]) -> float:
    try:
        used, children = process.cpu_times(), process.children()
    except psutil.NoSuchProcess:
        return 0.0
    return used.user + used.system + sum(_seconds(child, named) for child in children if child.pid not in named)
