"""Tasks come to their end."""

import asyncio

from moltbot_server import tasks


async def test_a_task_that_loses_a_cancellation_is_told_again() -> None:
    lost = 0
    began = asyncio.Event()

    async def work() -> None:
        nonlocal lost
        while True:
            began.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if lost == 1:
                    raise
                lost += 1

    task = asyncio.create_task(work())
    await began.wait()
    async with asyncio.timeout(10):
        await tasks.end(task)
    assert lost == 1
    assert task.cancelled()


async def test_a_task_that_has_failed_has_ended() -> None:
    async def fail() -> None:
        raise ValueError("as it happens")

    task = asyncio.create_task(fail())
    await asyncio.wait({task})
    await tasks.end(task)
    assert isinstance(task.exception(), ValueError)
