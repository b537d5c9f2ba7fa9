"""Asks a core for very many turns of all kinds, and tells what they leave behind: memory, tasks, files, rows, keys.

`python tests/faults/soak.py --turns 1000000 --store sqlite --json soak.json`. Sessions are deleted after some turns, so
that whatever is left at the end is left over. It ends with 1 when something is.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import uvloop
from fault_nodes import Node, Setup
from fault_report import machine
from fault_stores import KINDS
from soak_people import People

BYTES_A_TURN = 1.0
"""How much of memory a turn may leave behind, in the long run."""
_AS_STARTED = {"MALLOC_ARENA_MAX": "2"}
"""What `moltbot start` tells the processes of a core."""
_SPARE_THREADS = 4
"""Threads that gRPC may have added to its pool by now; it takes them away again when there is little to do."""
_WARM = 100_000
_LONG = 1_000_000
_NOISE = 5e6
"""Bytes by which resident memory goes up and down: what a turn leaves behind is seen after many of them only."""
SCRIPT = """
rules:
  - {match: 'slow', template: 'said {text} one two three four five six seven eight nine', pace: 0.02}
  - {match: '.', template: 'said {text}'}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rest:
    """What a core has when nobody asks anything: memory in bytes, and the rest by number."""

    resident: int
    tasks: int
    files: int
    threads: int
    under_way: int
    left: dict[str, int]


@dataclass(slots=True, kw_only=True)
class Soaked:
    """What came of a soak. `samples` are of turns done and resident bytes, under load."""

    turns: int
    seconds: float = 0.0
    before: Rest | None = None
    after: Rest | None = None
    samples: list[tuple[int, int]] = field(default_factory=list)

    @property
    def bytes_a_turn(self) -> float:
        """How much resident memory grew for each turn, between the first and the last tenth of the samples."""
        tenth = max(1, len(self.samples) // 10)
        (began, small), (ended, large) = (
            (statistics.median(turn for turn, _ in part), statistics.median(size for _, size in part))
            for part in (self.samples[:tenth], self.samples[-tenth:])
        )
        return (large - small) / max(1.0, ended - began)

    def problems(self, most: float) -> list[str]:
        """Return what is left over, in words."""
        assert self.before is not None
        assert self.after is not None
        found = []
        if self.bytes_a_turn >= most:
            found.append(f"each turn left {self.bytes_a_turn:.2f} bytes of memory behind")
        for name in ("tasks", "files", "threads"):
            had, has = getattr(self.before, name), getattr(self.after, name)
            if has > had + (_SPARE_THREADS if name == "threads" else 0):
                found.append(f"there were {had} {name} and now there are {has}")
        if self.after.under_way:
            found.append(f"{self.after.under_way} turns are under way still")
        found += [f"{count} {name} are left" for name, count in self.after.left.items() if count]
        return found


class Soak:
    """One core, its store, and the people who keep it busy."""

    def __init__(self, folder: Path, *, store: str, turns: int, warm: int, samples: int, people: int) -> None:
        """The first `warm` turns fill what is bounded; then memory is looked at so many times."""
        self.keeping = KINDS[store](folder)
        self.setup = Setup(
            folder=folder, environ={**self.keeping.environ, **_AS_STARTED, "MOLTBOT_CACHE_ANSWERS": "off"}
        )
        self.setup.prepare()
        (folder / "script.yaml").write_text(SCRIPT)
        self.node = Node(self.setup, "soak", lambda _: None)
        self._warm, self._samples, self._people = warm, samples, people
        self.result = Soaked(turns=turns)

    async def run(self) -> Soaked:
        """Do it all, and end everything."""
        await self.keeping.start()
        try:
            await self.node.start()
            await self.node.ready()
            people = People(self.node.address, self.setup.key, self._people)
            try:
                await self._talk(people)
            finally:
                await people.close()
                await self.node.end_all()
        finally:
            await self.keeping.kill()
        return self.result

    async def _talk(self, people: People) -> None:
        result, began = self.result, time.monotonic()
        await people.talk(self._warm)
        result.before = await self._at_rest()
        step = max(1, (result.turns - self._warm) // self._samples)
        core = psutil.Process(self.node.process_id)
        while people.turns < result.turns:
            await people.talk(step, rest=False)
            result.samples.append((people.turns, core.memory_info().rss))
            if len(result.samples) % 20 == 0:
                speed = people.turns / (time.monotonic() - began)
                size = result.samples[-1][1] / 1e6
                print(f"{people.turns} turns, {speed:.0f} a second, {size:.1f} MB", file=sys.stderr, flush=True)
        await people.talk(0)
        result.after = await self._at_rest(result.before)
        result.turns, result.seconds = people.turns, time.monotonic() - began

    async def _at_rest(self, before: Rest | None = None) -> Rest:
        """Wait until nothing is under way, for some seconds at most, and return what there is.

        What is more than `before` is waited for as well: a connection that is being closed is not left over.
        """
        core = psutil.Process(self.node.process_id)
        until = time.monotonic() + 20.0
        while True:
            found = await self._gauges()
            left = await self.keeping.counts()
            rest = Rest(
                resident=core.memory_info().rss,
                tasks=int(found["moltbot_tasks"]),
                files=core.num_fds(),
                threads=core.num_threads(),
                under_way=int(found["moltbot_turns_under_way"]),
                left=left,
            )
            more = before is not None and (rest.tasks > before.tasks or rest.files > before.files)
            if time.monotonic() > until or not (more or rest.under_way or any(left.values())):
                return rest
            await asyncio.sleep(0.5)  # turns that nobody follows end by themselves

    async def _gauges(self) -> dict[str, float]:
        reader, writer = await asyncio.open_connection(*self.node.told["metrics"].rsplit(":", 1))
        writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
        page = (await reader.read(-1)).decode()
        writer.close()
        lines = (line.split() for line in page.splitlines() if line.startswith("moltbot_") and "{" not in line)
        return {line[0]: float(line[1]) for line in lines}


def report(result: Soaked, *, store: str, most: float, command: str) -> dict[str, Any]:
    """Return what is written down of a soak."""
    return {
        "store": store,
        "turns": result.turns,
        "seconds": round(result.seconds),
        "turns_per_s": round(result.turns / result.seconds, 1),
        "bytes_per_turn": round(result.bytes_a_turn, 3),
        "before": asdict(result.before) if result.before else None,
        "after": asdict(result.after) if result.after else None,
        "problems": result.problems(most),
        "samples": result.samples[:: max(1, len(result.samples) // 50)],
        "command": command,
        "machine": machine(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a program; return 1 when something is left over."""
    parser = argparse.ArgumentParser(description="Ask for very many turns, and tell what they leave behind.")
    parser.add_argument("--turns", type=int, default=1_000_000)
    parser.add_argument("--warm", type=int, default=0, help="turns before memory is looked at (default: 100,000)")
    parser.add_argument("--samples", type=int, default=400, help="how often it is looked at")
    parser.add_argument("--people", type=int, default=48, help="how many talk at the same time")
    parser.add_argument("--store", choices=tuple(KINDS), default="sqlite")
    parser.add_argument(
        "--most",
        type=float,
        default=0.0,
        help="bytes of memory that a turn may leave (default: 1, or more in short runs)",
    )
    parser.add_argument("--json", type=Path, help="write the figures to a file")
    flags = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="moltbot-soak-") as folder:
        soak = Soak(
            Path(folder),
            store=flags.store,
            turns=flags.turns,
            warm=flags.warm or min(_WARM, flags.turns // 2),
            samples=flags.samples,
            people=flags.people,
        )
        result = uvloop.run(soak.run())
    command = f"python tests/faults/soak.py --turns {flags.turns} --store {flags.store} --people {flags.people}"
    most = flags.most or (BYTES_A_TURN if flags.turns >= _LONG else _NOISE / flags.turns)
    told = report(result, store=flags.store, most=most, command=command)
    if flags.json:
        flags.json.write_text(json.dumps(told, indent=1) + "\n")
    problems = told["problems"]
    for problem in problems:
        print(problem)
    print(
        f"turns={result.turns} seconds={result.seconds:.0f} bytes_per_turn={result.bytes_a_turn:.3f} "
        f"left_over={len(problems)} store={flags.store}"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
