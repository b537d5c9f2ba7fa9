"""Where the nodes of a run keep their turns: in a SQLite file, for one core, or in a Redis that can be killed too."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sqlite3
from asyncio.subprocess import DEVNULL, Process
from collections import Counter
from pathlib import Path
from typing import Protocol

from fault_keeping import journal_entries
from moltbot_server.store import Store
from moltbot_server.store.protocol import KEEP_REQUESTS
from moltbot_server.store.sqlite import SqliteStore
from moltbot_server.store.sqlite_rows import IS_DELETED
from moltbot_server.testing import free_port

_ALWAYS_THERE = re.compile(
    r"moltbot:(schema|data|workspaces|nodes|left|node|connection|salt|owner)|\{moltbot:\w+\}:(accepted|days|used|added|nodes)"
)
_TOOLS = Path(__file__).parents[2] / ".tools" / "bin"


class Keeping(Protocol):
    """A place for turns that several processes reach."""

    @property
    def environ(self) -> dict[str, str]:
        """What nodes have to know of it."""

    async def start(self) -> None:
        """Make it reachable."""

    async def kill(self) -> None:
        """End it at once, as far as that can be done."""

    def store(self) -> Store:
        """Return the store, not open yet."""

    def left(self) -> int:
        """Return how many entries of journals are there still."""

    async def counts(self) -> dict[str, int]:
        """Return how much is kept of each kind, but for what a store has without any turn, and for usage."""


_ONLY_AN_ID = f"{IS_DELETED} AND digest = x'' AND question = x'90' AND coalesce(answer, events, rest) IS NULL"
"""Rows that are there to be for a day: of a deleted turn its request_id alone."""


class FileKeeping:
    """A file; there is nothing to start and nothing to kill."""

    environ: dict[str, str]

    def __init__(self, folder: Path) -> None:
        self.environ = {}
        self._path = folder / "moltbot.db"

    async def start(self) -> None:
        """Do nothing."""

    async def kill(self) -> None:
        """Do nothing."""

    def store(self) -> Store:
        """Return the store in the workspace."""
        return SqliteStore(self._path)

    def left(self) -> int:
        """Return how many entries of journals the file and those beside it have."""
        return journal_entries(self._path)

    async def counts(self) -> dict[str, int]:
        """Return the rows of each table."""
        connection = sqlite3.connect(f"file:{self._path}?mode=ro", uri=True)
        try:
            tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            counted = {name: f"SELECT count(*) FROM {name}" for name in tables}
            counted["turns"] += f" WHERE NOT ({_ONLY_AN_ID})"
            return {
                f"rows of {name}": int(connection.execute(query).fetchone()[0])
                for name, query in counted.items()
                if not name.startswith(("sqlite_", "usage"))
            }
        finally:
            connection.close()


def redis_program() -> str | None:
    """Return the path of redis-server; None where it is not installed."""
    return shutil.which("redis-server", path=f"{_TOOLS}{os.pathsep}{os.environ['PATH']}")


class RedisKeeping:
    """A `redis-server` that writes everything down before it answers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "redis"
        self._folder.mkdir()
        self._port = free_port()
        self._process: Process | None = None
        self.environ = {"MOLTBOT_STORE_TYPE": "redis", "MOLTBOT_STORE_PORT": str(self._port)}

    async def start(self) -> None:
        """Start it and wait until it listens.

        Raises:
            FileNotFoundError: redis-server is not installed.
        """
        program = redis_program()
        if program is None:
            raise FileNotFoundError("redis-server is not installed: type  scripts/tools redis")
        keeping = ("--save", "", "--appendonly", "yes", "--appendfsync", "always")
        self._process = await asyncio.create_subprocess_exec(
            *(program, "--port", str(self._port), "--bind", "127.0.0.1", "--dir", str(self._folder), *keeping),
            stdin=DEVNULL,
            stdout=DEVNULL,
            stderr=DEVNULL,
        )
        async with asyncio.timeout(30):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", self._port)
                except ConnectionRefusedError:
                    await asyncio.sleep(0.01)  # nobody announces it
                else:
                    writer.close()
                    return

    async def kill(self) -> None:
        """End it at once."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    def store(self) -> Store:
        """Return the store in this Redis."""
        # Late: only runs with Redis need its client.
        from moltbot_server.store.redis import RedisStore

        return RedisStore(host="127.0.0.1", port=self._port)

    def left(self) -> int:
        """Return 0: it is not looked for here."""
        return 0

    async def counts(self) -> dict[str, int]:
        """Return the keys of each kind."""
        from redis.asyncio import Redis

        found, cursor = Counter[str](), -1
        async with Redis(host="127.0.0.1", port=self._port) as redis:
            while cursor:
                cursor, keys = await redis.scan(max(cursor, 0), count=1000)
                async with redis.pipeline(transaction=False) as asking:
                    for key in keys:
                        asking.ttl(key)
                    lives = await asking.execute()
                for key, life in zip(keys, lives, strict=True):
                    kind = re.sub(r":[^:]*\d[^:]*", "", key.decode())
                    ends = b"}:x:" in key and 0 < life <= KEEP_REQUESTS  # the request_id of a deleted turn
                    if not ends and not _ALWAYS_THERE.fullmatch(kind):
                        found[f"keys {kind}"] += 1
        return dict(found)


KINDS: dict[str, type[FileKeeping] | type[RedisKeeping]] = {"sqlite": FileKeeping, "redis": RedisKeeping}
