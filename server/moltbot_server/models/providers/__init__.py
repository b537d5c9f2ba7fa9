"""Remote models: who serves them, how they are asked, and what becomes of what they answer."""

from moltbot_server.models.providers.cooldowns import Cooldowns
from moltbot_server.models.providers.engine import ProviderEngine
from moltbot_server.models.providers.keys import KeyRing, NoKeys, ProviderKey
from moltbot_server.models.providers.pools import Pools
from moltbot_server.models.providers.presets import presets
from moltbot_server.models.providers.resolving import resolve

__all__ = ["Cooldowns", "KeyRing", "NoKeys", "Pools", "ProviderEngine", "ProviderKey", "presets", "resolve"]
