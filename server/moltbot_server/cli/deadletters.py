"""`moltbot deadletters …`: its options and its help. What it does is imported when it is run."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

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
    letters = add("deadletters", _overview, _OVERVIEW)
    letters.epilog = _EXAMPLES
    letters.set_defaults(parser=letters)
    under = letters.add_subparsers(metavar="COMMAND", title="commands")
    listing = _sub(
        under,
        "list",
        _list,
        "List the answers that were given up, the latest first: where they belong, why, and how they begin.",
        "moltbot deadletters list",
        "moltbot deadletters list --channel slack --json",
    )
    listing.add_argument("--limit", type=_number, metavar="N", default=100, help="how many at most (default: 100)")
    retry = _sub(
        under,
        "retry",
        _retry,
        "Have dead letters delivered after all, behind what waits for their place already.\n"
        "Each has all its attempts again. With --all, the oldest answer of a place comes first.",
        "moltbot deadletters retry deliveries/1f0c5a90be2d4c7781a03a6e",
        "moltbot deadletters retry --all --channel slack",
    )
    drop = _sub(
        under,
        "drop",
        _drop,
        "Delete dead letters for good.",
        "moltbot deadletters drop deliveries/1f0c5a90be2d4c7781a03a6e",
        "moltbot deadletters drop --all",
    )
    for each in (retry, drop):
        each.add_argument("names", nargs="*", metavar="NAME", help="as `moltbot deadletters list` tells it")
        each.add_argument("--all", action="store_true", help="all of them, or all of the channel")
    for each in (listing, retry, drop):
        each.add_argument("--channel", metavar="CHANNEL", default="", help="only those of this channel, such as slack")


def _sub(
    under: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    what: str,
    *examples: str,
) -> argparse.ArgumentParser:
    lines = "\n".join(f"  {example}" for example in examples)
    added = under.add_parser(
        name,
        help=(what[0].lower() + what[1:]).partition(".")[0].partition(":")[0],
        description=what,
        epilog=f"examples:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    added.set_defaults(run=run)
    # The same as ahead of the command's name; not given, it leaves alone what was given there.
    added.add_argument(
        "-w", "--workspace", type=Path, metavar="DIR", default=argparse.SUPPRESS, help="the workspace folder"
    )
    added.add_argument("--json", action="store_true", help="print one JSON object, for scripts")
    return added


def _number(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 100_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to 100000")
    return int(text)


def _overview(given: argparse.Namespace) -> int:
    given.parser.print_help()
    return 0


def _list(given: argparse.Namespace) -> int:
    from moltbot_server.cli.deadletters_asking import list_dead_letters

    return list_dead_letters(given)


def _retry(given: argparse.Namespace) -> int:
    from moltbot_server.cli.deadletters_asking import retry_dead_letters

    return retry_dead_letters(given)


def _drop(given: argparse.Namespace) -> int:
    from moltbot_server.cli.deadletters_asking import drop_dead_letters

    return drop_dead_letters(given)
