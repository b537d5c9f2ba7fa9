"""An adapter as a process that can be killed: receives deliveries, posts each to a platform, confirms or rejects it.

The platform is a line of JSON to a port, answered with a line: the number of the post.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from contextlib import aclosing

from moltbot import Delivery, MoltBot

CHANNEL = "chat"


async def post(delivery: Delivery, port: int, name: str, dice: random.Random) -> None:
    """Take one delivery to the platform, in its own time."""
    await asyncio.sleep(dice.random() * 0.2)
    if dice.random() < 0.05:
        await delivery.reject("the platform is busy", retry_after=dice.random())
        return
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    said = {
        "adapter": name,
        "key": delivery.dedupe_key,
        "attempt": delivery.attempt,
        "turn": delivery.turn,
        "place": delivery.address,
        "text": delivery.completed.text if delivery.completed is not None else "",
        "failed": delivery.failure.reason if delivery.failure is not None else "",
    }
    writer.write(json.dumps(said).encode() + b"\n")
    number = (await reader.readline()).decode().strip()
    writer.close()
    await asyncio.sleep(dice.random() * 0.2)
    await delivery.confirm(number)


async def main(addresses: str, key: str, port: int, name: str) -> None:
    """Receive until killed."""
    dice = random.Random(name)
    async with (
        MoltBot(addresses, key, patience=3600.0) as bot,
        aclosing(bot.deliveries(CHANNEL, at_once=8)) as deliveries,
        asyncio.TaskGroup() as posts,
    ):
        async for delivery in deliveries:
            posts.create_task(post(delivery, port, name, dice))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]))
