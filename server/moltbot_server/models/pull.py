"""A pull: the files of a repository that are of use, fetched at the same time, taken up again, and each one checked."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

from moltbot_server.models.hub import Backoff, Hub, HubError, HubFile, Listing, Unsteady
from moltbot_server.models.sizes import readable
from moltbot_server.turns import Value

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")

_AT_ONCE = 4
_MOST_FILES = 2000
_LARGEST = 1 << 42
_LONGEST_PATH = 512
_LONGEST_NAME = 200
_DEEPEST = 6
_BLOCK = 1 << 20
_ROOM = 64 << 20  # what a disk should have left, so that the database of the workspace can be written


class Weights(StrEnum):
    """What kind of weights a repository holds, by what can be done with them here."""

    CTRANSLATE2 = "CTranslate2 weights"
    SAFETENSORS = "safetensors weights"
    PYTORCH = "PyTorch weights"
    GGUF = "weights for llama.cpp (GGUF)"
    ONNX = "weights for ONNX Runtime"
    OTHER = "no weights that are known here"

    @property
    def convertible(self) -> bool:
        """Whether `moltbot model convert` can make a model of them."""
        return self in (Weights.SAFETENSORS, Weights.PYTORCH)


class Selection(Value, frozen=True, kw_only=True):
    """The files that are worth fetching, and what they are."""

    weights: Weights
    files: tuple[HubFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


class Meter(Protocol):
    """Who watches a pull."""

    def advance(self, count: int) -> None:
        """Hear that so many more bytes are here; fewer than 0 when some had to be thrown away."""

    def note(self, text: str) -> None:
        """Hear of something that a person who waits should know, such as a broken connection."""


def check_files(files: Sequence[HubFile]) -> None:
    """Refuse a list whose files could land anywhere but in their folder, or that is beyond all measure.

    Raises:
        HubError: so it is; nothing of it should be fetched.
    """
    if len(files) > _MOST_FILES:
        raise HubError(f"The repository has {len(files)} files; more than {_MOST_FILES} are no model.")
    seen: set[str] = set()
    for file in files:
        parts = file.path.split("/")
        good = len(file.path) <= _LONGEST_PATH and len(parts) <= _DEEPEST and all(map(_is_plain, parts))
        if not good:
            raise HubError(
                f"The repository has a file named {file.path[:80]!r}, which is not safe; nothing was fetched."
            )
        if not 0 <= file.size <= _LARGEST:
            raise HubError(f"The repository has a file of {file.size} bytes, which cannot be; nothing was fetched.")
        # Two names that differ by case only are one file on some disks.
        if (name := file.path.casefold()) in seen:
            raise HubError(f"The repository has two files named {file.path!r}; nothing was fetched.")
        seen.add(name)
    for name in seen:
        if any(name[:end] in seen for end, letter in enumerate(name) if letter == "/"):
            raise HubError(f"The repository has {name!r} inside a file; nothing was fetched.")


def _is_plain(name: str) -> bool:
    try:
        short = len(name.encode()) <= _LONGEST_NAME
    except UnicodeEncodeError:
        return False
    return short and name not in ("", ".", "..") and name.isprintable() and not set(name) & {"\\", ":"}


def select(files: Sequence[HubFile], include: Sequence[str] = ()) -> Selection:
    """Choose what a model needs: its weights in the best form that is there, and what is told around them.

    `include` are patterns, such as `*.json`, that choose by name instead.
    """
    names = {file.path for file in files}
    weights = _weights(names)
    if include:
        chosen = [file for file in files if any(fnmatch(file.path, pattern) for pattern in include)]
    else:
        # Some repositories have their weights twice, whole and in parts.
        twice = any(fnmatch(name, "model*.safetensors") for name in names)
        chosen = [file for file in files if _is_wanted(file.path, weights, twice)]
    return Selection(weights=weights, files=tuple(sorted(chosen, key=lambda file: file.path)))


_FORMS = {
    Weights.SAFETENSORS: ("*.safetensors", "*.safetensors.index.json"),
    Weights.PYTORCH: ("pytorch_model*.bin", "pytorch_model*.bin.index.json"),
    Weights.GGUF: ("*.gguf",),
    Weights.ONNX: ("*.onnx", "*.onnx_data"),
    Weights.OTHER: ("*.h5", "*.msgpack", "*.ot", "*.pt", "*.pth", "*.npz", "*.tflite", "*.mlmodel", "*.nemo", "*.ckpt"),
}
_ABOUT = ("*.json", "*.txt", "*.model", "*.yaml", "*.jinja", "*.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def _weights(names: set[str]) -> Weights:
    if "model.bin" in names and any(fnmatch(name, "*vocabulary.*") for name in names):
        return Weights.CTRANSLATE2
    top = {name for name in names if "/" not in name}
    return next((form for form, patterns in _FORMS.items() if any(fnmatch(n, patterns[0]) for n in top)), Weights.OTHER)


def _is_wanted(name: str, weights: Weights, twice: bool) -> bool:
    if "/" in name:
        return fnmatch(name, "*_Pooling/config.json")  # how an embedding model makes one vector of many
    if name == "model.bin":
        return weights is Weights.CTRANSLATE2
    form = next((form for form, patterns in _FORMS.items() if any(fnmatch(name, each) for each in patterns)), None)
    if form is not None:
        return form is weights and not (twice and fnmatch(name, "consolidated*"))
    return any(fnmatch(name, pattern) for pattern in _ABOUT)


class Pull:
    """Fetches chosen files of a repository into a folder. What is there already is checked and not fetched again."""

    def __init__(self, hub: Hub, listing: Listing, files: Sequence[HubFile], folder: Path, meter: Meter) -> None:
        """Take what to fetch.

        Raises:
            HubError: a name of the listing is not safe.
        """
        check_files(listing.files)
        self._hub = hub
        self._listing = listing
        self._files = sorted(files, key=lambda file: -file.size)  # so that the largest is not the last one alone
        self._folder = folder
        self._meter = meter
        self._free = asyncio.Semaphore(_AT_ONCE)

    async def run(self) -> None:
        """Fetch everything. What is here when it breaks off is kept, and used by the next pull into the folder.

        Raises:
            HubError: a file cannot be had, came wrong twice, or the disk has no room.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        with _only_one(self._folder):
            self._check_room()
            try:
                async with asyncio.TaskGroup() as group:
                    for file in self._files:
                        group.create_task(self._fetch(file))
            except BaseExceptionGroup as problems:
                raise _first(problems) from None
            await asyncio.to_thread(self._clear_strays)

    def _check_room(self) -> None:
        here = sum(min(_size(self._folder / file.path), file.size) for file in self._files)
        needed = sum(file.size for file in self._files) - here
        free = shutil.disk_usage(self._folder).free
        if needed + _ROOM > free:
            raise HubError(
                f"{readable(needed)} are still to be fetched and {readable(free)} are free where {self._folder} lies; "
                "make room, or use a workspace on another disk."
            )

    async def _fetch(self, file: HubFile) -> None:
        async with self._free:
            growing = _Growing(self._folder / file.path, file, self._meter.advance)
            backoff = Backoff(self._hub.patience, self._hub.patience.tries, self._meter.note)
            wrong = 0
            try:
                await _in_thread(growing.open)
                while not await _in_thread(growing.is_right):
                    if growing.is_whole:
                        wrong += 1
                        await _in_thread(growing.restart)
                        if wrong > 1:
                            raise HubError(
                                f"{file.path} of {self._listing.source} came twice with a wrong checksum; what came is "
                                "thrown away. Something between here and the hub spoils it: try another network or hub."
                            )
                        self._meter.note(f"{file.path} came with a wrong checksum; it is fetched again.")
                    had = growing.length
                    try:
                        await self._continue(file, growing)
                    except Unsteady as problem:
                        if growing.length > had:
                            backoff.reset()
                        await backoff.wait(problem)
            except OSError as problem:
                raise HubError(f"{self._folder / file.path} cannot be written: {problem.strerror}.") from None
            finally:
                await _in_thread(growing.close)

    async def _continue(self, file: HubFile, growing: _Growing) -> None:
        """Fetch the rest of a file.

        Raises:
            Unsteady: it broke off; some of it may have come.
        """
        async with self._hub.open(self._listing, file, growing.length) as opened:
            if opened.start != growing.length:
                await _in_thread(growing.restart)
            growing.expect(opened.sha256, opened.git_sha1)
            async for piece in opened.pieces:
                await _in_thread(growing.write, piece)
        if growing.length < file.size:
            raise Unsteady(f"{file.path} broke off after {readable(growing.length)} of {readable(file.size)}.")

    def _clear_strays(self) -> None:
        """Remove what an earlier pull, of another commit perhaps, has left and this one does not name."""
        wanted = {file.path for file in self._files}
        for path in sorted(self._folder.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path.relative_to(self._folder).as_posix() not in wanted:
                path.unlink()


class _Growing:
    """A file that grows at its end, with its digests. Its methods belong to one thread at a time."""

    def __init__(self, path: Path, file: HubFile, advance: Callable[[int], None]) -> None:
        self._path = path
        self._size = file.size
        self._sha256, self._git_sha1 = file.sha256, file.git_sha1
        self._advance = advance
        self._descriptor = -1
        self.length = 0
        self._digests = self._fresh()

    def _fresh(self) -> tuple[Any, Any]:
        return hashlib.sha256(), hashlib.sha1(b"blob %d\0" % self._size, usedforsecurity=False)

    @property
    def is_whole(self) -> bool:
        """Whether all bytes are here and there is a digest to compare with."""
        return self.length == self._size and bool(self._sha256 or self._git_sha1)

    def open(self) -> None:
        """Open the file and read what is in it already."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(self._path, flags, 0o644)
        if os.fstat(self._descriptor).st_size > self._size:
            os.ftruncate(self._descriptor, 0)
        while block := os.read(self._descriptor, _BLOCK):
            self._take(block)

    def expect(self, sha256: str, git_sha1: str) -> None:
        """Take the digests that came with the content, where the list had none.

        Raises:
            HubError: there are none at all.
        """
        if not self._sha256 and not self._git_sha1:
            self._sha256, self._git_sha1 = sha256, git_sha1
        if not self._sha256 and not self._git_sha1:
            raise HubError(
                f"The hub gives no checksum for {self._path.name}, so nobody could tell whether it is right."
            )

    def write(self, piece: bytes) -> None:
        """Add to the end.

        Raises:
            Unsteady: it is more than the file has.
        """
        if self.length + len(piece) > self._size:
            self.restart()
            raise Unsteady(f"More came of {self._path.name} than it has.")
        rest = memoryview(piece)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        self._take(piece)

    def restart(self) -> None:
        """Throw away what is here."""
        os.ftruncate(self._descriptor, 0)
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        self._advance(-self.length)
        self.length, self._digests = 0, self._fresh()

    def is_right(self) -> bool:
        """Return whether the file is whole and has its digest; then it is on the disk."""
        if not self.is_whole:
            return False
        sha256, sha1 = (digest.hexdigest() for digest in self._digests)
        if (sha256 != self._sha256) if self._sha256 else (sha1 != self._git_sha1):
            return False
        os.fsync(self._descriptor)
        return True

    def close(self) -> None:
        """Close the file; what is in it stays."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _take(self, block: bytes) -> None:
        for digest in self._digests if not self._sha256 else self._digests[:1]:
            digest.update(block)
        self.length += len(block)
        self._advance(len(block))


async def _in_thread(work: Callable[_Given, _Result], *given: _Given.args, **named: _Given.kwargs) -> _Result:
    """Run a step in a thread and see it end even when this task is cancelled: a file has one owner at a time."""
    step = asyncio.ensure_future(asyncio.to_thread(work, *given, **named))
    try:
        return await asyncio.shield(step)
    except asyncio.CancelledError:
        await asyncio.wait({step})
        raise


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Hold a folder against another pull into it.

    Raises:
        HubError: another one is under way.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HubError(f"Another pull into {folder} is under way; wait for it, or choose another name.") from None
        yield
    finally:
        os.close(descriptor)


def _first(problems: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return one problem of a group, one that was told in words if there is any."""
    told, _ = problems.split(HubError)
    found: BaseException = told or problems
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0
