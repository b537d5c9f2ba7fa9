"""What a figure of a run depends on: the machine, what else it does, and the state of the code."""

from __future__ import annotations

import asyncio
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil

_WINDOW = 10
"""Seconds, of which the worst are told."""


def machine() -> dict[str, Any]:
    """Return the machine, its load at this moment, the commit and the date."""
    asked = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    told = subprocess.run(asked, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "load": [round(load, 2) for load in os.getloadavg()],
        "commit": told.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


class Stolen:
    """The share of the processors that the host of a virtual machine took away, second by second."""

    def __init__(self) -> None:
        self._seen = [self._now()]
        self._task = asyncio.create_task(self._look())

    @staticmethod
    def _now() -> tuple[float, float]:
        times = psutil.cpu_times()
        # Guests of this machine count in `user` already.
        return getattr(times, "steal", 0.0), sum(times[:8])

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            self._seen.append(self._now())

    def end(self) -> dict[str, float]:
        """Stop looking; return the shares of all the time, and of the worst ten seconds."""
        self._task.cancel()
        seen = [*self._seen, self._now()]
        windows = [_share(first, last) for first, last in zip(seen, seen[_WINDOW:], strict=False)]
        return {"stolen": round(_share(seen[0], seen[-1]), 3), "stolen_worst": round(max(windows, default=0.0), 3)}


def _share(first: tuple[float, float], last: tuple[float, float]) -> float:
    return (last[0] - first[0]) / max(last[1] - first[1], 0.01)
