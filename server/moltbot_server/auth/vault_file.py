"""Private files: read only when nobody else can, written whole or not at all, changed by one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from moltbot_server.workspace import WorkspaceError

_LARGEST = 4 << 20


class VaultError(WorkspaceError):
    """The vault cannot be used; the text says why and what to do, and holds no secret."""


def read_private(path: Path, *, linked: bool = False) -> bytes | None:
    """Return a file's content, None when there is no such file. `linked` follows links, as mounted secrets are.

    Raises:
        VaultError: others can read it, it belongs to somebody else, or it cannot be read.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if linked else os.O_NOFOLLOW)
    try:
        with os.fdopen(os.open(path, flags), "rb") as file:
            found = os.fstat(file.fileno())
            _check(path, found)
            content = file.read(_LARGEST + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise VaultError(f"{path} cannot be read: {error.strerror}.") from None
    if len(content) > _LARGEST:
        raise VaultError(f"{path} is over 4 MiB and no file of the vault; put the right one back.")
    return content


def _check(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise VaultError(f"{path} is no file; put the right one back.")
    if found.st_uid not in (os.geteuid(), 0):
        raise VaultError(f"{path} belongs to another user; take it over with chown, or choose another workspace.")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise VaultError(
            f"{path} can be read by other users of this machine: run `chmod 600 {path}`. If others may have read it, "
            "make new keys at the providers, and a new master key with `moltbot key rotate-master`."
        )


def write_private(path: Path, content: bytes) -> None:
    """Put a file in the place of what was there, readable by its owner alone: a reader finds the old or the new.

    Raises:
        VaultError: it cannot be written; the old one is as it was.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        draft.replace(path)
        settle(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise VaultError(f"{path} cannot be written: {error.strerror}.") from None


def settle(folder: Path) -> None:
    """Bring the names in a folder to the disk.

    Raises:
        OSError: the folder cannot be opened.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep other processes from changing what a lock file stands for.

    Raises:
        VaultError: the lock file cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise VaultError(f"{path} cannot be opened: {error.strerror}.") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
