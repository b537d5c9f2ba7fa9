"""`moltbot route …`: its options and its help. What it does is imported when it is run."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from moltbot_server.cli.under import add_under, overview

_OVERVIEW = """\
Look at the routes of the running core, and let it read its configuration again.
A route is several models behind one name: the first that can answers a turn."""
_EXAMPLES = """\
examples:
  moltbot route list
  moltbot route reload

docs/failover.md says what a route does; `moltbot failover test` proves yours against faults."""

_Add = Callable[..., argparse.ArgumentParser]


def add_route(add: _Add) -> None:
    """Add the command with the commands under it."""
    route = add("route", overview, _OVERVIEW)
    route.epilog = _EXAMPLES
    route.set_defaults(parser=route)
    under = route.add_subparsers(metavar="COMMAND", title="commands")
    add_under(
        under,
        "list",
        _list,
        "List the routes: each model, whether it is asked now, why not, and how it did of late.",
        "moltbot route list",
        "moltbot route list --json",
    )
    add_under(
        under,
        "reload",
        _reload,
        "Read the configuration and the keys again and put them to use, while turns run.\n"
        "All of it or, when anything is wrong, nothing.",
        "moltbot route reload",
        "moltbot route reload --json",
    )


def _list(given: argparse.Namespace) -> int:
    from moltbot_server.cli.route_asking import list_routes

    return list_routes(given)


def _reload(given: argparse.Namespace) -> int:
    from moltbot_server.cli.route_asking import reload_routes

    return reload_routes(given)
