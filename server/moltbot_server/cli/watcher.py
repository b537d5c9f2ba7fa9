"""Finds changed files for `moltbot start --reload`."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

EVERY = 0.5


class Watcher:
    """Compares the times of Python files and of configuration files with those of the last look."""

    def __init__(self, workspace: Path) -> None:
        self._files = (workspace / "moltbot.yaml", workspace / ".env", Path.cwd() / ".env")
        specs = [importlib.util.find_spec(name) for name in ("moltbot", "moltbot_server", "moltbot_adapters")]
        self._folders = [place for spec in specs if spec for place in spec.submodule_search_locations or ()]
        self._seen = dict(self._look())

    def changed(self) -> list[Path]:
        """Return the files that were changed, made or removed since the last call."""
        seen = dict(self._look())
        changed = [path for path in seen.keys() | self._seen.keys() if seen.get(path) != self._seen.get(path)]
        self._seen = seen
        return sorted(map(Path, changed))

    def _look(self) -> Iterator[tuple[str, int]]:
        for file in self._files:
            with contextlib.suppress(FileNotFoundError):
                yield str(file), file.stat().st_mtime_ns
        pending = list(self._folders)
        while pending:
            for entry in os.scandir(pending.pop()):
                if entry.is_dir(follow_symlinks=False):
                    if entry.name != "__pycache__":
                        pending.append(entry.path)
                elif entry.name.endswith(".py"):
                    with contextlib.suppress(FileNotFoundError):  # an editor replaces it at this moment
                        yield entry.path, entry.stat().st_mtime_ns
