"""The MoltBot contract (`moltbot.v1`) and its Python client."""

from moltbot.answer import Answer
from moltbot.client import MoltBot, Reply
from moltbot.deliveries import Delivery
from moltbot.errors import MoltBotClientError
from moltbot.v1.chat_pb2 import Place

__all__ = ["Answer", "Delivery", "MoltBot", "MoltBotClientError", "Place", "Reply"]
