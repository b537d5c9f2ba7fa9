"""Start a turn, lose the connection, and read on from the event that was seen last: nothing is lost or comes twice."""

import asyncio
from contextlib import aclosing

from moltbot import MoltBot
from moltbot.v1 import chat_pb2


def show(event: chat_pb2.Event, text: str) -> str:
    """Print an event with its number, and return the text so far: it is longer by now, or begun anew."""
    kind = event.WhichOneof("kind")
    more = event.text_delta.text
    print(f"{event.sequence:5} {kind:<10} {more!r}" if more else f"{event.sequence:5} {kind}")
    return event.reset.text if kind == "reset" else text + more


async def main() -> None:
    """Leave after the first words, come back on a new connection, and compare with the answer that the core kept."""
    turn, last, text = "", 0, ""
    print("First connection:")
    async with MoltBot() as bot, aclosing(bot.stream_turn("What can you do?")) as events:
        async for event in events:
            turn, last, text = turn or event.accepted.turn, event.sequence, show(event, text)
            if text:
                break

    print(f"\nGone after event {last}. The core writes on, with nobody there. All that is needed to come back:\n{turn}")

    print(f"\nSecond connection, after event {last}:")
    async with MoltBot() as bot:
        async for event in bot.resume_turn(turn, after_sequence=last):
            text = show(event, text)
        session = turn.partition("/turns/")[0]
        kept = [message async for message in bot.messages(session)][-1].parts[0].text
    print(f"\nThe two together:\n{text}\n\nThe same as what the core kept: {'yes' if text == kept else 'no'}")


asyncio.run(main())
