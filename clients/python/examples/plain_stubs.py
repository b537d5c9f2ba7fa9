"""The same with the generated stubs alone, without asyncio: `python plain_stubs.py "What can you do?"`.

This is what a client in any language does: a channel, the key as metadata, one call, a loop over its events.
"""

import os
import sys
import uuid
from pathlib import Path

import grpc
from moltbot.v1 import chat_pb2, chat_pb2_grpc, message_pb2

question = " ".join(sys.argv[1:]) or "What can you do?"
address = os.environ.get("MOLTBOT_ADDRESS", "127.0.0.1:50051")
workspace = Path(os.environ.get("MOLTBOT_WORKSPACE", Path.home() / ".moltbot"))
key = (workspace / "key").read_text().strip()
turn = chat_pb2.TurnInput(parts=[message_pb2.Part(text=question)], request_id=str(uuid.uuid4()))

with grpc.insecure_channel(address) as channel:
    chat = chat_pb2_grpc.ChatServiceStub(channel)
    for answer in chat.StreamTurn(
        chat_pb2.StreamTurnRequest(turn=turn), metadata=(("authorization", f"Bearer {key}"),)
    ):
        event = answer.event
        if event.HasField("text_delta"):
            print(event.text_delta.text, end="", flush=True)
        elif event.HasField("reset"):  # what was said so far is void
            print(f"\n(once more)\n{event.reset.text}", end="", flush=True)
        elif event.HasField("failed"):
            sys.exit(f"{event.failed.reason}: {event.failed.message}")
print()
