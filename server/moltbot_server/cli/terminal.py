"""How the command line speaks: exit statuses, messages with a next step, text that cannot command a terminal."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path

from moltbot_server.cli.encoding import readable
from moltbot_server.workspace import Workspace, find_workspace

# Model output and stored titles are data: escape sequences would let them recolour, retitle or type into a terminal.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

_KEY_COMMAND = re.compile(r"`moltbot (key [^`]*)`")


class Exit(IntEnum):
    """Exit statuses; those from 64 on are the ones of sysexits.h."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNAVAILABLE = 69
    NOT_ALLOWED = 77
    CONFIG = 78
    INTERRUPTED = 130


class Failure(Exception):
    """Ends a command with a message for the person at the terminal and an exit status."""

    def __init__(self, message: str, status: Exit = Exit.FAILED) -> None:
        super().__init__(message)
        self.message = message
        self.status = status


def interrupted(text: str, *, as_json: bool) -> int:
    """Say that Ctrl-C has ended a command, and return its exit status.

    Raises:
        Failure: the command says `as_json` how it ends.
    """
    if as_json:
        raise Failure(text, Exit.INTERRUPTED)
    print(f"\nmoltbot: {text}", file=sys.stderr)
    return int(Exit.INTERRUPTED)


def folder_is_there() -> bool:
    """Return whether the current folder still exists."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def check_readable(word: str, what: str) -> None:
    """Refuse bytes that are no text, as those of a file in another encoding.

    Raises:
        Failure: the word has some; `what` is the word in the message.
    """
    if not readable(word):
        found = os.fsencode(word).decode("ascii", "backslashreplace")
        raise Failure(f"{what} '{found}' is no text in {sys.getfilesystemencoding().upper()}", Exit.USAGE)


def confirm(what: str, nothing: str, given: argparse.Namespace) -> None:
    """Have the person at the terminal say that they mean `what`, unless they gave `--yes`.

    Raises:
        Failure: they do not, so `nothing` came of it, or nobody is there to say so.
    """
    if given.yes:
        return
    if given.json or not sys.stdin.isatty():
        raise Failure(f"{what}: say --yes if that is meant", Exit.USAGE)
    if input(f"{what}. Go on? [y/N] ").strip().lower() not in ("y", "yes"):
        raise Failure(nothing)


def harmless(text: str) -> str:
    """Return text without the characters that command a terminal; line ends and tabs stay."""
    return _CONTROLS.sub("", text)


def dim(text: str) -> str:
    """Return text that a terminal shows dimly, where it can and its owner wants that."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    return text if plain or not text else f"\x1b[2m{text}\x1b[22m"


def command(rest: str, workspace: Workspace | None = None) -> str:
    """Return how a person would type a `moltbot` command here: by path when it is in an environment not activated.

    The workspace is named unless it is the one that every terminal would find in this folder.
    """
    if workspace is not None and {find_workspace(os.environ), find_workspace({})} != {workspace}:
        name, _, more = rest.partition(" ")
        rest = " ".join(filter(None, (name, "--workspace", typed(workspace.folder), more)))
    program = Path(sys.argv[0]).absolute()
    if program.name == "moltbot" and program.parent == Path(sys.prefix) / "bin":
        if os.environ.get("VIRTUAL_ENV") != sys.prefix:
            here = Path.cwd()
            is_near = program.is_relative_to(here) and here != Path(here.anchor)  # services run in /
            return f"{os.path.relpath(program) if is_near else program} {rest}"
    elif program.name != "moltbot":
        return f"{Path(sys.executable).name} -m moltbot_server.cli {rest}"
    return f"moltbot {rest}"


def as_typed(text: str, workspace: Workspace) -> str:
    """Return what a core said with each command for keys that it names as a person types it for this workspace."""
    return _KEY_COMMAND.sub(lambda found: f"`{command(found[1], workspace)}`", text)


def typed(path: Path) -> str:
    """Return a path as a word of a shell's command line."""
    text = shown(path)
    return f"~/{shlex.quote(text[2:])}" if text.startswith("~/") else shlex.quote(text)


def shown(path: Path) -> str:
    """Return a path as people write it, with `~` for their home."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) and path != home else str(path)


def answering(model: str, route: Sequence[str]) -> tuple[str, str]:
    """Return what answers when nobody names a model, `Model` or `Route`, and what to call it.

    A route is told with its models: its own name is often `default`.
    """
    return ("Route", f"{model} ({', '.join(route)})") if route else ("Model", model)


def lasting(seconds: float) -> str:
    """Return a time as people say it, in its two largest units: `54 s`, `2 min 5 s`, `3 h 20 min`, `2 d 4 h`."""
    rest, parts = int(seconds), []
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        count, rest = divmod(rest, size)
        if count:
            parts.append(f"{count} {unit}")
        elif parts:
            break
    return " ".join(parts[:2]) or "0 s"
