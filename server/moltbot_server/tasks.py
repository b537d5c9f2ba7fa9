"""Ending tasks."""

from __future__ import annotations

import asyncio
from typing import Any

_AGAIN = 0.2


async def end(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait until it has ended, whatever came of it.

    One that comes at the moment at which what `asyncio.wait_for` waits for is there gets lost in Python 3.11, and the
    client library of Redis waits in that way: so it is said again.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=_AGAIN)
