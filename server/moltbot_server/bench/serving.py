"""`moltbot bench serving SCENARIO`: a whole installation, as `moltbot start` runs it, and what it has to bear.

Each scenario runs for a bounded time, on free ports and in a workspace that is removed. Its report has `bars`: figures
beside what they have to be.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from moltbot_server.bench.arguments import above_zero
from moltbot_server.bench.core import machine
from moltbot_server.bench.serving_cancel import bench_cancel
from moltbot_server.bench.serving_fair import bench_fair
from moltbot_server.bench.serving_kill import bench_kill
from moltbot_server.bench.serving_overload import MODELS, bench_overload
from moltbot_server.bench.serving_steady import bench_sessions, bench_steady
from moltbot_server.bench.serving_switch import bench_switch

Report = dict[str, Any]
Options = dict[str, tuple[Callable[[str], Any], Any, str]]


def _model(text: str) -> str:
    if text not in MODELS:
        raise argparse.ArgumentTypeError(f"there is no {text!r} here; expected one of {', '.join(MODELS)}")
    return text


_SCENARIOS: dict[str, tuple[str, Callable[..., Report], Options]] = {
    "steady": (
        "turns at a steady rate: 116 a second are ten million a day, 1.157 a hundred thousand",
        bench_steady,
        {"rate": (float, 116.0, "turns a second"), "seconds": (float, 600.0, "how long")},
    ),
    "sessions": (
        "many sessions that each speak now and then",
        bench_sessions,
        {
            "sessions": (int, 500, "sessions that speak"),
            "every": (float, 10.0, "seconds between their words"),
            "seconds": (float, 60.0, "how long they speak"),
        },
    ),
    "overload": (
        "far more turns than can be answered",
        bench_overload,
        {
            "times-peak": (float, 10.0, "how many times the peak is offered"),
            "seconds": (float, 30.0, "how long"),
            "step": (float, 10.0, "seconds of each step on the way to the peak"),
            "model": (_model, "random", "random, one of 134 million parameters, or builtin"),
        },
    ),
    "fair": (
        "a workspace, and a session, beside one that asks many times its share",
        bench_fair,
        {
            "seconds": (float, 6.0, "length of a slice"),
            "rounds": (int, 4, "slices of each kind"),
            "times-share": (float, 50.0, "how many times its share the loud one asks"),
        },
    ),
    "switch": (
        "models switched under load, every tenth broken",
        bench_switch,
        {"switches": (int, 1000, "how many"), "rate": (float, 50.0, "turns a second")},
    ),
    "cancel": ("answers that nobody waits for any more", bench_cancel, {"cancels": (int, 1000, "how many")}),
    "kill": (
        "the engine killed under load",
        bench_kill,
        {
            "kills": (int, 10, "how many"),
            "every": (float, 65.0, "seconds between them; one that dies often is started again later each time"),
            "streams": (int, 48, "turns under way: some are written, some wait"),
        },
    ),
}


def add_serving(kinds: Any, ending: Callable[[Report], str]) -> None:
    """Add `serving` to the benchmarks of a command line; `ending` is what a table ends with."""
    serving = kinds.add_parser("serving", help="a whole installation in situations that it has to bear")
    scenarios = serving.add_subparsers(metavar="SCENARIO", required=True)
    for name, (text, bench, options) in _SCENARIOS.items():
        scenario = scenarios.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        for option, (kind, default, meaning) in options.items():
            reading = above_zero(kind) if kind in (int, float) else kind
            scenario.add_argument(
                f"--{option}", type=reading, default=default, help=f"{meaning} (default: %(default)s)"
            )
        scenario.add_argument("--cpus", type=_cpus, default=None, metavar="0,1", help="processors of the installation")
        scenario.add_argument("--json", action="store_true", help="print JSON")
        scenario.set_defaults(
            run=_run(name, bench, options), table=lambda report: f"{_table(report)}\n{ending(report)}"
        )


def _run(name: str, bench: Callable[..., Report], options: Options) -> Callable[[argparse.Namespace], Report]:
    names = [option.replace("-", "_") for option in options]

    def run(given: argparse.Namespace) -> Report:
        asked = {option: getattr(given, option) for option in names}
        found = bench(**asked, cpus=given.cpus, progress=_progress)
        on = sorted(given.cpus) if given.cpus else "all"
        return {"scenario": name, "machine": machine(), "cpus": on, "options": asked, **found}

    return run


def _cpus(text: str) -> set[int]:
    return {int(number) for number in text.split(",")}


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _table(report: Report) -> str:
    lines = [f"{'figure':<36}{'found':>10}   bar"]
    for name, found in report["bars"].items():
        value = "none" if found["value"] is None else f"{found['value']:,g}"
        lines.append(f"{name:<36}{value:>10}   {found['bar']:<10}{'' if found['met'] else 'NOT MET'}")
    return "\n".join(lines)
