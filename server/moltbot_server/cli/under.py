"""Commands under a command: what their help looks like, and the options that all of them have."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

_MOST = 100_000


def add_under(
    under: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    what: str,
    *examples: str,
) -> argparse.ArgumentParser:
    """Add a command that does `run`, and return it for its own options.

    `what` says what it does: its first clause stands in the list of commands, all of it in the command's own help.
    """
    lines = "\n".join(f"  {example}" for example in examples)
    added = under.add_parser(
        name,
        help=re.split("[.:;]", what[0].lower() + what[1:], maxsplit=1)[0],
        description=what,
        epilog=f"examples:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    added.set_defaults(run=run)
    # The same as ahead of the command's name; not given, it leaves alone what was given there.
    added.add_argument(
        "-w", "--workspace", type=folder, metavar="DIR", default=argparse.SUPPRESS, help="the workspace folder"
    )
    added.add_argument("--json", action="store_true", help="print one JSON object, for scripts")
    return added


def count(text: str) -> int:
    """Read how many of something are meant."""
    if not text.isdecimal() or not 0 < int(text) <= _MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to {_MOST}")
    return int(text)


def folder(text: str) -> Path:
    """Read where a folder is: an empty text, as of a variable that is not set, would mean the current one."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty, which names no folder; leave it out for the usual one")
    return Path(text)


def named(text: str) -> str:
    """Read a name that something is chosen by: an empty one, as of a variable that is not set, chooses nothing."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty, which names nobody and nothing; leave it out if all are meant")
    return text


def overview(given: argparse.Namespace) -> int:
    """Print the help of a command that takes others, if it was given none."""
    given.parser.print_help()
    return 0
