"""The store that the settings name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moltbot_server.config import ConfigError, Problem, Settings
from moltbot_server.store.memory import MemoryStore
from moltbot_server.store.protocol import Store
from moltbot_server.store.sqlite import SqliteStore
from moltbot_server.workspace import Workspace

if TYPE_CHECKING:
    from moltbot_server.store.redis import RedisStore


def build_store(settings: Settings, *, address: str = "", key: str = "") -> Store:
    """Return the store that the settings name, not open yet.

    `address` is where other nodes reach this one; without it a store in a file has one node. `key` opens this node.

    Raises:
        ConfigError: it is Redis, and its client is not installed.
    """
    if settings.store.type == "redis":
        return build_redis(settings, address=address, key=key)
    if settings.store.type == "memory":
        return MemoryStore()
    return SqliteStore(Workspace(folder=settings.workspace).database, address=address)


def build_redis(settings: Settings, *, address: str = "", key: str = "") -> RedisStore:
    """Return the store in Redis that the settings name, not open yet.

    Raises:
        ConfigError: its client is not installed.
    """
    # Late: it takes half a second, and only those who keep turns in Redis need it installed.
    try:
        from moltbot_server.store.redis import RedisStore
    except ModuleNotFoundError:
        text = (
            "store.type is redis, and its client is not installed: "
            "type  .venv/bin/python -m pip install --editable '.[redis]'  in MoltBot's folder and start again"
        )
        raise ConfigError(Problem(where=settings.origin("store.type"), text=text)) from None
    named = settings.store
    return RedisStore(
        host=named.host,
        port=named.port,
        password=named.password,
        database=named.database,
        prefix=named.prefix,
        tls=named.tls,
        advertised=address,
        key=key,
    )
