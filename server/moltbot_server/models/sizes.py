"""How much something takes, in words and on the disk."""

from __future__ import annotations

from pathlib import Path


def folder_size(folder: Path) -> int:
    """Return the bytes of all files of a folder, 0 for one that is not there."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def readable(count: float) -> str:
    """Return a number of bytes as people read it: `512 B`, `13.4 MB`, `420 MB`."""
    if count < 1000:
        return f"{count:.0f} B"
    units = ["kB", "MB", "GB", "TB"]
    while (count := count / 1000) >= 999.5 and len(units) > 1:
        del units[0]
    return f"{count:.1f} {units[0]}" if count < 99.95 else f"{count:.0f} {units[0]}"
