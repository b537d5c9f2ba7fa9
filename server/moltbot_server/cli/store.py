"""`moltbot store …`: its options and its help. What it does is imported when it is run."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from moltbot_server.cli.under import add_under, overview

_OVERVIEW = """\
Look after the place where conversations are kept: check it, and move what is in it.
It is a file of the workspace, or a Redis that several cores share."""
_EXAMPLES = """\
examples:
  moltbot store check
  moltbot store export conversations.jsonl
  moltbot store import conversations.jsonl

docs/store.md is the guide."""

_Add = Callable[..., argparse.ArgumentParser]
_Run = Callable[[argparse.Namespace], int]


def add_store(add: _Add) -> None:
    """Add the command with the commands under it."""
    store = add("store", overview, _OVERVIEW)
    store.epilog = _EXAMPLES
    store.set_defaults(parser=store)
    under = store.add_subparsers(metavar="COMMAND", title="commands")
    add_under(
        under,
        "check",
        _check,
        "Tell whether the store is whole and set up well; nothing is changed.\n"
        "It may be in use meanwhile. Ends with 1 when something is wrong.",
        "moltbot store check",
        "moltbot store check --json",
    )
    export = add_under(
        under,
        "export",
        _export,
        "Write all sessions, turns and usage to a new file of JSON lines, readable by you alone.\n"
        "The store may be in use meanwhile.",
        "moltbot store export conversations.jsonl",
    )
    export.add_argument("file", type=Path, metavar="FILE", help="where to; there must be no such file yet")
    take_in = add_under(
        under,
        "import",
        _import,
        "Put what `moltbot store export` wrote into the store that the configuration names.\n"
        "No core may be running. What breaks off can be begun again with --merge.",
        "moltbot store import conversations.jsonl",
        "moltbot store import conversations.jsonl --merge",
    )
    take_in.add_argument("file", type=Path, metavar="FILE", help="what `moltbot store export` wrote")
    text = "into a store that is not empty: what is there stays as it is, and what is missing is added"
    take_in.add_argument("--merge", action="store_true", help=text)


def _check(given: argparse.Namespace) -> int:
    from moltbot_server.cli.store_checking import check_store

    return check_store(given)


def _export(given: argparse.Namespace) -> int:
    from moltbot_server.cli.store_moving import export_store

    return export_store(given)


def _import(given: argparse.Namespace) -> int:
    from moltbot_server.cli.store_moving import import_store

    return import_store(given)
