"""How many processors this process may really use."""

from __future__ import annotations

import os
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


def usable_cpus(root: Path = _ROOT) -> int:
    """Return the processors of the affinity mask, or fewer where a container's quota allows less; at least 1."""
    try:
        affinity = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS has no affinity masks
        affinity = os.cpu_count() or 1
    quota = _quota(root)
    return max(1, affinity if quota is None else min(affinity, int(quota)))


def _quota(root: Path) -> float | None:
    """Return the processors that the control group may use, None without a limit (versions 2 and 1)."""
    try:
        limit, period = (root / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        pass  # no version 2 here
    try:
        limit = (root / "cpu" / "cpu.cfs_quota_us").read_text()
        period = (root / "cpu" / "cpu.cfs_period_us").read_text()
        return int(limit) / int(period) if int(limit) > 0 else None
    except (OSError, ValueError):
        return None
