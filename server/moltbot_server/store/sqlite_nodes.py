"""Which processes share a SQLite file: each has a file with its address, and a lock on it that ends with the process.

A lock that can be had says that a node is gone, and nothing else: what it may still write is decided by the epoch of
each turn. The system takes the lock away when a process ends, however it ends, so nobody has to wait for that.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Collection, Iterable
from pathlib import Path

_PEN = "pen"


class SqliteNodes:
    """The nodes of a file, and this one among them.

    Without an `address` this node is the only one, for which `DatabaseLock` cares: all others are gone.
    """

    def __init__(self, folder: Path, *, address: str = "") -> None:
        """`folder` holds the files of the nodes; it is made when the first one joins."""
        self.node = secrets.token_hex(8)
        self.address = address
        self._folder = folder
        self._held: int | None = None

    @property
    def shared(self) -> bool:
        """Whether there may be other nodes."""
        return bool(self.address)

    def join(self) -> None:
        """Be among the nodes until `leave`, or until this process ends.

        Raises:
            OSError: the folder cannot be used.
        """
        if not self.shared or self._held is not None:
            return
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # It is locked before it has its name: nobody finds a node that is there without its lock.
        draft = self._folder / f".{self.node}"
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.write(descriptor, self.address.encode())
            draft.rename(self._folder / self.node)
        except OSError:
            draft.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        self._held = descriptor

    def leave(self) -> None:
        """Be gone: what this node still has of turns is anybody's. Its file is struck by whoever has looked there."""
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def address_of(self, node: str) -> str:
        """Return the address of a node; empty when it is gone, or was never there."""
        if node == self.node:
            return self.address
        if not node or not self.shared or self._is_gone(node):
            return ""
        try:
            return (self._folder / node).read_text()
        except OSError:
            return ""  # it has just been struck

    def gone(self, nodes: Iterable[str]) -> Collection[str]:
        """Return those of some nodes that are gone; a name that nobody has ever had is."""
        return {node for node in nodes if node != self.node and (not self.shared or self._is_gone(node))}

    def left(self) -> Collection[str]:
        """Return the nodes that are gone and not struck yet: those whose turns nobody may have taken."""
        return {node for node in self._known() if node != self.node and self._is_gone(node)}

    def strike(self, nodes: Iterable[str]) -> None:
        """Let nodes that are gone be known no more: what they had is taken."""
        for node in nodes:
            (self._folder / node).unlink(missing_ok=True)

    def _known(self) -> Collection[str]:
        try:
            return [name for name in os.listdir(self._folder) if not name.startswith(".")]  # those are drafts
        except FileNotFoundError:
            return ()

    def _is_gone(self, node: str) -> bool:
        try:
            descriptor = os.open(self._folder / node, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            # Shared: two that look at the same time do not take each other for the one they look for.
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        return True


class Pen:
    """What only the process that holds it writes with; those that wait have it in the order in which they came.

    SQLite by itself would let them look again and again, at growing distances, and whoever comes at the right moment
    goes first.
    """

    def __init__(self, folder: Path) -> None:
        """Open the pen of a folder, which is there; it is nobody's until it is taken."""
        self._descriptor = os.open(folder / _PEN, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def __enter__(self) -> None:
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Close the file; who holds the pen lets go of it."""
        os.close(self._descriptor)
