"""`moltbot deadletters …`: its options and its help. What it does is imported when it is run."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from moltbot_server.cli.under import add_under, count, named, overview

_OVERVIEW = """\
Look after answers that could not be delivered to their place on a platform.
An answer becomes a dead letter when adapters failed to post it too often, or said that it is of no use to try."""
_EXAMPLES = """\
examples:
  moltbot deadletters list
  moltbot deadletters retry deliveries/1f0c5a90be2d4c7781a03a6e
  moltbot deadletters drop --all --channel slack

docs/outbox.md says how answers are delivered, and when they are given up."""

_Add = Callable[..., argparse.ArgumentParser]


def add_deadletters(add: _Add) -> None:
    """Add the command with the commands under it."""
    letters = add("deadletters", overview, _OVERVIEW)
    letters.epilog = _EXAMPLES
    letters.set_defaults(parser=letters)
    under = letters.add_subparsers(metavar="COMMAND", title="commands")
    listing = add_under(
        under,
        "list",
        _list,
        "List the answers that were given up, the latest first: where they belong, why, and how they begin.",
        "moltbot deadletters list",
        "moltbot deadletters list --channel slack --json",
    )
    listing.add_argument("--limit", type=count, metavar="N", default=100, help="how many at most (default: 100)")
    retry = add_under(
        under,
        "retry",
        _retry,
        "Have dead letters delivered after all, behind what waits for their place already.\n"
        "Each has all its attempts again. With --all, the oldest answer of a place comes first.",
        "moltbot deadletters retry deliveries/1f0c5a90be2d4c7781a03a6e",
        "moltbot deadletters retry --all --channel slack",
    )
    drop = add_under(
        under,
        "drop",
        _drop,
        "Delete dead letters for good.",
        "moltbot deadletters drop deliveries/1f0c5a90be2d4c7781a03a6e",
        "moltbot deadletters drop --all",
    )
    drop.add_argument("--yes", action="store_true", help="do not ask whether all are meant")
    for each in (retry, drop):
        each.add_argument("names", nargs="*", metavar="NAME", help="as `moltbot deadletters list` tells it")
        each.add_argument("--all", action="store_true", help="all of them, or all of the channel")
    for each in (listing, retry, drop):
        each.add_argument("--channel", type=named, metavar="CHANNEL", help="only those of this channel, such as slack")


def _list(given: argparse.Namespace) -> int:
    from moltbot_server.cli.deadletters_asking import list_dead_letters

    return list_dead_letters(given)


def _retry(given: argparse.Namespace) -> int:
    from moltbot_server.cli.deadletters_asking import retry_dead_letters

    return retry_dead_letters(given)


def _drop(given: argparse.Namespace) -> int:
    from moltbot_server.cli.deadletters_asking import drop_dead_letters

    return drop_dead_letters(given)
