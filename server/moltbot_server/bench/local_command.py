"""`moltbot bench local` for people: its options, a bar while it runs, a table at the end."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moltbot_server.bench.arguments import above_zero, program
from moltbot_server.bench.local import FIGURES, bench_local
from moltbot_server.bench.local_llama import Llama
from moltbot_server.bench.local_rig import INLINE
from moltbot_server.models.cpus import usable_cpus

_BAR = 24
_OFFLINE = {"ceiling", "told", "backlog", "mixed"}
_EPILOG = """\
examples:
  moltbot bench local                       all figures, as a table; about fifteen minutes
  moltbot bench local --quick               one round of short slices, for a first look
  moltbot bench local --json --only ceiling_ratio --only builtin_ceiling_ratio
  moltbot bench local --llama-server ./llama-server --gguf random.gguf

The model of 134 million random parameters is made on the spot and kept in the cache folder of the user."""


def add_local(kinds: Any, machine: Callable[[dict[str, Any]], str]) -> None:
    """Add the command to those of `moltbot bench`; `machine` tells in a line what the figures depend on."""
    local = kinds.add_parser(
        "local",
        help="what reaches the clients of CTranslate2's own speed, and how soon",
        description="Compare streams through gRPC with CTranslate2 by itself, slice by slice, within one run.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    local.add_argument("--only", action="append", default=[], metavar="FIGURE", choices=[*FIGURES],
                       help=f"measure this figure, may be repeated: {', '.join(FIGURES)}")  # fmt: skip
    local.add_argument("--quick", action="store_true", help="one round of short slices")
    local.add_argument(
        "--rounds", type=above_zero(int), default=0, help="rounds of slices (default: 5; 1 with --quick)"
    )
    local.add_argument(
        "--seconds", type=above_zero(float), default=0.0, help="length of a slice (default: 6; 2 with --quick)"
    )
    local.add_argument("--patience", type=int, default=0, metavar="N",
                       help="repeat a slice up to N times while other programs use the machine too")  # fmt: skip
    local.add_argument("--inline", action="store_true", help="run the models inside the core, not in their own process")
    local.add_argument("--llama-server", type=program, metavar="PATH", help="llama.cpp's server, to be measured beside")
    local.add_argument("--gguf", type=Path, metavar="PATH", help="a model of the same shape for it")
    local.add_argument("--llama-threads", type=int, default=usable_cpus(), metavar="N",
                       help="how many threads it computes with (default: %(default)s)")  # fmt: skip
    local.add_argument("--json", action="store_true", help="print JSON")
    local.set_defaults(run=_run, table=lambda report: f"{local_table(report)}\n{machine(report)}")


def _run(given: argparse.Namespace) -> dict[str, Any]:
    if (given.llama_server is None) != (given.gguf is None):
        raise RuntimeError("--llama-server and --gguf are given together or not at all")
    llama = None
    if given.llama_server is not None:
        llama = Llama(server=given.llama_server, gguf=given.gguf, threads=given.llama_threads)
    bar = Bar(quiet=given.json)
    try:
        return bench_local(
            only=given.only,
            rounds=given.rounds or (1 if given.quick else 5),
            seconds=given.seconds or (2.0 if given.quick else 6.0),
            form=INLINE if given.inline else "",
            llama=llama,
            patience=given.patience,
            progress=bar.reach,
        )
    finally:
        bar.close()


class Bar:
    """A bar on the standard error, where that is a terminal; a line for each step elsewhere; or nothing."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._terminal = sys.stderr.isatty()

    def reach(self, done: float, what: str) -> None:
        """Show how far it is, from 0 to 1, and what is measured now."""
        if self._quiet:
            return
        filled = int(done * _BAR)
        line = f"[{'#' * filled}{'.' * (_BAR - filled)}] {done:4.0%}  {what}"
        if self._terminal:
            print(f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._terminal and not self._quiet:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def local_table(report: dict[str, Any]) -> str:
    """Return the figures and what they are made of as a table."""
    lines = [f"{'figure':<23}{'median':>8}{'lowest':>8}{'highest':>9}{'bar':>7}"]
    for name in FIGURES:
        if name in report:
            detail = report[name.replace("ratio", "detail")]
            bar = f"{detail['bar']:g}" if detail["bar"] else "-"
            numbers = f"{report[name]:>8.2f}{detail['lowest']:>8.2f}{detail['highest']:>9.2f}{bar:>7}"
            lines.append(f"{name:<23}{numbers}   {detail['what']}")
    lines += ["", f"{'slice':<23}{'tokens/s':>10}{'first token p50':>17}{'others':>9}"]
    for scene, found in report["scenes"].items():
        tuning = found["tuning"]
        lines.append(f"{scene}: {tuning['replicas']} x {tuning['threads']}, {tuning['compute_type']}")
        for name, figures in found["slices"].items():
            first = f"{figures['first_token_ms']:,.1f} ms" if name not in _OFFLINE else "-"
            lines.append(f"  {name:<21}{figures['tokens_per_second']:>10,.0f}{first:>17}{figures['others']:>9.2f}")
    return "\n".join([*lines, "others: processors that other programs kept busy meanwhile"])
