"""`moltbot session …`: its options and its help. What it does is imported when it is run."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from moltbot_server.cli.under import add_under, count, named, overview

_OVERVIEW = """\
Look at the conversations of the workspace, and delete those that have to go: all of one person, say.
Whose they are is what the caller said: `owner` on the chat page, nobody where `user` was not given, as in the terminal.
Those of stateless callers (the OpenAI-compatible API) are not listed; they go by themselves after a day."""
_EXAMPLES = """\
examples:
  moltbot session list --user ada
  moltbot session show sessions/cli-5d1f
  moltbot session delete --all --user ada

docs/store.md says for how long conversations are kept."""


def add_session(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command with the commands under it."""
    sessions = add("session", overview, _OVERVIEW)
    sessions.epilog = _EXAMPLES
    sessions.set_defaults(parser=sessions)
    under = sessions.add_subparsers(metavar="COMMAND", title="commands")
    listing = add_under(
        under,
        "list",
        _list,
        "List the sessions, the last used first: whose they are, how many messages they have, and what they are about.",
        "moltbot session list",
        "moltbot session list --channel slack --json",
    )
    listing.add_argument("--limit", type=count, metavar="N", default=100, help="how many at most (default: 100)")
    show = add_under(
        under,
        "show",
        _show,
        "Print what was said in a session.",
        "moltbot session show sessions/cli-5d1f",
        "moltbot session show cli-5d1f --json",
    )
    reset = add_under(
        under,
        "reset",
        _reset,
        "Delete what was said in sessions, which stay: what is said next begins anew in them.",
        "moltbot session reset sessions/cli-5d1f",
    )
    delete = add_under(
        under,
        "delete",
        _delete,
        "Delete sessions with all that was said in them, for good. An answer under way in one is cancelled.\n"
        "docs/store.md says where else words of a conversation may be: backups, dead letters, files of a database.",
        "moltbot session delete sessions/cli-5d1f",
        "moltbot session delete --all --user ada",
    )
    show.add_argument("name", metavar="NAME", help="as `moltbot session list` tells it")
    for each in (reset, delete):
        each.add_argument("names", nargs="*", metavar="NAME", help="as `moltbot session list` tells it")
        each.add_argument("--all", action="store_true", help="all of them, or all of the user or the channel")
        each.add_argument("--yes", action="store_true", help="do not ask whether all are meant")
    for each in (listing, reset, delete):
        each.add_argument("--user", type=named, metavar="USER", help="only those of this user")
        each.add_argument("--channel", type=named, metavar="CHANNEL", help="only those of this channel, such as slack")


def _list(given: argparse.Namespace) -> int:
    from moltbot_server.cli.session_asking import list_sessions

    return list_sessions(given)


def _show(given: argparse.Namespace) -> int:
    from moltbot_server.cli.session_asking import show_session

    return show_session(given)


def _reset(given: argparse.Namespace) -> int:
    from moltbot_server.cli.session_asking import reset_sessions

    return reset_sessions(given)


def _delete(given: argparse.Namespace) -> int:
    from moltbot_server.cli.session_asking import delete_sessions

    return delete_sessions(given)
