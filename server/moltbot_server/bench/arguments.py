"""What the command lines of the benchmarks have in common."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

N = TypeVar("N", int, float)


def above_zero(kind: type[N]) -> Callable[[str], N]:
    """Return what reads a number above zero from a command line."""

    def read(text: str) -> N:
        try:
            number = kind(text)
        except ValueError:
            number = kind(0)
        if not 0 < number < float("inf"):
            raise argparse.ArgumentTypeError(f"found {text!r}, expected a number above 0")
        return number

    return read


def program(text: str) -> Path:
    """Read the path of a program from a command line; links stay as they are, for some programs look at their name."""
    found = shutil.which(Path(text).expanduser().absolute())
    if found is None:
        raise argparse.ArgumentTypeError(f"there is no program {text}")
    return Path(found)
