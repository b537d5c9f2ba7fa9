"""The database of a world: it outlives its cores, takes its time, refuses, and forgets what was not synced."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import moltbot_server.store.sqlite_schema as sqlite_schema
from moltbot_server.store.writer import GroupWriter
from simulated_world import SimulatedLoop, World


class Node(Protocol):
    """A process that has work for the disk."""

    world: World
    loop: SimulatedLoop
    pending: dict[Callable[[], None], Callable[[], Any]]
    on_go_on: list[Callable[[], None]]


class Orders:
    """Takes the groups that a thread of the store is handed, to the disk."""

    def __init__(self) -> None:
        self.bound: tuple[Disk, Node, Any] | None = None

    def put(self, group: list[Any] | None) -> None:
        """Have a group carried out."""
        if group is not None:
            assert self.bound is not None
            disk, node, thread = self.bound
            disk.order(node, thread, group)


class _Refusing:
    """A connection whose commits fail, as those on a full or broken disk; a statement by itself is one."""

    def __init__(self, connection: sqlite3.Connection, name: str) -> None:
        self._connection, self._name = connection, name

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open."""
        return self._connection.in_transaction

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        """Run a statement, unless it is a commit."""
        if statement == "COMMIT" or not (self._connection.in_transaction or statement.startswith("BEGIN")):
            error = sqlite3.OperationalError("no")
            error.sqlite_errorname = self._name
            raise error
        return self._connection.execute(statement, *values)

    def executemany(self, statement: str, rows: Any) -> sqlite3.Cursor:
        """Run a statement for each row."""
        return self._connection.executemany(statement, rows)


class Disk:
    """The database, which outlives its cores. One serves many worlds, one after the other."""

    def __init__(self) -> None:
        self.connection = sqlite3.connect(":memory:", isolation_level=None)
        self.connection.executescript(sqlite_schema.SCHEMA)
        names = self.connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        self._tables = [name for (name,) in names if not name.startswith("sqlite_")]
        self._synced: bytes | None = None
        self._keeps_copies = False
        self.refusals = 0.0
        self.folder = Path(tempfile.mkdtemp(prefix="moltbot-simulation-", dir=_memory()))
        """Where nodes keep what their turns record: real files."""

    def close(self) -> None:
        """Be no more."""
        self.connection.close()
        shutil.rmtree(self.folder)

    def clear(self, *, may_lose_power: bool, refusals: float) -> None:
        """Become empty. `refusals`: how probable it is that a group fails."""
        self.connection.execute("BEGIN")
        for table in self._tables:
            self.connection.execute(f"DELETE FROM {table}")
        self.connection.execute("COMMIT")
        self._keeps_copies, self.refusals = may_lose_power, refusals
        self._synced = self.connection.serialize() if may_lose_power else None
        for folder in self.folder.iterdir():
            shutil.rmtree(folder)

    def order(self, node: Node, thread: Any, group: list[Any]) -> None:
        """Carry a group out some time soon, and have the outcome told some time later."""
        world = node.world

        def work() -> None:
            if node.pending.pop(work, None) is None:
                return  # the process was killed meanwhile
            if node.loop.stopped:
                node.on_go_on.append(lambda: self.order(node, thread, group))
                return
            outcomes = self._carry_out(world, thread, group)
            world.soon(0.01, lambda: node.loop.call_soon(thread._answer, outcomes))

        node.pending[work] = lambda: self._carry_out(world, thread, group)
        world.soon(0.02, work)

    def _carry_out(self, world: World, thread: Any, group: list[Any]) -> Any:
        connection: Any = self.connection
        if self.refusals and world.random.random() < self.refusals:
            connection = _Refusing(connection, world.random.choice(("SQLITE_FULL", "SQLITE_IOERR_FSYNC")))
        outcomes = thread.carry_out(connection, group)
        if self._keeps_copies and isinstance(thread, GroupWriter):
            self._synced = self.connection.serialize()
        return outcomes

    def lose_power(self, world: World) -> None:
        """Forget what was not synced: of files that never are, some is there and some is not."""
        assert self._synced is not None
        self.connection.deserialize(self._synced)
        for path in sorted(self.folder.glob("*/*")):
            data = path.read_bytes()
            kept = world.random.randrange(len(data) + 1)
            path.write_bytes(data[:kept] + b"\0" * world.random.choice((0, len(data) - kept)))


def _memory() -> Path | None:
    """Return a folder that is in memory, if there is one."""
    return _SHARED if _SHARED.is_dir() else None


_SHARED = Path("/dev/shm")
