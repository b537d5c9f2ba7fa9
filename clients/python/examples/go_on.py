"""Start a turn, lose it, and follow it to its end: a turn belongs to the core, not to a connection."""

import asyncio
from contextlib import aclosing

from moltbot import MoltBot


async def main() -> None:
    """Leave after the first words, come back with a new connection, and ask a second question in the session."""
    turn, last, text = "", 0, ""
    async with MoltBot() as bot, aclosing(bot.stream_turn("What can you do?")) as events:
        async for event in events:
            turn, last, text = turn or event.accepted.turn, event.sequence, text + event.text_delta.text
            if text:
                break
    print(f"Left after {text!r}; coming back.")
    async with MoltBot() as bot:
        async for event in bot.resume_turn(turn, after_sequence=last):
            text += event.text_delta.text
        print(text)
        reply = await bot.run_turn("And in Chinese?", session=turn.partition("/turns/")[0])
        print(reply.text)


asyncio.run(main())
