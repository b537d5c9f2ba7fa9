"""How much memory is left for another model, and giving back what a freed one took."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

from moltbot_server.errors import ModelNotLoadable

_ROOM = 64 << 20  # for the answers being written and for what runs beside
_GROWTH = 1.25  # of weights on the disk: what is packed anew for the processor while a model is loaded


def available_memory(root: Path = Path("/")) -> int | None:
    """Return how many bytes this process could still take: of the machine, or of its control group. None: unknown."""
    found = [_of_machine(root / "proc/meminfo"), *_of_groups(root)]
    known = [bytes_ for bytes_ in found if bytes_ is not None]
    return max(0, min(known)) if known else None


def check_room(model: str, weights: int, available: int | None) -> None:
    """Refuse to load a model of so many bytes of weights where they would not fit beside what runs.

    Raises:
        ModelNotLoadable: with what it would take and what there is.
    """
    needed = int(weights * _GROWTH) + _ROOM
    if available is not None and needed > available:
        raise ModelNotLoadable(
            f"{model} would take about {needed >> 20} MB of memory and {available >> 20} MB are available; "
            "unload another model first, or use a smaller quantization."
        )


def give_back() -> None:
    """Free what only cycles still hold, and ask the allocator to return freed memory to the machine.

    A server's collector looks at old cycles seldom, and a model may be most of its memory.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _of_machine(meminfo: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in meminfo.read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _of_groups(root: Path) -> list[int | None]:
    """Return what each control group above this process leaves; version 2 and version 1 of the kernel's interface."""
    left: list[int | None] = []
    for folder, limit, usage in _groups(root):
        with contextlib.suppress(OSError, ValueError):
            most = (folder / limit).read_text("ascii").strip()
            if most != "max":
                left.append(int(most) - int((folder / usage).read_text("ascii")))
    return left


def _groups(root: Path) -> list[tuple[Path, str, str]]:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        lines = (root / "proc/self/cgroup").read_text("utf-8").splitlines()
        found = []
        for line in lines:
            _, controllers, path = line.split(":", 2)
            if not controllers:
                base, limit, usage = root / "sys/fs/cgroup", "memory.max", "memory.current"
            elif "memory" in controllers.split(","):
                base, limit, usage = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            else:
                continue
            folder = base / path.lstrip("/")
            # Inside a container the path may be the host's; the group's own files are then at the root.
            chain = [folder, *folder.parents[: len(folder.relative_to(base).parts)]] if folder.is_dir() else [base]
            found += [(place, limit, usage) for place in chain]
        return found
    return []
