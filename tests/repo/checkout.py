"""The checkout that the tests of this folder look at."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def tracked_files() -> list[Path]:
    """Answers every file that git keeps, or every file of an unpacked archive that git does not know."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = listing.stdout.split("\0") if listing.returncode == 0 else []
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def own_python_files() -> list[Path]:
    """Answers the Python files that people write; generated code is left out."""
    return [path for path in tracked_files() if path.suffix == ".py" and not path.stem.endswith(("_pb2", "_pb2_grpc"))]


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Answers each function of a file with its length in lines."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1
