"""Ask and show the answer while it is written: `python ask.py "What can you do?"`.

The loop goes on when the connection breaks or the core is started again. What was said is void then now and again: the
event `reset` brings what stands in its place.
"""

import asyncio
import sys

from moltbot import MoltBot


async def main(question: str) -> None:
    """Stream one answer to the terminal."""
    async with MoltBot() as bot:
        async for event in bot.stream_turn(question):
            if event.HasField("reset"):
                print("\n(once more)")
            print(event.text_delta.text or event.reset.text, end="", flush=True)
    print()


asyncio.run(main(" ".join(sys.argv[1:]) or "What can you do?"))
