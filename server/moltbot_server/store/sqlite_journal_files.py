"""What turns under way have recorded, in files beside the database: a write that waits for nobody.

Each node appends to files of its own, in a folder that bears its name. What was appended survives the death of the
process; a power failure may take the latest of it, and readers are told so by a `reset`. Whoever takes a node's turns
over renames its folder first, so that the node knows, should it still be there, that what it writes counts no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import struct
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from moltbot_server.store.protocol import JournalEntry
from moltbot_server.turns import TurnKey, encode

log = logging.getLogger(__name__)

LARGEST = 1 << 20
"""Bytes after which a file is followed by another one: it is deleted when all turns that are in it have ended."""

_TAKEN = ".taken"
_HEAD = struct.Struct("<II")  # of each write: its length, and the CRC-32 of what follows
_entries = msgspec.msgpack.Decoder(tuple[JournalEntry, ...])


def folder_of(database: Path) -> Path:
    """Return the folder beside a database in which its nodes have theirs."""
    return database.with_name(f"{database.name}-turns")


class JournalFiles:
    """The files of one node, and the way to those of others."""

    def __init__(self, folder: Path, node: str) -> None:
        """`folder` holds the folders of all nodes. Nothing is made before `open`."""
        self._folder = folder
        self._own = folder / node
        self._epochs: dict[TurnKey, int] = {}
        self._refused: set[TurnKey] = set()
        self._files: list[_File] = []
        self._made = 0
        self._usable = False
        self._is_refused = False

    def __len__(self) -> int:
        """How many turns are under way."""
        return len(self._epochs)

    def open(self) -> None:
        """Make this node's folder, once: when it is gone, others have taken it.

        Raises:
            OSError: it cannot be made.
        """
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._own.mkdir(mode=0o700)
        self._usable = True

    def close(self) -> None:
        """Let the files go, and delete them unless there are turns that the next core is to carry on."""
        is_whole, self._usable = self._usable, False
        files, self._files = self._files, []
        for file in files:
            file.close()
        if is_whole and not self._epochs:
            shutil.rmtree(self._own, ignore_errors=True)

    def look(self) -> None:
        """Look whether others have this node's turns: its files are theirs then, and nothing more is done to them."""
        if self._usable and not self._own.is_dir():
            self._usable = False
            self._epochs.clear()

    # --- turns of this node -----------------------------------------------------------------------------------------

    def begin(self, key: TurnKey, epoch: int = 1) -> None:
        """Take note of a turn that is being stored, or was taken over: what it records may be appended."""
        if not self._usable:
            return
        self._refused.discard(key)
        is_new = key not in self._epochs
        self._epochs[key] = epoch
        if is_new and any(key in file.names for file in self._files):
            # A turn of this name was not stored, or its session was deleted: what it recorded is none of this one's.
            self.append([JournalEntry(key=key, events=(), epoch=epoch)])

    def end_soon(self, key: TurnKey) -> None:
        """Let go a turn that was not stored, unless it is begun again right now, in the place of another one."""
        self._refused.add(key)
        asyncio.get_running_loop().call_soon(self._end_refused)

    def _end_refused(self) -> None:
        while self._refused:
            self.end(self._refused.pop())

    def end(self, key: TurnKey) -> None:
        """Take note that nothing of a turn is needed any more: its end is stored, or the turn was not."""
        self._epochs.pop(key, None)
        if not self._usable:
            return
        for file in tuple(self._files):
            file.turns.discard(key)
            if not file.turns and file.size:
                self._empty(file)

    def append(self, entries: Sequence[JournalEntry]) -> bool:
        """Append entries; False where that cannot be done here, and the database has to say what becomes of them."""
        epochs = self._epochs
        if not self._usable or not all(epochs.get(entry.key) == entry.epoch for entry in entries):
            return False
        body = encode(entries)
        try:
            file = self._open_file()
            file.append(_HEAD.pack(len(body), zlib.crc32(body)) + body)
            file.path.stat()
        except OSError as problem:
            if not self._is_refused:  # once: there are many writes a second, and the log may be on that disk
                self._is_refused = True
                fields = {"problem": problem.strerror or str(problem)}
                log.warning("what turns record goes to the database", extra=fields)
            self.look()  # if it is but the disk, that may be well again
            return False
        self._is_refused = False
        for entry in entries:
            file.turns.add(entry.key)
            file.names.add(entry.key)
        return True

    def _open_file(self) -> _File:
        if not self._files or self._files[-1].size >= LARGEST:
            self._made += 1
            self._files.append(_File(self._own / str(self._made)))
        return self._files[-1]

    def _empty(self, file: _File) -> None:
        """Give up what a file holds: the last one is used again."""
        try:
            if file is self._files[-1]:
                file.cut(0)
                file.names.clear()
            else:
                self._files.remove(file)
                file.close()
                file.path.unlink(missing_ok=True)
        except OSError as problem:
            log.warning("what ended turns recorded stays", extra={"problem": problem.strerror or str(problem)})

    # --- turns of others --------------------------------------------------------------------------------------------

    def others(self) -> Collection[str]:
        """Return the nodes that have left something, or are there still."""
        return {node for node in _nodes(self._folder) if node != self._own.name}

    def take(self, node: str) -> Iterator[JournalEntry]:
        """Make what a node has appended this one's to read, and yield it in order. It appends no more from now on."""
        taken = self._folder / f"{node}{_TAKEN}"
        with contextlib.suppress(FileNotFoundError):
            (self._folder / node).rename(taken)
        yield from _read(taken)

    def forget(self, nodes: Iterable[str]) -> None:
        """Delete what was taken of nodes, and is in the database now."""
        for node in nodes:
            shutil.rmtree(self._folder / f"{node}{_TAKEN}", ignore_errors=True)


def recorded(folder: Path) -> Iterator[tuple[str, JournalEntry]]:
    """Yield what there is, with its node; nothing is changed."""
    for node in _nodes(folder):
        for place in (folder / f"{node}{_TAKEN}", folder / node):
            for entry in _read(place):
                yield node, entry


def broken(folder: Path) -> Iterator[tuple[Path, int]]:
    """Yield files of which the end cannot be read, and how many bytes that is; nothing is changed."""
    for node in _nodes(folder):
        for place in (folder / f"{node}{_TAKEN}", folder / node):
            for path, data in _contents(place):
                if left := len(data) - sum(_HEAD.size + len(body) for body in _bodies(data)):
                    yield path, left


class _File:
    """A file that is appended to: whole, or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self.turns: set[TurnKey] = set()
        """Those of which something is in it that is needed."""
        self.names: set[TurnKey] = set()
        """Those of which something is in it."""
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def append(self, data: bytes) -> None:
        written = 0
        try:
            written = os.write(self._descriptor, data)
        finally:
            if written != len(data):
                self.cut(self.size)  # nothing that comes behind half a write would be read
        if written != len(data):
            raise OSError("the disk took a part of it")
        self.size += written

    def cut(self, size: int) -> None:
        os.ftruncate(self._descriptor, size)
        self.size = size

    def close(self) -> None:
        os.close(self._descriptor)


def _nodes(folder: Path) -> Collection[str]:
    try:
        return sorted({name.removesuffix(_TAKEN) for name in os.listdir(folder)})
    except FileNotFoundError:
        return ()


def _read(place: Path) -> Iterator[JournalEntry]:
    """Yield the entries of one node, of each turn those alone that count: an empty one makes void what came before."""
    kept: dict[tuple[TurnKey, int], dict[int, JournalEntry]] = {}
    for _, data in _contents(place):
        for body in _bodies(data):
            try:
                entries = _entries.decode(body)
            except msgspec.MsgspecError:
                # Another release wrote it: what it would have said is told anew.
                log.warning("what a core that is gone recorded cannot be read", extra={"at": str(place)})
                continue
            for entry in entries:
                found = kept.setdefault((entry.key, entry.epoch), {})
                if entry.events:
                    found[entry.events[0].sequence] = entry
                else:
                    found.clear()
    for found in kept.values():
        yield from found.values()


def _contents(place: Path) -> Iterator[tuple[Path, bytes]]:
    try:
        names = os.listdir(place)
    except FileNotFoundError:
        return
    for name in sorted(names, key=int):
        with contextlib.suppress(FileNotFoundError):  # its node runs, and needs it no more
            path = place / name
            yield path, path.read_bytes()


def _bodies(data: bytes) -> Iterator[bytes]:
    """Yield what was written whole: behind what was not, as after a power failure, nothing is known."""
    place = 0
    while place + _HEAD.size <= len(data):
        length, checksum = _HEAD.unpack_from(data, place)
        body = data[place + _HEAD.size : place + _HEAD.size + length]
        if len(body) != length or zlib.crc32(body) != checksum:
            return
        yield body
        place += _HEAD.size + length
