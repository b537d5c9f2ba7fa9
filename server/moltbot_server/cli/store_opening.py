"""The store that the configuration names, opened for a command."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from moltbot_server.cli.terminal import Exit, Failure, command, shown
from moltbot_server.config import Settings
from moltbot_server.errors import MoltBotError
from moltbot_server.store.building import build_redis
from moltbot_server.store.moving import Records
from moltbot_server.store.sqlite import SqliteStore
from moltbot_server.store.sqlite_moving import SqliteRecords
from moltbot_server.workspace import Workspace

if TYPE_CHECKING:
    from moltbot_server.store.redis import RedisStore


def refuse_memory(settings: Settings) -> None:
    """Refuse where nothing is kept.

    Raises:
        Failure: the store is the memory of the core.
    """
    if settings.store.type == "memory":
        text = "store.type is memory: what is said is in the core alone, and gone when it ends. Nothing is kept."
        raise Failure(text, Exit.UNAVAILABLE)


@asynccontextmanager
async def open_redis(settings: Settings, *, fit: bool = True) -> AsyncIterator[RedisStore]:
    """Open the Redis that the settings name; with `fit`, only one that is set up well.

    Raises:
        Failure: it cannot be used.
    """
    store = build_redis(settings)
    try:
        await store.open(fit=fit)
    except MoltBotError as error:
        raise Failure(error.message, Exit.UNAVAILABLE) from None
    try:
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def open_records(workspace: Workspace, settings: Settings, *, held: bool, make: bool) -> AsyncIterator[Records]:
    """Open what the store holds, record by record; `held`: MoltBot runs in the workspace.

    With `make` a database is made where there is none.

    Raises:
        Failure: there is none, or it cannot be used.
    """
    refuse_memory(settings)
    if settings.store.type == "redis":
        from moltbot_server.store.redis_moving import RedisRecords  # late: only where Redis is the store

        async with open_redis(settings) as store:
            yield RedisRecords(store)
        return
    path = workspace.database
    if not make and not path.exists():
        start = command("start", workspace)
        raise Failure(f"there is nothing yet: {shown(path)} is made by the first `{start}`.")
    if not held:
        database = SqliteStore(path)  # which brings it up to date
        await database.open()
        await database.close()
    yield SqliteRecords(path)
