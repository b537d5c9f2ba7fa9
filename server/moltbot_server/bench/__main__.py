"""`moltbot bench`, which is `python -m moltbot_server.bench`: measures this machine.

What it prints can be repeated with the same command.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from moltbot_server.bench.stopping import STATUS, cleaned_up, leave_when_stopped

if __name__ == "__main__":
    leave_when_stopped()  # what comes next takes a second to load

from moltbot_server.bench.chat import bench_chat
from moltbot_server.bench.core import PAIRS, bench_core
from moltbot_server.bench.durability_command import add_durability
from moltbot_server.bench.local_command import add_local
from moltbot_server.bench.router import add_router
from moltbot_server.bench.scale import bench_scale, scale_table
from moltbot_server.bench.serving import add_serving

_EPILOG = """\
examples:
  moltbot bench core                  the core against a bare gRPC server, as a table
  moltbot bench core --json           the same for machines: unary_ratio, stream_ratio, coalesced_ratio
  moltbot bench chat --cpus 0,1       a whole installation with the built-in model on two processors
  moltbot bench local                 streams through gRPC against CTranslate2 by itself
  moltbot bench durability            what it costs that nothing is lost
  moltbot bench router                what a route costs, and what users see of its models' faults
  moltbot bench scale                 what two and four workers bring
  moltbot bench serving steady        ten minutes of 116 turns a second; `serving --help` has more situations

Everything runs on this machine, for a bounded time, in a folder that is removed."""


def main(arguments: Sequence[str]) -> int:
    """Run a benchmark and print its figures; return the exit status."""
    given = _parser().parse_args(arguments)
    try:
        with cleaned_up():
            report = given.run(given)
    except RuntimeError as error:
        print(f"moltbot: the benchmark broke off: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return STATUS
    print(json.dumps(report, indent=2) if given.json else given.table(report))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moltbot bench",
        description="Measure this machine.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    kinds = parser.add_subparsers(metavar="WHAT", required=True)
    core = kinds.add_parser("core", help="whole turns of the core against a bare gRPC server, in pairs")
    core.add_argument("--seconds", type=_positive, default=2.0, help="length of a slice (default: %(default)s)")
    core.add_argument(
        "--rounds", type=_at_least_one, default=5, help="pairs of slices for each figure (default: %(default)s)"
    )
    core.add_argument("--in-flight", type=_at_least_one, default=128, help="calls in flight (default: %(default)s)")
    core.set_defaults(run=_core, table=_core_table)
    chat = kinds.add_parser("chat", help="a whole installation with the built-in model: start, first token, memory")
    chat.add_argument("--sessions", type=int, default=200, help="sessions that speak (default: %(default)s)")
    chat.add_argument("--every", type=_positive, default=5.0, help="seconds between their words (default: %(default)s)")
    chat.add_argument("--seconds", type=_positive, default=60.0, help="how long they speak (default: %(default)s)")
    chat.add_argument(
        "--chats", type=_at_least_one, default=100, help="first chats, one after another (default: %(default)s)"
    )
    chat.add_argument("--cpus", type=_cpus, default=None, metavar="0,1", help="processors of the installation")
    chat.set_defaults(run=_chat, table=_chat_table)
    scale = kinds.add_parser("scale", help="what more workers bring, with the load on the same machine")
    scale.add_argument("--seconds", type=_positive, default=4.0, help="length of a slice (default: %(default)s)")
    scale.add_argument("--rounds", type=_at_least_one, default=9, help="slices of each (default: %(default)s)")
    scale.add_argument("--in-flight", type=_at_least_one, default=256, help="calls in flight (default: %(default)s)")
    scale.add_argument(
        "--connections", type=_at_least_one, default=64, help="connections of the load (default: %(default)s)"
    )
    scale.add_argument(
        "--loaders", type=_at_least_one, default=2, help="processes that make the load (default: %(default)s)"
    )
    scale.set_defaults(run=_scale, table=lambda report: f"{scale_table(report)}\n{_machine(report)}")
    for kind in (core, chat, scale):
        kind.add_argument("--json", action="store_true", help="print JSON")
    add_local(kinds, _machine)
    add_durability(kinds, _machine)
    add_router(kinds, _machine)
    add_serving(kinds, _machine)
    return parser


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def _cpus(text: str) -> set[int]:
    return {int(number) for number in text.split(",")}


def _progress(given: argparse.Namespace) -> Callable[[str], None]:
    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    return (lambda _: None) if given.json else tell


def _core(given: argparse.Namespace) -> dict[str, Any]:
    return bench_core(
        seconds=given.seconds, rounds=given.rounds, in_flight=max(1, given.in_flight // 2), progress=_progress(given)
    )


def _scale(given: argparse.Namespace) -> dict[str, Any]:
    return bench_scale(
        seconds=given.seconds,
        rounds=given.rounds,
        in_flight=given.in_flight,
        connections=given.connections,
        loaders=given.loaders,
        progress=_progress(given),
    )


def _chat(given: argparse.Namespace) -> dict[str, Any]:
    return bench_chat(
        sessions=given.sessions,
        every=given.every,
        seconds=given.seconds,
        chats=given.chats,
        cpus=given.cpus,
        progress=_progress(given),
    )


def _core_table(report: dict[str, Any]) -> str:
    lines = [f"{'figure':<18}{'median':>8}{'lowest':>8}{'highest':>9}   a second (core / bare)"]
    for figure, turn, bare, unit in PAIRS:
        detail = report[figure.replace("ratio", "detail")]
        speeds = f"{detail[turn][unit]:,.0f} / {detail[bare][unit]:,.0f} {unit}"
        lines.append(f"{figure:<18}{report[figure]:>8.2f}{detail['lowest']:>8.2f}{detail['highest']:>9.2f}   {speeds}")
    return "\n".join([*lines, _machine(report)])


def _chat_table(report: dict[str, Any]) -> str:
    lines = [
        f"moltbot start to serving      {report['serving_s']:.2f} s",
        f"… to a first answer           {report['first_answer_s']:.2f} s",
        f"first token through gRPC      p50 {report['first_token_grpc_ms']['p50']:.1f} ms",
        f"first token through HTTP      p50 {report['first_token_http_ms']['p50']:.1f} ms",
        f"memory of all processes       {report['memory_mb']['all']:.0f} MB",
    ]
    if "sessions" in report:
        many = report["sessions"]
        lines.append(
            f"{many['sessions']} sessions, every {many['every_s']:g} s   {many['errors']} errors in {many['turns']} "
            f"turns, first token p99 {many['first_token_ms']['p99']:.1f} ms"
        )
    return "\n".join([*lines, _machine(report)])


def _machine(report: dict[str, Any]) -> str:
    on = report["machine"]
    return (
        f"\n{on['processors']} processors ({on['processor']}), Python {on['python']}, grpcio {on['grpcio']}, "
        f"commit {on['commit'] or 'unknown'}, {on['date']}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
