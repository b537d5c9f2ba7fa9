"""The store that the configuration names, opened for a command."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from moltbot_server.cli.terminal import Exit, Failure, command, shown
from moltbot_server.config import Settings
from moltbot_server.errors import MoltBotError
from moltbot_server.store.building import build_redis
from moltbot_server.store.moving import Records
from moltbot_server.store.sqlite import SqliteStore
from moltbot_server.store.sqlite_moving import SqliteRecords
from moltbot_server.store.sqlite_schema import SCHEMA_VERSION, unknown_schema
from moltbot_server.workspace import Workspace

if TYPE_CHECKING:
    from moltbot_server.store.redis import RedisStore

# What it logs is said of the turns of a core; a command says itself what it finds.
logging.getLogger("moltbot_server.store.redis_presence").addHandler(logging.NullHandler())


def refuse_memory(settings: Settings) -> None:
    """Refuse where nothing is kept.

    Raises:
        Failure: the store is the memory of the core.
    """
    if settings.store.type == "memory":
        text = "store.type is memory: what is said is in the core alone, and gone when it ends. Nothing is kept."
        raise Failure(text, Exit.UNAVAILABLE)


@asynccontextmanager
async def open_redis(settings: Settings, *, fit: bool = True, join: bool = False) -> AsyncIterator[RedisStore]:
    """Open the Redis that the settings name, to read; with `join`, to write, too. With `fit`, only one set up well.

    Raises:
        Failure: it cannot be used.
    """
    store = build_redis(settings)
    try:
        await store.open(fit=fit, join=join)
    except MoltBotError as error:
        raise Failure(error.message, Exit.UNAVAILABLE) from None
    try:
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def open_records(workspace: Workspace, settings: Settings, *, held: bool, make: bool) -> AsyncIterator[Records]:
    """Open what the store holds, record by record; `held`: MoltBot runs in the workspace.

    With `make` it can be written, and a database is made where there is none.

    Raises:
        Failure: there is none, or it cannot be used.
    """
    refuse_memory(settings)
    if settings.store.type == "redis":
        from moltbot_server.store.redis_moving import RedisRecords  # late: only where Redis is the store

        async with open_redis(settings, join=make) as store:
            yield RedisRecords(store)
        return
    path = workspace.database
    records = SqliteRecords(path)
    if not make:
        _require_current(records, path, workspace)
    if held or not make:
        yield records
        return
    database = SqliteStore(path)  # which brings it up to date, and keeps cores out meanwhile
    try:
        await database.open()
    except MoltBotError as error:
        raise Failure(error.message, Exit.UNAVAILABLE) from None
    try:
        yield records
    finally:
        await database.close()


def _require_current(records: SqliteRecords, path: Path, workspace: Workspace) -> None:
    """Refuse a database that this release cannot read as it is: whoever reads changes nothing.

    Raises:
        Failure: there is none, or another release has written it.
    """
    start = command("start", workspace)
    version = records.schema() if path.exists() else 0
    if version == 0:
        raise Failure(f"there is nothing yet: {shown(path)} is made by the first `{start}`.")
    if version < 0:
        raise Failure(f"{shown(path)} cannot be read: {unknown_schema(version)}.")
    if version > SCHEMA_VERSION:
        raise Failure(
            f"{shown(path)} was written by a newer release (schema {version}, this one reads {SCHEMA_VERSION}): "
            "export it with that one."
        )
    if version < SCHEMA_VERSION:
        raise Failure(
            f"{shown(path)} was written by an older release (schema {version}, this one reads {SCHEMA_VERSION}). "
            f"Export it with that one; or back it up, for there is no way back, and run `{start}`."
        )
