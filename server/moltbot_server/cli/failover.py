"""`moltbot failover …`: its options and its help. What it does is imported when it is run."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from moltbot_server.cli.under import folder

_OVERVIEW = "Prove that answers come when models fail."
_EXAMPLES = """\
examples:
  moltbot failover test
  moltbot failover test --route careful --json

docs/failover.md says what a route does; `moltbot route list` shows how the models of a running core are."""

_TEST = """\
Play what goes wrong with providers against a route as it is configured, and tell what a user sees.
A mock provider stands in for each provider of the route, invented keys for its keys, and a core of its own in a
temporary workspace answers: the real one is not touched, no call leaves this machine and nothing is charged.
It takes about half a minute. Without a route in the configuration a sample route is tried."""
_TEST_EXAMPLES = """\
examples:
  moltbot failover test
  moltbot failover test --route careful
  moltbot failover test --json

exit status: 0 all passed; 1 something failed; 78 the configuration is wrong"""

_Add = Callable[..., argparse.ArgumentParser]


def add_failover(add: _Add) -> None:
    """Add the command with the command under it."""
    failover = add("failover", _overview, _OVERVIEW)
    failover.epilog = _EXAMPLES
    failover.set_defaults(parser=failover)
    under = failover.add_subparsers(metavar="COMMAND", title="commands")
    test = under.add_parser(
        "test",
        help="play what goes wrong with providers against a route, and tell what a user sees",
        description=_TEST,
        epilog=_TEST_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    test.set_defaults(run=_test)
    # The same as ahead of the command's name; not given, it leaves alone what was given there.
    test.add_argument(
        "-w", "--workspace", type=folder, metavar="DIR", default=argparse.SUPPRESS, help="the workspace folder"
    )
    test.add_argument(
        "--route", metavar="NAME", default="", help="a route under `routes:` (default: the one of `models:`)"
    )
    test.add_argument("--json", action="store_true", help="print one JSON object, for scripts")


def _overview(given: argparse.Namespace) -> int:
    given.parser.print_help()
    return 0


def _test(given: argparse.Namespace) -> int:
    from moltbot_server.cli.failover_drill import failover_test

    return failover_test(given)
