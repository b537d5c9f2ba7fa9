"""The MoltBot contract (`moltbot.v1`) and its Python client."""

from moltbot.answer import Answer
from moltbot.client import MoltBot, Reply
from moltbot.deliveries import Delivery
from moltbot.errors import MoltBotClientError

__all__ = ["Answer", "Delivery", "MoltBot", "MoltBotClientError", "Reply"]
