"""Puts bugs into copies of the code, one into each, and shows that the simulation finds every one of them.

`python tests/faults/seeded_bugs.py` plays them all; names behind it play those alone. A bug is a patch in `bugs/` that
begins with what is wrong; it is caught when worlds of the simulation break a promise with it that they keep without it.
A patch whose bug shows in one world of very many only names the test that shows it each time, in a line `Test: …`.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

BUGS = Path(__file__).parent / "bugs"
ROOT = Path(__file__).resolve().parents[2]
_COPIED = ("server/moltbot_server", "clients/python/moltbot", "tests/faults", "tests/core")
_WITHIN = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What came of a bug: whether it was caught, by which world or test, and what that broke."""

    name: str
    caught: bool
    by: str
    broke: str


def names() -> list[str]:
    """Return the names of all bugs."""
    return sorted(path.stem for path in BUGS.glob("*.patch"))


def what(name: str) -> str:
    """Return what is wrong with a bug."""
    return " ".join(_head(name).partition("\nTest: ")[0].split())


def test_of(name: str) -> str:
    """Return the test that shows a bug; empty when worlds do."""
    return _head(name).partition("\nTest: ")[2].strip()


def _head(name: str) -> str:
    return (BUGS / f"{name}.patch").read_text("utf-8").partition("\n---")[0]


def try_out(name: str, *, schedules: int) -> Verdict:
    """Put a bug into a copy of the code and play so many worlds, or fewer when one breaks a promise; or its test."""
    with tempfile.TemporaryDirectory(prefix="moltbot-bug-") as folder:
        tree = Path(folder)
        for part in _COPIED:
            ignored = shutil.ignore_patterns("__pycache__", "artifact", "data", "bugs")
            shutil.copytree(ROOT / part, tree / part, ignore=ignored)
        if problem := _patch(name, tree):
            return Verdict(name=name, caught=False, by="", broke=f"the patch does not fit the code any more: {problem}")
        return _try_test(name, tree) if test_of(name) else _try_worlds(name, tree, schedules)


def _try_worlds(name: str, tree: Path, schedules: int) -> Verdict:
    many = ("--schedules", str(schedules), "--sweep", "0")
    played = _run(tree, "tests/faults/simulation.py", *many, "--processes", "1")
    found = re.search(r"^broken by (.*):\n  (.*)$", played.stdout, re.MULTILINE)
    if found is None:
        return Verdict(name=name, caught=False, by="", broke=_last_line(played))
    return Verdict(name=name, caught=True, by=found[1], broke=found[2])


def _try_test(name: str, tree: Path) -> Verdict:
    """Run the test of a bug, which fails with it and, as all tests, passes without it."""
    shutil.copy(ROOT / "pyproject.toml", tree)
    played = _run(tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=0", test_of(name))
    found = re.search(r"^E +(.*)$", played.stdout, re.MULTILINE)
    if played.returncode != 1 or found is None:  # 1: it ran, and failed
        return Verdict(name=name, caught=False, by="", broke=_last_line(played))
    return Verdict(name=name, caught=True, by=test_of(name), broke=found[1])


def _run(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join((str(tree / "server"), str(tree / "clients/python")))
    programs = os.pathsep.join((str(ROOT / ".tools/bin"), os.environ["PATH"]))
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=tree,
        env={**os.environ, "PATH": programs, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=_WITHIN,
    )


def _last_line(played: subprocess.CompletedProcess[str]) -> str:
    return (played.stdout.strip().splitlines() or played.stderr.strip().splitlines() or [""])[-1]


def misfit(name: str) -> str:
    """Return why a bug cannot be put into the code; empty when it can."""
    return _patch(name, ROOT, "--check")


def _patch(name: str, tree: Path, *flags: str) -> str:
    command = ["git", "apply", "-C1", "--recount", "--whitespace=nowarn", *flags, str(BUGS / f"{name}.patch")]
    # The copy is patched as it is, and not as part of a repository that it happens to lie in.
    apart = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent)}
    return subprocess.run(command, cwd=tree, check=False, capture_output=True, text=True, env=apart).stderr.strip()


def try_all(chosen: Sequence[str], *, schedules: int, together: int) -> Iterator[Verdict]:
    """Try bugs out, several at the same time."""
    with ThreadPoolExecutor(together) as pool:
        yield from pool.map(lambda name: try_out(name, schedules=schedules), chosen)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a program; return 1 when a bug was not caught."""
    parser = argparse.ArgumentParser(description="Show that the simulation catches every seeded bug.")
    parser.add_argument("names", nargs="*", help="the bugs to try (default: all)")
    parser.add_argument("--schedules", type=int, default=16_000, help="worlds to play at most, for each bug")
    parser.add_argument("--together", type=int, default=os.cpu_count() or 1)
    flags = parser.parse_args(arguments)
    chosen = flags.names or names()
    caught = 0
    for verdict in try_all(chosen, schedules=flags.schedules, together=flags.together):
        caught += verdict.caught
        print(f"{'caught' if verdict.caught else 'MISSED'}  {verdict.name}: {what(verdict.name)}")
        print(f"        {verdict.by}  {verdict.broke}"[:200], flush=True)
    print(f"bugs={len(chosen)} caught={caught}")
    return 0 if caught == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
