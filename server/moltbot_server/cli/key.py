"""`moltbot key …`: the options and the help of each of its commands. What they do is imported when they are run."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

from moltbot_server.cli.under import add_under, overview

_OVERVIEW = """\
Keep the keys of remote providers: add, list, try and remove them.
They are encrypted in the workspace (AES-256-GCM). A key is typed or piped in, and never an argument."""
_EXAMPLES = """\
examples:
  moltbot key add openai
  moltbot key add anthropic --label team < key.txt
  moltbot key list
  moltbot key test openai

docs/keys.md is the guide."""

_Run = Callable[[argparse.Namespace], int]
_Add = Callable[..., argparse.ArgumentParser]


def add_key(add: _Add) -> None:
    """Add the command with all commands under it."""
    key = add("key", overview, _OVERVIEW)
    key.epilog = _EXAMPLES
    key.set_defaults(parser=key)
    under = key.add_subparsers(metavar="COMMAND", title="commands")

    sub = partial(add_under, under)

    _add_keeping(sub)
    _add_trying(sub)


def _add_keeping(sub: _Add) -> None:
    added = sub(
        "add",
        _keep,
        "Keep a key of a provider.\nIt is asked for and not shown, or read from a pipe. A provider may have several: "
        "when one is refused or used up, the next is tried.",
        "moltbot key add openai",
        "moltbot key add openai --label team < key.txt",
    )
    added.add_argument("provider", metavar="PROVIDER", help="a preset such as openai, or a name under `providers:`")
    # Taken in so that it can be refused without being repeated, as a message about an unknown argument would.
    added.add_argument("spilled", nargs="*", help=argparse.SUPPRESS)
    added.add_argument("--label", default="", metavar="TEXT", help="a word of your own to know it by")
    sub(
        "list",
        _list,
        "List the keys: whose they are, since when, where from. Of the keys themselves only the last four characters.",
        "moltbot key list",
        "moltbot key list --json",
    )
    remove = sub("remove", _remove, "Forget a key.", "moltbot key remove 3f9a1c07")
    remove.add_argument("id", metavar="ID", help="its id, as the list has it")


def _add_trying(sub: _Add) -> None:
    test = sub(
        "test",
        _test,
        "Ask providers a word with each of their keys, to see whether it works.\nThat costs a few tokens.",
        "moltbot key test",
        "moltbot key test openai --model gpt-4o-mini",
    )
    test.add_argument("provider", metavar="PROVIDER", nargs="?", default="", help="one provider (default: all)")
    test.add_argument("--model", default="", metavar="NAME", help="the model to ask (default: one of your routes)")
    sub(
        "rotate-master",
        _rotate,
        "Encrypt the vault under a new master key.\nThe file vault.key, or the one that MOLTBOT_VAULT_KEY_FILE names, "
        "is replaced; with MOLTBOT_VAULT_KEY the new one is told by MOLTBOT_VAULT_KEY_NEW.",
        "moltbot key rotate-master",
    )


def _keep(given: argparse.Namespace) -> int:
    from moltbot_server.cli.key_keeping import keep_key

    return keep_key(given)


def _list(given: argparse.Namespace) -> int:
    from moltbot_server.cli.key_keeping import list_keys

    return list_keys(given)


def _remove(given: argparse.Namespace) -> int:
    from moltbot_server.cli.key_keeping import remove_key

    return remove_key(given)


def _test(given: argparse.Namespace) -> int:
    from moltbot_server.cli.key_testing import test_keys

    return test_keys(given)


def _rotate(given: argparse.Namespace) -> int:
    from moltbot_server.cli.key_keeping import rotate_master

    return rotate_master(given)
