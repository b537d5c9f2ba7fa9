"""The store that the settings name."""

from __future__ import annotations

from moltbot_server.config import ConfigError, Problem, Settings
from moltbot_server.store.protocol import Store
from moltbot_server.store.sqlite import SqliteStore
from moltbot_server.workspace import Workspace


def build_store(settings: Settings) -> Store:
    """Return the store that the settings name, not open yet.

    Raises:
        ConfigError: it is Redis, and its client is not installed.
    """
    named = settings.store
    if named.type == "sqlite":
        return SqliteStore(Workspace(folder=settings.workspace).database)
    # Late: it takes half a second, and only those who keep turns in Redis need it installed.
    try:
        from moltbot_server.store.redis import RedisStore
    except ModuleNotFoundError:
        text = "store.type is redis, and its client is not installed: pip install 'moltbot[redis]'"
        raise ConfigError(Problem(where=settings.origin("store.type"), text=text)) from None
    return RedisStore(
        host=named.host,
        port=named.port,
        password=named.password,
        database=named.database,
        prefix=named.prefix,
        tls=named.tls,
    )
