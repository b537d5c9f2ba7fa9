"""The MoltBot contract (`moltbot.v1`) and its Python client."""

from moltbot.answer import Answer
from moltbot.client import MoltBot, Reply
from moltbot.errors import MoltBotClientError

__all__ = ["Answer", "MoltBot", "MoltBotClientError", "Reply"]
