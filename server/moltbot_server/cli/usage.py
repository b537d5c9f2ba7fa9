"""`moltbot usage`: its options and its help. What it does is imported when it is run."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import date

_WHAT = """\
Tell what was used: turns, tokens and what they cost, by day and model, of the last 30 days.
Days are those of UTC. While MoltBot does not run, its database is read."""
_FIELDS = ("day", "model", "user")

_Add = Callable[..., argparse.ArgumentParser]


def add_usage(add: _Add) -> None:
    """Add the command."""
    usage = add(
        "usage",
        _usage,
        _WHAT,
        "moltbot usage",
        "moltbot usage --since 2026-01-01 --by user",
        "moltbot usage --by day,model,user --model gpt-4o --json",
        "moltbot usage --budgets",
    )
    text = "the first day, such as 2026-01-31 (default: 30 days before the last)"
    usage.add_argument("--since", type=_day, metavar="DAY", help=text)
    usage.add_argument("--until", type=_day, metavar="DAY", help="the last day (default: today)")
    text = "what to tell apart: any of day, model and user (default: day,model)"
    usage.add_argument("--by", type=_fields, metavar="WHAT,WHAT", default=("day", "model"), help=text)
    usage.add_argument("--model", metavar="NAME", default="", help="only this model")
    usage.add_argument("--user", metavar="NAME", default="", help="only this user")
    usage.add_argument("--budgets", action="store_true", help="tell the budgets instead, and how much of each is used")
    usage.add_argument("--json", action="store_true", help="print one JSON object, for scripts")


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no day such as 2026-01-31") from None


def _fields(text: str) -> tuple[str, ...]:
    asked = [word.strip() for word in text.split(",")]
    if unknown := [word for word in asked if word not in _FIELDS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of day, model and user")
    return tuple(field for field in _FIELDS if field in asked)


def _usage(given: argparse.Namespace) -> int:
    from moltbot_server.cli.usage_telling import tell_usage

    return tell_usage(given)
