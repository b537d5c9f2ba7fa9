"""`moltbot cache …`: its options and its help. What it does is imported when it is run."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from moltbot_server.cli.under import add_under, overview

_OVERVIEW = """\
Look at what the core keeps for another time, and clear it.
Answers to questions that leave nothing to chance are kept, and what was looked up elsewhere."""
_EXAMPLES = """\
examples:
  moltbot cache list
  moltbot cache clear
  moltbot cache clear answers

docs/caches.md says what is kept, for how long, and how to have it otherwise."""

_Add = Callable[..., argparse.ArgumentParser]


def add_cache(add: _Add) -> None:
    """Add the command with the commands under it."""
    cache = add("cache", overview, _OVERVIEW)
    cache.epilog = _EXAMPLES
    cache.set_defaults(parser=cache)
    under = cache.add_subparsers(metavar="COMMAND", title="commands")
    add_under(
        under,
        "list",
        _list,
        "List the caches: what each holds, and how often that served.\nThe counts begin with the core.",
        "moltbot cache list",
        "moltbot cache list --json",
    )
    clear = add_under(
        under,
        "clear",
        _clear,
        "Forget what is kept of the workspace. Safe at any time: what is wanted again is made or looked up again.",
        "moltbot cache clear",
        "moltbot cache clear answers",
    )
    clear.add_argument("name", nargs="?", metavar="NAME", default="", help="answers, sessions, … (default: all)")


def _list(given: argparse.Namespace) -> int:
    from moltbot_server.cli.cache_asking import list_caches

    return list_caches(given)


def _clear(given: argparse.Namespace) -> int:
    from moltbot_server.cli.cache_asking import clear_caches

    return clear_caches(given)
