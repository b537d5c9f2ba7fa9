"""How a model uses the processors: replicas, threads, batches and number type, as measured on this machine.

What was measured stands in one small file of the workspace, `tuning.json`. It holds only for what it was measured
with: the same weights, processor, number of usable processors and version of CTranslate2. Otherwise the default stands.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import msgspec

from moltbot_server.models.cpus import MOST_REPLICAS, processor_name, usable_cores, usable_cpus
from moltbot_server.turns import Value
from moltbot_server.workspace import Workspace

_log = logging.getLogger(__name__)

COMPUTE_TYPES = (
    "default",
    "auto",
    "int8",
    "int8_float32",
    "int8_float16",
    "int8_bfloat16",
    "int16",
    "float16",
    "bfloat16",
    "float32",
)
"""What CTranslate2 may compute in; `default` is the type that the weights were saved in."""

MOST_THREADS = 256
MOST_ROWS = 256
_SMALL = 16 << 20
_MANY_REPLICAS = 8  # beyond it a replica of more threads answers a lone question sooner
_MOST_KEPT = 100
_LARGEST_FILE = 1 << 20

ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}
"""What a process that runs a model wants in its environment from its very start, unless it is set there already.

Threads that wait for each other then sleep instead of spinning. Measured on 4 processors that others used too, with
replicas of 2 threads, tokens/s: 634 (453 to 648) so, 713 (72 to 756) without it, 199 (190 to 374) with ACTIVE.
"""


class Tuning(Value, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a model uses the machine.

    `replicas` write a batch each at the same time and share the weights, each computes on `threads` processors, and
    `batch` is the most rows of a batch. `compute_type` is one of `COMPUTE_TYPES`.

    Raises:
        ValueError: a number is out of its bounds, or there is no such type.
    """

    replicas: int = 1
    threads: int = 1
    batch: int = 8
    compute_type: str = "default"

    def __post_init__(self) -> None:
        for name, most in (("replicas", MOST_REPLICAS), ("threads", MOST_THREADS), ("batch", MOST_ROWS)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 to {most}")
        if self.compute_type not in COMPUTE_TYPES:
            raise ValueError(f"compute_type is {self.compute_type!r}; expected one of {', '.join(COMPUTE_TYPES)}")

    @property
    def processors(self) -> int:
        """How many processors the model keeps busy at most."""
        return self.replicas * self.threads


class Measured(Value, frozen=True, kw_only=True):
    """What was found best for one model, and what it was measured with.

    `model` is a name for people; `weights` tells models apart. `tokens_per_second` is that of `streams` at a time.
    """

    model: str
    weights: str
    processor: str
    processors: int
    ctranslate2: str
    date: str
    tuning: Tuning
    tokens_per_second: float = 0.0
    streams: int = 0


class _File(Value, frozen=True, kw_only=True):
    """What stands in `tuning.json`."""

    version: int = 1
    measured: tuple[Measured, ...] = ()


def default_tuning(cpus: int, weights: int = 0, cores: int = 0) -> Tuning:
    """Return what fits a machine of so many usable processors, and weights of so many bytes, with nothing measured.

    `cores` are those that compute by themselves, 0 for all. One processor stays with the server and with whatever else
    runs. A model of a few megabytes writes faster than one event loop can read, so more replicas than half of the
    processors only take time away from it.

    Measured with the built-in model and 16 streams, tokens/s and median first token, medians of five runs on a busy
    machine: on 2 processors 1 replica 8,700 and 51 ms, 2 replicas 9,400 and 19 ms; on 4 processors 2 replicas 12,700
    and 13 ms, 3 replicas 10,200 and 13 ms, 4 replicas 10,500 and 12 ms. So half of the processors stay with the event
    loop, which must read every token, and with whatever else runs; but two processors have two replicas.
    """
    if weights < _SMALL:
        return Tuning(replicas=min(4, max(cpus // 2, min(cpus, 2))))
    left = max(1, min(cpus - 1, cores or cpus))
    threads = min(-(-left // _MANY_REPLICAS), MOST_THREADS)
    return Tuning(replicas=min(left // threads, MOST_REPLICAS), threads=threads)


def tuning_for(workspace: Workspace | None, folder: Path, threads: int = 0) -> Tuning:
    """Return how the model in a folder is to use this machine.

    `threads`, where a configuration sets it, goes before all: so many replicas of one thread. Otherwise what
    `moltbot model tune` measured here, kept in the workspace, and else the default.
    """
    if threads:
        return Tuning(replicas=min(threads, MOST_REPLICAS))
    measured = None if workspace is None else measured_here(workspace, folder)
    if measured is not None:
        return measured.tuning
    weights = 0
    with contextlib.suppress(OSError):  # who loads the folder will say what is wrong with it
        weights = (folder / "model.bin").stat().st_size
    return default_tuning(usable_cpus(), weights, usable_cores())


def measured_here(workspace: Workspace, folder: Path) -> Measured | None:
    """Return what was measured with the model in a folder on a machine like this one; None when nothing was."""
    with contextlib.suppress(OSError):
        now = _conditions(folder)
        return next((kept for kept in _read(workspace).measured if _conditions_of(kept) == now), None)
    return None


def keep_tuning(
    workspace: Workspace, folder: Path, model: str, tuning: Tuning, *, tokens_per_second: float = 0.0, streams: int = 0
) -> Measured:
    """Write down what was found best for the model in a folder, in the place of what was found before.

    Raises:
        OSError: the weights cannot be read or the workspace cannot be written.
    """
    weights, processor, processors, ctranslate2 = _conditions(folder)
    found = Measured(
        model=model,
        weights=weights,
        processor=processor,
        processors=processors,
        ctranslate2=ctranslate2,
        date=time.strftime("%Y-%m-%d"),
        tuning=tuning,
        tokens_per_second=tokens_per_second,
        streams=streams,
    )
    with _changing(workspace):
        others = [kept for kept in _read(workspace).measured if _conditions_of(kept) != _conditions_of(found)]
        _write(workspace, _File(measured=(found, *others[: _MOST_KEPT - 1])))
    return found


def _conditions(folder: Path) -> tuple[str, str, int, str]:
    """Return what a measurement of the model in a folder holds for.

    Raises:
        OSError: there are no weights in the folder.
    """
    weights = (folder / "model.bin").stat()
    identity = hashlib.sha256(f"{weights.st_size} {weights.st_mtime_ns}".encode("ascii")).hexdigest()[:16]
    return identity, processor_name(), usable_cpus(), version("ctranslate2")


def _conditions_of(kept: Measured) -> tuple[str, str, int, str]:
    return kept.weights, kept.processor, kept.processors, kept.ctranslate2


def _place(workspace: Workspace) -> Path:
    return workspace.tuning_file


def _read(workspace: Workspace) -> _File:
    """Return what is kept; nothing where there is no file, or one that is not ours: to measure again mends it."""
    place = _place(workspace)
    try:
        with place.open("rb") as file:
            return msgspec.json.decode(file.read(_LARGEST_FILE), type=_File)
    except FileNotFoundError:
        return _File()
    except (OSError, msgspec.DecodeError) as problem:
        _log.warning("a tuning cannot be read; the default is used", extra={"file": str(place), "error": str(problem)})
        return _File()


def _write(workspace: Workspace, content: _File) -> None:
    place = _place(workspace)
    draft = place.with_name(f".{place.name}.draft")  # one writer at a time: the lock is held
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(place)


@contextlib.contextmanager
def _changing(workspace: Workspace) -> Iterator[None]:
    """Hold the file against other writers."""
    lock = os.open(workspace.folder / ".tuning.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
