"""Ends cores at random moments under load, and checks what everybody was told against what was kept.

`python tests/faults/fault_run.py --kills 100` kills a core a hundred times while people talk; it ends with one line:
`kills=… turns=… lost=… duplicated=… mixed=… out_of_order=…` and 1 when anything was broken. With 2 it could not be
carried out: a core did not come to serve.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import fault_history
from fault_checker import DUPLICATED, LATE, LOST, MIXED, OUT_OF_ORDER, Violation, check
from fault_http import Adapter, HttpFollower, HttpLines
from fault_keeping import kept_in
from fault_load import Load, pauses
from fault_nodes import TAILS, Node, NotServing, Setup, Supervised, Workers
from fault_report import Host, machine
from fault_stores import KINDS

LONGEST_PAUSE = 6.0
"""Seconds from the end of a core to the next word of a stream that it cut."""
NOT_CARRIED_OUT = 2
_ENDS = frozenset({"kill", "leave"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What a run does: how often and how cores are ended, and who talks meanwhile."""

    kills: int = 100
    how: str = "kill"
    streams: int = 64
    nodes: int = 1
    sticky: bool = False
    adapters: int = 0
    model: str = "scripted"
    store: str = "sqlite"
    supervised: bool = False
    workers: int = 1
    grace: float = 5.0
    each: int = 50
    """So many ends in one workspace; then all is checked, and it goes on with another."""


@dataclass(slots=True)
class Findings:
    """What came of a run."""

    kills: int = 0
    stops: int = 0
    turns: int = 0
    failed: int = 0
    broken_streams: int = 0
    seconds: float = 0.0
    pauses: list[float] = field(default_factory=list)
    beside_still: list[float] = field(default_factory=list)
    """Pauses during which a core stood still."""
    violations: list[Violation] = field(default_factory=list)
    codes: dict[str, int] = field(default_factory=dict)
    """How often cores ended with each exit code; -9 is SIGKILL."""
    legs: list[dict[str, float]] = field(default_factory=list)
    """Of each leg its kills, its longest pause and the shares of the processors that the host took away."""

    def add(self, other: Findings) -> None:
        """Add what came of another one."""
        for name in ("kills", "stops", "turns", "failed", "broken_streams"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.pauses += other.pauses
        self.beside_still += other.beside_still
        self.legs += other.legs
        self.violations += other.violations
        self.codes = dict(Counter(self.codes) + Counter(other.codes))

    def pause(self, share: float) -> float:
        """Return the pause that so many streams had at most."""
        ordered = sorted(self.pauses)
        return ordered[int(share * (len(ordered) - 1))] if ordered else 0.0

    @property
    def counts(self) -> dict[str, int]:
        """How many violations there are of each kind."""
        found = Counter(violation.kind for violation in self.violations)
        return {kind: found.get(kind, 0) for kind in (LOST, DUPLICATED, MIXED, OUT_OF_ORDER, LATE, "broken")}

    def line(self) -> str:
        """Return the line that says it all."""
        counts = self.counts
        told = " ".join(f"{kind}={counts[kind]}" for kind in (LOST, DUPLICATED, MIXED, OUT_OF_ORDER))
        return f"kills={self.kills} turns={self.turns} {told}"

    def more(self) -> str:
        """Return the line before it."""
        p50, p95, p99 = (self.pause(share) for share in (0.5, 0.95, 0.99))
        return (
            f"resumed p50={p50:.2f}s p95={p95:.2f}s p99={p99:.2f}s longest={self.pause(1.0):.2f}s "
            f"of {len(self.pauses)} broken streams, {max(self.beside_still, default=0.0):.2f}s "
            f"of {len(self.beside_still)} beside a core that stood still; failed={self.failed} stops={self.stops} "
            f"late={self.counts[LATE]} broken={self.counts['broken']} seconds={self.seconds:.0f}"
        )


class Leg:
    """One workspace, its nodes and the people who talk, while cores are ended."""

    def __init__(self, folder: Path, orders: Orders, seed: int) -> None:
        self.orders = orders
        self.keeping = KINDS[orders.store](folder)
        environ = self.keeping.environ | ({"WORKERS": str(orders.workers)} if orders.workers > 1 else {})
        self.setup = Setup(folder=folder, model=orders.model, grace=orders.grace, environ=environ)
        self.setup.prepare()
        self.dice = random.Random(seed)
        self.findings = Findings()
        make = Workers if orders.workers > 1 else Supervised if orders.supervised else Node
        self.nodes = [make(self.setup, f"n{number}", self._note) for number in range(orders.nodes)]
        core = self.nodes[0].address
        self.adapters = [
            Adapter(self.setup, f"http{number}", self._note, core=core) for number in range(orders.adapters)
        ]
        self.load = self._people(seed)

    def _people(self, seed: int) -> Load:
        """Return who talks: over HTTP where there are adapters, else with the nodes themselves."""
        orders, key = self.orders, self.setup.key
        kinds = tuple(TAILS) if orders.model == "scripted" else ()
        if not self.adapters:
            return Load(seed, self.nodes, key, sessions=orders.streams, kinds=kinds, sticky=orders.sticky)
        return Load(
            seed,
            self.nodes,
            key,
            sessions=orders.streams,
            kinds=kinds,
            follower=HttpFollower,
            lines=lambda: HttpLines(self.adapters, key),
        )

    def _note(self, entry: fault_history.Entry) -> None:
        self.load.note(entry)

    async def run(self, kills: int) -> Findings:
        """End cores so many times, let everything come to its end, and check it."""
        try:
            await self.keeping.start()
            try:
                await self._talk_and_end(kills)
            finally:
                for node in (*self.adapters, *self.nodes):
                    await node.end_all()
            await self._check()
        finally:
            await self.keeping.kill()
        return self.findings

    async def _talk_and_end(self, kills: int) -> None:
        everything = [*self.nodes, *self.adapters]
        for node in everything:
            await node.start()
        await asyncio.gather(*(node.ready() for node in everything))
        self.load.begin()
        while self.findings.kills < kills:
            await self._end_one(self.dice.choice(self.adapters or self.nodes))
        for node in everything:
            await node.ready()
        async with asyncio.timeout(180):
            await self.load.finish()
        if self.orders.how == "store" or self.adapters:  # all cores are those that began
            counted = [await node.ends_counted() for node in self.nodes]
            self._note(fault_history.Counted(at=time.monotonic(), turns=sum(counted)))
        for node in (*self.adapters, *self.nodes):
            node.send(signal.SIGTERM, "stop at the end")
            await node.end()

    async def _end_one(self, node: Node) -> None:
        """End a core and start it again; now while it starts, now soon after, now in the middle of everything."""
        dice, findings = self.dice, self.findings
        if self.orders.how == "store":
            await asyncio.sleep(dice.random() * 2.0)
            findings.kills += 1
            self._note(fault_history.Fault(at=time.monotonic(), what="kill", node="store"))
            await self.keeping.kill()
            await asyncio.sleep(dice.random() * 3.0)
            await self.keeping.start()
            return
        if self.orders.how == "leave":
            await asyncio.sleep(dice.random() * 2.0)
            findings.kills += 1
            await node.restart(self.orders.grace)
            return
        if dice.random() < 0.2:
            await asyncio.sleep(dice.random() * 1.5)  # perhaps it does not serve yet
        else:
            await node.ready()
            await asyncio.sleep(dice.random() * 3.0)
            if dice.random() < 0.1 and not self.orders.supervised and self.orders.workers == 1:
                await self._stand_still(node)
        findings.kills += 1
        await node.kill()
        await node.start()

    async def _stand_still(self, node: Node) -> None:
        self.findings.stops += 1
        node.send(signal.SIGSTOP, "stop")
        await asyncio.sleep(self.dice.random() * 2.0)
        node.send(signal.SIGCONT, "go_on")
        await asyncio.sleep(self.dice.random())

    async def _check(self) -> None:
        findings, history = self.findings, self.load.history
        history += await kept_in(self.keeping.store(), history)
        findings.turns, findings.failed = self.load.turns, self.load.failed
        findings.violations = check(history)
        if left := self.keeping.left():
            findings.violations.append(
                Violation(kind="broken", subject="store", problem=f"{left} journal entries left")
            )
        findings.pauses, findings.beside_still = pauses(history, lambda what: what in _ENDS)
        findings.broken_streams = len(findings.pauses) + len(findings.beside_still)
        findings.codes = dict(Counter(str(code) for node in self.nodes for code in node.codes))


async def run(orders: Orders, folder: Path, seed: int, told: Callable[[str], None] = lambda _: None) -> Findings:
    """Carry out orders leg by leg; the history of one with a broken promise or too long a pause stays in the folder."""
    findings, began, number = Findings(), time.monotonic(), 0
    while findings.kills < orders.kills:
        number += 1
        place = folder / f"leg-{seed}-{number}"
        place.mkdir(parents=True)
        leg, host = Leg(place, orders, seed * 1000 + number), Host(folder)
        part = await leg.run(min(orders.each, orders.kills - findings.kills))
        part.legs.append({"kills": part.kills, "longest": round(part.pause(1.0), 3), **await host.end()})
        findings.add(part)
        findings.seconds = time.monotonic() - began
        if part.violations or part.pause(1.0) > LONGEST_PAUSE:
            fault_history.write(folder / f"history-{seed}-{number}.jsonl", leg.load.history)
        told(f"leg {number}: {findings.line()} ({findings.more()}); this leg {part.legs[0]}")
    return findings


def _report(findings: Findings, orders: Orders, seed: int, rigs: int) -> dict[str, object]:
    return {
        "orders": asdict(orders),
        "seed": seed,
        "rigs": rigs,
        "kills": findings.kills,
        "stops": findings.stops,
        "turns": findings.turns,
        "failed": findings.failed,
        **findings.counts,
        "resumed": {
            "streams": len(findings.pauses),
            **{f"p{share}": round(findings.pause(share / 100), 3) for share in (50, 90, 95, 99)},
            "longest": round(findings.pause(1.0), 3),
            "beside_a_core_that_stood_still": {
                "streams": len(findings.beside_still),
                "longest": round(max(findings.beside_still, default=0.0), 3),
            },
        },
        "legs": findings.legs,
        "exit_codes": findings.codes,
        "seconds": round(findings.seconds),
        "command": _command(orders, seed, rigs),
        "machine": machine(),
    }


def _command(orders: Orders, seed: int, rigs: int) -> str:
    """Return what repeats a run: the same faults in the same order, at moments that differ by what the machine does."""
    plain = Orders()
    flags = [f"--seed {seed}", f"--rigs {rigs}"]
    for name, value in asdict(orders).items():
        if value != getattr(plain, name):
            flags.append(f"--{name}" if value is True else f"--{name} {value}")
    return f"python tests/faults/fault_run.py {' '.join(flags)}"


async def _rigs(orders: Orders, folder: Path, seed: int, rigs: int) -> Findings:
    """Carry orders out by several programs side by side, each with its own cores and people."""
    share = [orders.kills // rigs + (number < orders.kills % rigs) for number in range(rigs)]
    processes = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, __file__, "--kills", str(kills), "--how", orders.how, "--streams", str(orders.streams)),
            *("--nodes", str(orders.nodes), "--model", orders.model, "--seed", str(seed + number)),
            *("--store", orders.store, "--adapters", str(orders.adapters)),
            *(("--supervised",) if orders.supervised else ()),
            *("--workers", str(orders.workers)),
            *(("--sticky",) if orders.sticky else ()),
            *("--each", str(orders.each), "--folder", str(folder), "--raw", str(folder / f"raw-{number}.json")),
        )
        for number, kills in enumerate(share)
    ]
    findings = Findings()
    codes = [await process.wait() for process in processes]
    if any(codes):
        raise NotServing(f"rigs ended with {', '.join(map(str, codes))}; those that could not go on have said why")
    for number in range(rigs):
        raw = json.loads((folder / f"raw-{number}.json").read_text())
        part = Findings(**{**raw, "violations": [Violation(**found) for found in raw["violations"]]})
        findings.add(part)
        findings.seconds = max(findings.seconds, part.seconds)
    return findings


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a program; return 1 when anything was broken, 2 when a core did not come to serve."""
    parser = argparse.ArgumentParser(description="End cores under load and check what everybody was told.")
    parser.add_argument("--kills", type=int, default=100)
    how = "SIGKILL or SIGTERM of a core, or of an adapter where there are some; or SIGKILL of Redis"
    parser.add_argument("--how", choices=("kill", "leave", "store"), default="kill", help=how)
    parser.add_argument("--store", choices=tuple(KINDS), default="sqlite")
    parser.add_argument("--streams", type=int, default=64, help="sessions that talk at the same time, in each rig")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--sticky", action="store_true", help="each session talks with one node only")
    parser.add_argument("--adapters", type=int, default=0, help="HTTP adapters, which are ended in place of the core")
    parser.add_argument("--model", choices=("scripted", "builtin"), default="scripted")
    parser.add_argument("--workers", type=int, default=1, help="cores of an installation, which share its port")
    parser.add_argument("--supervised", action="store_true", help="whole installations, as `moltbot start` runs them")
    parser.add_argument("--longest", type=float, default=LONGEST_PAUSE, help="seconds that a stream may be cut for")
    parser.add_argument("--rigs", type=int, default=1, help="how many of all this side by side")
    parser.add_argument("--each", type=int, default=50, help="ends in one workspace, before all is checked")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep workspaces and histories here")
    parser.add_argument("--json", type=Path, help="write the figures to a file")
    parser.add_argument("--raw", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    chosen = (
        "kills",
        "how",
        "streams",
        "nodes",
        "model",
        "store",
        "supervised",
        "workers",
        "each",
        "sticky",
        "adapters",
    )
    orders = Orders(**{name: getattr(flags, name) for name in chosen})
    with tempfile.TemporaryDirectory(prefix="moltbot-faults-") as temporary:
        folder = flags.folder or Path(temporary)
        rigs = _rigs(orders, folder, flags.seed, flags.rigs) if flags.rigs > 1 else None
        try:
            findings = asyncio.run(rigs or run(orders, folder, flags.seed, _tell))
        except NotServing as problem:
            _tell(f"fault_run: {problem}")
            return NOT_CARRIED_OUT
    if flags.raw:
        flags.raw.write_text(json.dumps(asdict(findings)))
        return 0
    if flags.json:
        flags.json.write_text(json.dumps(_report(findings, orders, flags.seed, flags.rigs), indent=1) + "\n")
    for violation in findings.violations[:20]:
        print(f"{violation.kind}: {violation.subject}: {violation.problem}")
    print(findings.more())
    print(findings.line())
    slow = flags.how == "kill" and findings.pause(1.0) > flags.longest
    return 1 if findings.violations or slow else 0


if __name__ == "__main__":
    sys.exit(main())
