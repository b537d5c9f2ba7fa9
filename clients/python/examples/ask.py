"""Ask and show the answer while it is written: `python ask.py "What can you do?"`."""

import asyncio
import sys

from moltbot import MoltBot


async def main(question: str) -> None:
    """Stream one answer to the terminal."""
    async with MoltBot() as bot:
        async for event in bot.stream_turn(question):
            print(event.text_delta.text, end="", flush=True)
    print()


asyncio.run(main(" ".join(sys.argv[1:]) or "What can you do?"))
