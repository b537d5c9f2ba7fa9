"""Who has a database open: a core by itself, several workers, or a command; a lock vouches for it.

The system takes the lock away when a process ends, however it ends: none is left behind by a crash.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path

from moltbot_server.errors import StorageUnavailable

_PATIENCE = 2.0
"""Seconds for which a process that has just been killed may still be there."""
_LOOK_EVERY = 0.05
_WORKERS = "several workers"


class DatabaseLock:
    """The right to open a database: of one process `alone`, or of several that know of each other."""

    def __init__(self, database: Path, *, alone: bool) -> None:
        """The lock is a file of the folder `run` beside the database; it is made when it is taken."""
        self._database = database
        self._file = database.parent / "run" / f"{database.name}.lock"
        self._alone = alone
        self._held: int | None = None

    def take(self) -> None:
        """Have the lock until `release`, or until this process ends. Waits a moment for one that is ending.

        Raises:
            StorageUnavailable: somebody else has the database open.
            OSError: the file cannot be used.
        """
        self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._wait(descriptor)
            # For people; on a full disk nobody is named.
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, (f"process {os.getpid()}" if self._alone else _WORKERS).encode(), 0)
        except BaseException:
            os.close(descriptor)
            raise
        self._held = descriptor

    def is_held(self) -> bool:
        """Return whether anybody has the database open."""
        try:
            with self._file.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def release(self) -> None:
        """Let others open the database."""
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def _wait(self, descriptor: int) -> None:
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(descriptor, (fcntl.LOCK_EX if self._alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise self._refusal(os.pread(descriptor, 100, 0).decode("utf-8", "replace")) from None
                time.sleep(_LOOK_EVERY)  # a lock that ends is announced to nobody who does not want it at any price
            else:
                return

    def _refusal(self, holder: str) -> StorageUnavailable:
        advice = (
            "stop that one first. Several cores beside each other: `WORKERS` of `moltbot start`, or store.type: redis"
        )
        text = f"{self._database} is in use already, by {holder or 'another process'}: {advice}"
        return StorageUnavailable(text, retry_after=1.0)
