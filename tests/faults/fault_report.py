"""What a figure of a run depends on: the machine, what else it does, and the state of the code."""

from __future__ import annotations

import asyncio
import os
import platform
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

_WINDOW = 10
"""Seconds, of which the worst are told."""
_SYNC_EACH = 0.2
"""Seconds from one sync to the next."""


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


class Host:
    """What the host of a virtual machine kept from it: shares of its processors, and answers of its disk."""

    def __init__(self, folder: Path) -> None:
        """`folder` is on the disk that is watched; a file in it is written to."""
        self._seen = [self._now()]
        self._slowest_sync = 0.0
        self._ended = asyncio.Event()
        self._tasks = [asyncio.create_task(self._look()), asyncio.create_task(self._sync(folder / "sync"))]

    @staticmethod
    def _now() -> tuple[float, float]:
        times = psutil.cpu_times()
        # Guests of this machine count in `user` already.
        return getattr(times, "steal", 0.0), sum(times[:8])

    async def _look(self) -> None:
        while not self._ended.is_set():
            await self._pause(1.0)
            self._seen.append(self._now())

    async def _sync(self, path: Path) -> None:
        with path.open("wb", buffering=0) as file:
            while not self._ended.is_set():
                file.write(b"x")
                took = await asyncio.to_thread(_synced, file.fileno())
                self._slowest_sync = max(self._slowest_sync, took)
                await self._pause(_SYNC_EACH)

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), seconds)

    async def end(self) -> dict[str, float]:
        """Stop looking; return the shares of all the time and of the worst ten seconds, and the slowest sync."""
        self._ended.set()
        await asyncio.gather(*self._tasks)
        seen = self._seen
        windows = [_share(first, last) for first, last in zip(seen, seen[_WINDOW:], strict=False)]
        return {
            "stolen": round(_share(seen[0], seen[-1]), 3),
            "stolen_worst": round(max(windows, default=0.0), 3),
            "slowest_sync": round(self._slowest_sync, 3),
        }


def _synced(descriptor: int) -> float:
    """Write a file to the disk; return how many seconds that took."""
    began = time.perf_counter()
    os.fdatasync(descriptor)
    return time.perf_counter() - began


def _share(first: tuple[float, float], last: tuple[float, float]) -> float:
    return (last[0] - first[0]) / max(last[1] - first[1], 0.01)
