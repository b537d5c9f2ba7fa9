"""How many processors this process may really use: the affinity mask, the quota of its control groups, real cores."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Collection, Iterator
from pathlib import Path

MOST_REPLICAS = 64
"""Replicas of a model that are ever used, however many threads somebody asks for."""

_ROOT = Path("/")
_SIBLINGS = ("core_cpus_list", "thread_siblings_list")  # the second is the older name


def usable_cpus(root: Path = _ROOT, affinity: Collection[int] | None = None) -> int:
    """Return the processors of the affinity mask, or fewer where a container's quota allows less; at least 1.

    Of a quota the whole processors count: half of one more would be used up before each period ends, and everything
    then waits for the next.
    """
    quota = cpu_quota(root)
    processors = len(_affinity(affinity))
    return max(1, processors if quota is None else min(processors, int(quota + 1e-6)))


def usable_cores(root: Path = _ROOT, affinity: Collection[int] | None = None) -> int:
    """Return how many of the usable processors compute by themselves: two hyper-threads of one core count once."""
    mask = _affinity(affinity)
    return min(usable_cpus(root, mask), len({_core(root, number) for number in mask}))


def too_many_threads(asked: int) -> str:
    """Return what is to be said of so many threads for a model; empty where this machine has processors for them."""
    there = usable_cpus()
    if asked <= there:
        return ""
    used = f"; {MOST_REPLICAS} are the most that are used" if asked > MOST_REPLICAS else ""
    return (
        f"threads is {asked}, more than the {there} processors that MoltBot may use here{used}. They take turns and "
        "memory, and answers come no faster; leave it out for what suits this machine."
    )


def cpu_quota(root: Path = _ROOT) -> float | None:
    """Return how many processors' time the control groups leave this process, such as 1.5; None without a limit.

    Each group above the process may have a limit, and the least holds.
    """
    quotas = [quota for group in _groups(root) if (quota := _group_quota(group)) is not None]
    return min(quotas, default=None)


def processor_name(root: Path = _ROOT) -> str:
    """Return what the processor calls itself."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _affinity(given: Collection[int] | None) -> Collection[int]:
    if given is not None:
        return given
    try:
        return os.sched_getaffinity(0)
    except AttributeError:  # macOS has no affinity masks
        return range(os.cpu_count() or 1)


def _core(root: Path, number: int) -> str:
    """Return a name that the hyper-threads of one core share."""
    for name in _SIBLINGS:
        with contextlib.suppress(OSError):
            return (root / f"sys/devices/system/cpu/cpu{number}/topology" / name).read_text("ascii").strip()
    return str(number)


def _group_quota(group: Path) -> float | None:
    """Return the limit of one control group, by the kernel's interface of version 2 or 1."""
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        limit, period = (group / "cpu.max").read_text("ascii").split()
        return None if limit == "max" else int(limit) / int(period)
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        limit = (group / "cpu.cfs_quota_us").read_text("ascii")
        period = (group / "cpu.cfs_period_us").read_text("ascii")
        return int(limit) / int(period) if int(limit) > 0 else None
    return None


def _groups(root: Path) -> Iterator[Path]:
    """Yield the folders of the control groups that hold this process, from its own up to the top, for each version."""
    mounts = dict(_mounts(root))
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text("utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            for base, shown in mounts.get("cpu" if controllers else "", ()):
                yield from _chain(base, shown, path)


def _chain(base: Path, shown: str, path: str) -> list[Path]:
    """Return a group and those above it. `shown` is the part of the hierarchy that can be seen at `base`."""
    inside = path.removeprefix(shown.rstrip("/")).strip("/")
    group = base / inside
    # Inside a container the path may be the host's; the container's own files are then at the top.
    if ".." in inside.split("/") or not group.is_dir():
        return [base]
    return [group, *group.parents[: len(group.relative_to(base).parts)]]


def _mounts(root: Path) -> Iterator[tuple[str, list[tuple[Path, str]]]]:
    """Yield where the control groups can be read: of version 2 under an empty name, of version 1 under `cpu`."""
    found: dict[str, list[tuple[Path, str]]] = {"": [], "cpu": []}
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (root / "proc/self/mountinfo").read_text("utf-8").splitlines():
            place, _, kind = line.partition(" - ")
            shown, base = place.split()[3:5]
            system, _, options = kind.split(maxsplit=2)
            if system == "cgroup2":
                found[""].append((root / base.lstrip("/"), shown))
            elif system == "cgroup" and "cpu" in options.split(","):
                found["cpu"].append((root / base.lstrip("/"), shown))
    yield from found.items()
