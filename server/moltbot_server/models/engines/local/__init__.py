"""The engine that runs a CTranslate2 model in this process."""

from moltbot_server.models.engines.local.engine import MAX_WAITING, LocalEngine

__all__ = ["MAX_WAITING", "LocalEngine"]
