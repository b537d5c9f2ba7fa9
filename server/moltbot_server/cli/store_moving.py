"""What `moltbot store export` and `import` do: all that a store holds, to a file and from it."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from moltbot_server.cli.model_place import Models, told
from moltbot_server.cli.progress import Progress
from moltbot_server.cli.running import is_held
from moltbot_server.cli.store_opening import open_records, open_redis
from moltbot_server.cli.terminal import Exit, Failure, command, shown, typed
from moltbot_server.models.sizes import readable
from moltbot_server.store.moving import NotMovable, check_file, export, take_in


@told
def export_store(given: argparse.Namespace) -> int:
    """Write what the store holds to a new file; return the exit status."""
    models, path = Models.of(given), given.file
    models.workspace.read_key()  # raises where there is no workspace
    try:
        # Conversations are for their owner alone.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise Failure(f"{shown(path)} exists already: choose another name, or remove it.", Exit.USAGE) from None
    except OSError as error:
        raise Failure(f"{shown(path)} cannot be written: {error.strerror}.") from None
    try:
        with os.fdopen(descriptor, "wb") as file, Progress("Exporting", quiet=given.json) as progress:
            written, beside = asyncio.run(_export(models, file, progress))
            file.flush()
            os.fsync(file.fileno())
    except BaseException as problem:
        path.unlink(missing_ok=True)
        if isinstance(problem, OSError) and problem.filename is None:  # those of what is read name it
            advice = "Nothing was exported: make room, or name a file on another disk"
            raise Failure(f"{shown(path)} cannot be written: {problem.strerror}. {advice}.") from None
        raise
    size = path.stat().st_size
    if given.json:
        print(json.dumps({"file": str(path), "records": written, "bytes": size, "beside_cores": bool(beside)}))
    else:
        what = "sessions, turns, deliveries and usage, a line for each between a first line and a last one"
        print(f"{written} records were written to {shown(path)} ({readable(size)}), readable by you alone: {what}.")
        if beside:
            text = f"MoltBot runs meanwhile ({beside}), and what is said from now on is not in the file"
            print(f"moltbot: {text}: stop it and export again if the file is to be kept or moved.", file=sys.stderr)
    return int(Exit.OK)


async def _export(models: Models, file: BinaryIO, progress: Progress) -> tuple[int, str]:
    """Return how many records were written, and where cores ran meanwhile; empty for nowhere."""
    held = is_held(models.workspace)
    async with open_records(models.workspace, models.settings, held=held, make=False) as records:
        total = await records.count()
        written = await export(records, file, lambda written: progress.reach(min(written / max(total, 1), 1.0)))
    return written, shown(models.workspace.folder) if held else await _nodes(models)


async def _nodes(models: Models) -> str:
    """Return which cores use the Redis that is the store; empty where there is none, or it is none."""
    if models.settings.store.type != "redis":
        return ""
    from moltbot_server.store.redis_check import nodes_there  # late: only where Redis is the store

    async with open_redis(models.settings, fit=False) as store:
        return ", ".join((await nodes_there(store)).values())


@told
def import_store(given: argparse.Namespace) -> int:
    """Put what a file holds into the store; return the exit status."""
    models, path = Models.of(given), given.file
    models.workspace.read_key()  # raises where there is no workspace
    try:
        check_file(path)
        with Progress("Importing", total=max(2, path.stat().st_size), quiet=given.json) as progress:
            read, new = asyncio.run(_import(models, path, progress.advance, merge=given.merge))
    except NotMovable as problem:
        raise Failure(f"{shown(path)} cannot be imported: {problem}.") from None
    except FileNotFoundError:
        raise Failure(f"there is no file {shown(path)}.", Exit.USAGE) from None
    except OSError as error:
        raise Failure(f"{shown(path)} cannot be read: {error.strerror}.") from None
    left = _left_behind(models)
    if given.json:
        print(json.dumps({"file": str(path), "records": read, "new": new, "left_behind": left and str(left)}))
    else:
        there = f", {read - new} were there already" if read > new else ""
        print(f"{new} of {read} records were imported{there}.")
        if left is not None:
            print(f"{shown(left)} stays behind: it is not used any more, gets old, and may be moved away.")
    return int(Exit.OK)


def _left_behind(models: Models) -> Path | None:
    """Return the database that a workspace has and does not use, because its store is elsewhere; None without one."""
    database = models.workspace.database
    return database if models.settings.store.type != "sqlite" and database.exists() else None


async def _import(models: Models, path: Path, progress: Callable[[int], None], *, merge: bool) -> tuple[int, int]:
    workspace, settings = models.workspace, models.settings
    held = is_held(workspace)
    if held:
        raise Failure(f"MoltBot runs in {shown(workspace.folder)}: stop it first.", Exit.UNAVAILABLE)
    if running := await _nodes(models):
        raise Failure(f"cores use this Redis ({running}): stop them first.", Exit.UNAVAILABLE)
    async with open_records(workspace, settings, held=held, make=True) as records:
        if merge or not await records.count():
            return await take_in(records, path, progress)
    raise Failure(_not_empty(models, path))  # after it was closed: some files are there only while it is open


def _not_empty(models: Models, path: Path) -> str:
    """Return what is said of a store that has something already: what is usually meant, then how to add to it."""
    store, database = models.settings.store, models.workspace.database
    if store.type == "redis":
        told = (
            f"Redis at {store.host}:{store.port} has records under the prefix {store.prefix}. If they are from before, "
            "import into an empty Redis, or name another store.prefix"
        )
    else:
        files = ", ".join(sorted(file.name for file in database.parent.glob(f"{database.name}*")))
        told = f"{shown(database)} has records. If they are from before, move it away ({files}) and import again"
    again = command(f"store import {typed(path)} --merge", models.workspace)
    return (
        f"the store is not empty: {told}. `{again}` adds what is missing, also to an import that broke off, and leaves "
        "what is there: what was deleted elsewhere since stays, and usage that both have keeps the figures that are "
        "there."
    )
