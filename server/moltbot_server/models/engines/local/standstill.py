"""Whether a process that has a batch to write stands still: it says nothing, uses no processor and waits for no disk.

One that computes may be silent for minutes, as with a long prompt on a large model. One that was stopped, or waits for
a lock that nobody will free, would keep those who asked it waiting for ever.
"""

from __future__ import annotations

from pathlib import Path

LOOK = 2.0
"""Seconds of silence after which is looked."""
LOOKS = 5
"""So often in a row nothing must have moved. Looks and no seconds: when all of us stood still, nobody is to blame."""

_PROC = Path("/proc")
_AT_WORK = frozenset("RD")


class Standstill:
    """Looks at one process from time to time; where the system tells nothing of processes, none stands still."""

    def __init__(self, pid: int) -> None:
        self._tasks = _PROC / str(pid) / "task"
        self._used = -1
        self._still = 0

    def look(self) -> bool:
        """Tell whether it has stood still for so many looks."""
        used, at_work = self._found()
        moved = used != self._used or at_work
        self._used, self._still = used, 0 if moved else self._still + 1
        return self._still >= LOOKS

    def _found(self) -> tuple[int, bool]:
        """Return how much of processors its threads have used, and whether one of them is at work."""
        used, at_work = 0, False
        try:
            for task in self._tasks.iterdir():
                fields = (task / "stat").read_bytes().rpartition(b") ")[2].split()
                used += int(fields[11]) + int(fields[12])
                at_work = at_work or fields[0].decode() in _AT_WORK
        except (OSError, IndexError, ValueError):
            return 0, True  # it is gone, which its socket tells, or is not to be seen
        return used, at_work
