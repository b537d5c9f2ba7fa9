"""`moltbot bench router`: what a route costs and what users see of its models' faults, with real processes.

A MoltBot as `moltbot start` runs it, with an HTTP adapter, a core and sessions that are written, leads to mock
providers; the load comes from processes of their own. Kept answers are off but where they are what is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from moltbot_server.bench.arguments import above_zero, program
from moltbot_server.bench.core import machine
from moltbot_server.bench.router_faults import healing, mixed, reloads, single_flight, switches
from moltbot_server.bench.router_rig import LATENCY, LiteLlm, Rig
from moltbot_server.bench.router_speed import Comparison
from moltbot_server.bench.serving_crowd import bar

Report = dict[str, Any]

PARTS = ("faults", "switches", "dead", "healing", "reload", "flight", "speed")
_SPEED_STREAMS = (16, 64)
_WHAT = """\
Measure what a route costs and what users see when its models fail.
Mock providers, a whole MoltBot with sessions that are written, and load processes share this machine. Kept answers are
off but in the part `flight`. The parts:
  faults    turns while the first model has 30 % mixed faults, and while it always fails
  switches  the first token of turns that had to go on to the second model
  dead      turns a second through the HTTP adapter while the first model is dead
  healing   how soon a model that is well again is back
  reload    a hundred new configurations under load
  flight    a thousand identical questions at once
  speed     turns a second and first token through HTTP adapter and core, against the mock by itself"""
_EPILOG = """\
examples:
  moltbot bench router                         all parts, about five minutes
  moltbot bench router --json --turns 100000   the faults with a hundred thousand turns
  moltbot bench router --only speed --litellm ~/litellm/bin/litellm"""


def add_router(kinds: Any, ending: Callable[[Report], str]) -> None:
    """Add the command to those of `moltbot bench`; `ending` is what a table ends with."""
    router = kinds.add_parser(
        "router",
        help="what a route costs, and what users see of its models' faults",
        description=_WHAT,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    router.add_argument(
        "--turns", type=above_zero(int), default=10_000, help="turns of the part faults (default: %(default)s)"
    )
    router.add_argument(
        "--seconds", type=above_zero(float), default=5.0, help="length of a slice (default: %(default)s)"
    )
    router.add_argument("--rounds", type=above_zero(int), default=3, help="slices of each kind (default: %(default)s)")
    router.add_argument("--reloads", type=above_zero(int), default=100, help="reloads (default: %(default)s)")
    router.add_argument(
        "--outages", type=_seconds, default=(3.0, 10.0, 20.0), metavar="3,10,20", help="lengths in seconds"
    )
    router.add_argument("--only", action="append", default=[], choices=PARTS, metavar="PART",
                        help="measure this part, may be repeated")  # fmt: skip
    router.add_argument(
        "--litellm", type=program, metavar="PATH", help="LiteLLM's program, to be measured beside, one worker"
    )
    router.add_argument("--json", action="store_true", help="print JSON")
    router.set_defaults(run=_run, table=lambda report: f"{_table(report)}\n{ending(report)}")


def _seconds(text: str) -> tuple[float, ...]:
    return tuple(above_zero(float)(part) for part in text.split(","))


def _run(given: argparse.Namespace) -> Report:
    return bench_router(
        turns=given.turns,
        seconds=given.seconds,
        rounds=given.rounds,
        reload_count=given.reloads,
        outages=given.outages,
        only=given.only,
        litellm=given.litellm,
        progress=lambda text: print(text, file=sys.stderr, flush=True),
    )


def bench_router(
    *,
    turns: int = 10_000,
    seconds: float = 5.0,
    rounds: int = 3,
    reload_count: int = 100,
    outages: Collection[float] = (3.0, 10.0, 20.0),
    only: Collection[str] = (),
    litellm: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Run the benchmark and return its figures.

    Raises:
        RuntimeError: a process of it did not start or ended early.
    """
    parts = only or PARTS
    report: Report = {
        "machine": machine(),
        "options": {
            "turns": turns, "seconds": seconds, "rounds": rounds, "parts": [*parts], "threshold_ms": LATENCY * 1000
        },
        "on": "authentication, routing, sessions of five turns written to disk, metrics; kept answers off",
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        rig = Rig(stack)
        lite = LiteLlm(stack, litellm, rig) if litellm is not None else None
        speed = Comparison(rig, lite, seconds=seconds, rounds=rounds, tell=progress)
        # First what nothing has disturbed yet.
        if "speed" in parts:
            report["flat_out"] = {str(streams): speed.flat_out(streams) for streams in _SPEED_STREAMS}
            report["paced"] = speed.paced(together=True)
            report["paced_spread"] = speed.paced(together=False)
        if "dead" in parts:
            report["dead_first"] = speed.dead_first()
        if "switches" in parts:
            report["switches"] = switches(rig, seconds, progress)
        if "faults" in parts:
            report |= mixed(rig, turns, progress)
        if "reload" in parts:
            report["reload"] = reloads(rig, reload_count, progress)
        if "healing" in parts:
            report["healing"] = healing(rig, tuple(outages), progress)
    if "flight" in parts:
        report["single_flight"] = single_flight("deterministic", progress)
    return {"bars": dict(_bars(report)), **_headline(report), **report}


def _headline(report: Report) -> Report:
    """Return the figures that machines ask for by name; those that were not measured are missing."""
    found: Report = {}
    if "mixed_faults" in report:
        mixed_faults, kept_on, dead = (
            report[name] for name in ("mixed_faults", "mixed_faults_kept_on", "dead_primary")
        )
        found["visible_failures"] = sum(each["visible_failures"] for each in (mixed_faults, kept_on, dead))
        found["attempts_per_turn"] = max(mixed_faults["attempts_per_turn"], kept_on["attempts_per_turn"])
        found["attempts_per_turn_dead_primary"] = dead["attempts_per_turn"]
    if "flat_out" in report:
        at_16 = report["flat_out"]["16"]
        found["added_ttft_ms_p50"] = report["paced"]["added_ttft_ms_p50"]["median"]
        found["added_ttft_ms_p50_spread"] = report["paced_spread"]["added_ttft_ms_p50"]["median"]
        found["added_ttft_ms_p50_flat_out"] = at_16["added_ttft_ms_p50"]["median"]
        found["turns_per_s"] = at_16["doors"]["moltbot"]["turns_per_s"]
        found["direct_turns_per_s"] = at_16["doors"]["direct"]["turns_per_s"]
    return found


def _bars(report: Report) -> Iterator[tuple[str, Report]]:
    """Yield what was measured beside what it has to be."""
    head = _headline(report)
    if "mixed_faults" in report:
        yield "visible_failures", bar(head["visible_failures"], "<=", 0)
        yield "attempts_per_turn", bar(head["attempts_per_turn"], "<=", 1.4)
        yield "attempts_per_turn_dead_primary", bar(head["attempts_per_turn_dead_primary"], "<=", 1.1)
    if "switches" in report:
        errs, hangs = report["switches"]["errs"], report["switches"]["hangs"]
        yield "first_token_p99_ms_when_it_errs", bar(errs["first_token_ms"].get("p99"), "<=", 1000)
        yield "first_token_p99_ms_when_it_hangs", bar(hangs["first_token_ms"].get("p99"), "<=", LATENCY * 1000 + 500)
        yield "failures_of_switches", bar(errs["visible_failures"] + hangs["visible_failures"], "<=", 0)
    if "dead_first" in report:
        door = report["dead_first"]["doors"]["moltbot"]
        yield "dead_first_turns_per_s", bar(door["turns_per_s"], ">=", 200)
        yield "dead_first_first_token_p50_ms", bar(door["first_token_ms"]["p50"], "<=", 50)
        yield "dead_first_failures", bar(door["visible_failures"], "<=", 0)
        yield from _against_litellm(report["dead_first"], "dead_first_litellm_ratio")
    if "healing" in report:
        yield "return_s", bar(report["healing"]["return_s"], "<=", 10)
        yield "failures_of_trials", bar(sum(row["visible_failures"] for row in report["healing"]["outages"]), "<=", 0)
    if "reload" in report:
        yield "reload_failed_turns", bar(report["reload"]["failed_turns"], "<=", 0)
    if "single_flight" in report:
        yield "single_flight_upstream_calls", bar(report["single_flight"]["upstream_calls"], "<=", 1)
        yield "single_flight_failures", bar(report["single_flight"]["visible_failures"], "<=", 0)
    if "flat_out" in report:
        yield "added_ttft_ms_p50", bar(head["added_ttft_ms_p50"], "<=", 5)
        yield "added_ttft_ms_p50_spread", bar(head["added_ttft_ms_p50_spread"], "<=", 5)
        yield "added_ttft_ms_p50_flat_out", bar(head["added_ttft_ms_p50_flat_out"], "<=", 5)
        for streams, found in report["flat_out"].items():
            yield f"failures_at_{streams}", bar(found["doors"]["moltbot"]["visible_failures"], "<=", 0)
            yield from _against_litellm(found, f"litellm_ratio_at_{streams}")


def _against_litellm(found: Report, name: str) -> Iterator[tuple[str, Report]]:
    if "litellm_ratio" in found:
        yield name, bar(found["litellm_ratio"].get("median"), ">=", 10)


def _table(report: Report) -> str:
    lines = [f"{'figure':<36}{'found':>10}   bar"]
    for name, found in report["bars"].items():
        value = "none" if found["value"] is None else f"{found['value']:,g}"
        lines.append(f"{name:<36}{value:>10}   {found['bar']:<10}{'' if found['met'] else 'NOT MET'}")
    compared = {f"{streams} streams": found for streams, found in report.get("flat_out", {}).items()}
    compared |= {"16 streams, paced": report["paced"]} if "paced" in report else {}
    compared |= {"16 spread, paced": report["paced_spread"]} if "paced_spread" in report else {}
    compared |= {"a dead first model": report["dead_first"]} if "dead_first" in report else {}
    if compared:
        lines += ["", f"{'':<32}{'turns/s':>9}{'first token p50':>17}{'p99':>10}   busy processors"]
    for what, found in compared.items():
        for door, figures in found["doors"].items():
            first = figures["first_token_ms"]
            busy = ", ".join(f"{name} {share:g}" for name, share in figures["processors"].items())
            lines.append(
                f"{what + ', ' + door:<32}{figures['turns_per_s']:>9,.0f}{first['p50'] or 0:>14,.1f} ms"
                f"{first['p99'] or 0:>7,.0f} ms   {busy}"
            )
    return "\n".join(lines)
