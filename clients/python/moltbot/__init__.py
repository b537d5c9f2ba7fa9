"""The MoltBot contract (`moltbot.v1`) and its Python client."""

from moltbot.client import MoltBot, Reply
from moltbot.errors import MoltBotClientError

__all__ = ["MoltBot", "MoltBotClientError", "Reply"]
