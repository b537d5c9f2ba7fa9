"""`moltbot bench durability` for people: its options, and a table at the end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from moltbot_server.bench.arguments import above_zero, program
from moltbot_server.bench.durability import LEFT_OUT, bench_durability
from moltbot_server.bench.durability_rig import MEMORY, STORES

_EPILOG = """\
examples:
  moltbot bench durability                         all stores, as a table; about six minutes
  moltbot bench durability --only sqlite --rounds 2
  moltbot bench durability --redis /opt/redis/bin/redis-server --json

Everything runs on this machine, in folders that are removed."""


def add_durability(kinds: Any, machine: Callable[[dict[str, Any]], str]) -> None:
    """Add the command to those of `moltbot bench`; `machine` tells in a line what the figures depend on."""
    durability = kinds.add_parser(
        "durability",
        help="what it costs that nothing is lost: SQLite and Redis against memory",
        description="Compare streams of the built-in model with each store, slice by slice, within one run.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    durability.add_argument("--rounds", type=above_zero(int), default=6, help="(default: %(default)s)")
    durability.add_argument(
        "--seconds", type=above_zero(float), default=6.0, help="length of a slice (default: %(default)s)"
    )
    names = [name for name in STORES if name != MEMORY]
    durability.add_argument("--only", action="append", default=[], choices=names, metavar="STORE",
                            help=f"compare this one, may be repeated: {', '.join(names)}")  # fmt: skip
    durability.add_argument("--redis", type=program, metavar="PATH", help="redis-server, where it is not in the PATH")
    durability.add_argument("--patience", type=int, default=0, metavar="N",
                            help="repeat a slice up to N times while others use the machine too")  # fmt: skip
    durability.add_argument("--json", action="store_true", help="print JSON")
    durability.set_defaults(run=_run, table=lambda report: f"{durability_table(report)}\n{machine(report)}")


def _run(given: argparse.Namespace) -> dict[str, Any]:
    report = bench_durability(
        rounds=given.rounds,
        seconds=given.seconds,
        redis=given.redis,
        stores=given.only or tuple(STORES),
        patience=given.patience,
        progress=lambda text: None if given.json else print(text, file=sys.stderr, flush=True),
    )
    if report["left_out"] and given.json:
        print(f"{', '.join(report['left_out'])}: {LEFT_OUT}", file=sys.stderr)
    return report


def durability_table(report: dict[str, Any]) -> str:
    """Return the figures and what they are made of as a table."""
    lines = [
        f"{'16 streams':<16}{'tokens/s':>10}{'of memory':>11}{'first token':>13}{'more':>9}{'accept':>9}{'core':>7}"
    ]
    for way in ("streams", "alone"):
        if way == "alone":
            lines.append("one at a time")
        for name, found in report["slices"][way].items():
            own = report.get(name, {})
            ratio = f"{own['tokens_ratio']:.3f}" if own and way == "streams" else "-"
            figure = "first_token_added_ms" if way == "streams" else "first_token_added_alone_ms"
            added = f"{own[figure]:+.2f}" if own else "-"
            lines.append(
                f"  {name:<14}{found['tokens_per_second']:>10,.0f}{ratio:>11}{found['first_token_p50_ms']:>10.2f} ms"
                f"{added:>9}{found['stages_ms']['accept']:>9.2f}{found['processors']['core']:>7.2f}"
            )
    lines.append("accept: ms until a turn is kept; core: processors that the core keeps busy")
    lines += [f"NOT MET: {name} is {found['value']}, {found['bar']}"
              for name, found in report["bars"].items() if not found["met"]]  # fmt: skip
    return "\n".join(lines)
