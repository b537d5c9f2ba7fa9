"""Kills cores and adapters at random moments while answers go to places, and checks what a platform was given.

`make deliveries KILLS=100` ends with one line, `kills=… turns=… lost=… duplicated=… mixed=…
out_of_order=…`, and 1 when anything was broken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from asyncio.subprocess import DEVNULL, Process
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import posting_adapter
from fault_checker import DUPLICATED, LOST, MIXED, OUT_OF_ORDER, Violation
from fault_deliveries import Given, Note, Owed, Posted, Row, check_deliveries
from fault_nodes import Node, Setup
from fault_stores import KINDS
from moltbot import MoltBot
from moltbot.v1 import chat_pb2

LEASE = "2s"
_SETTLE = 90.0
"""Seconds within which everything is posted when nobody is killed any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """How many kills there are, and among how many sessions, cores and adapters."""

    kills: int = 40
    sessions: int = 12
    nodes: int = 1
    adapters: int = 2
    store: str = "sqlite"


@dataclass(slots=True)
class Findings:
    """What came of a run. `repeats`: posts whose key the platform knew."""

    kills: Counter[str] = field(default_factory=Counter)
    turns: int = 0
    repeats: int = 0
    seconds: float = 0.0
    violations: list[Violation] = field(default_factory=list)

    def line(self) -> str:
        """Return the line that says it all."""
        found = Counter(violation.kind for violation in self.violations)
        told = " ".join(f"{kind}={found[kind]}" for kind in (LOST, DUPLICATED, MIXED, OUT_OF_ORDER))
        return f"kills={self.kills.total()} turns={self.turns} {told}"


class Platform:
    """A platform on a port that shows each key once."""

    def __init__(self) -> None:
        self.notes: list[Note] = []
        self.shown: dict[str, Posted] = {}
        self.port = 0
        self._given: set[tuple[str, str, int]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._take, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Listen no more."""
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            line = await reader.readline()
            if line.endswith(b"\n"):
                writer.write(f"{self._show(**json.loads(line))}\n".encode())
                await writer.drain()
        except OSError:
            pass  # the adapter was killed
        finally:
            writer.close()

    def _show(self, *, adapter: str, key: str, attempt: int, turn: str, place: str, text: str, failed: str) -> int:
        now = time.monotonic()
        if (adapter, key, attempt) not in self._given:
            self._given.add((adapter, key, attempt))
            self.notes.append(Given(at=now, adapter=adapter, key=key, attempt=attempt))
        post = Posted(
            at=now, adapter=adapter, key=key, turn=turn, place=place, text=text or failed, shown=key not in self.shown
        )
        self.notes.append(post)
        self.shown.setdefault(key, post)
        return len(self.shown)


class Adapter:
    """An adapter's process, which is started again when it was killed."""

    def __init__(self, name: str, addresses: str, key: str, port: int) -> None:
        self.name = name
        self._arguments = (addresses, key, str(port))
        self._lives = 0
        self._process: Process | None = None

    async def start(self) -> None:
        """Start it; each life has a name of its own."""
        self._lives += 1
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, posting_adapter.__file__, *self._arguments, f"{self.name}.{self._lives}"),
            stdin=DEVNULL,
            stdout=DEVNULL,
            stderr=DEVNULL,
        )

    async def kill(self) -> None:
        """End it at once."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


class Run:
    """One run: people who talk, cores and adapters that are killed, a platform that remembers."""

    def __init__(self, folder: Path, orders: Orders, seed: int) -> None:
        self.orders = orders
        self.keeping = KINDS[orders.store](folder)
        environ = {**self.keeping.environ, "MOLTBOT_OUTBOX_LEASE": LEASE, "MOLTBOT_OUTBOX_MAX_ATTEMPTS": "1000"}
        self.setup = Setup(folder=folder, environ=environ)
        self.setup.prepare()
        self.dice = random.Random(seed)
        self.findings = Findings()
        self.platform = Platform()
        self.nodes = [Node(self.setup, f"n{number}", lambda entry: None) for number in range(orders.nodes)]
        self.owed: list[Owed] = []
        self._stopping = asyncio.Event()
        self._adapters: list[Adapter] = []

    async def run(self) -> Findings:
        """Let it all happen, and check it."""
        began = time.monotonic()
        await self.keeping.start()
        await self.platform.start()
        addresses = ",".join(node.address for node in self.nodes)
        self._adapters = [
            Adapter(f"a{number}", addresses, self.setup.key, self.platform.port)
            for number in range(self.orders.adapters)
        ]
        try:
            for each in (*self.nodes, *self._adapters):
                await each.start()
            for node in self.nodes:
                await node.ready()
            people = [asyncio.create_task(self._talk(number)) for number in range(self.orders.sessions)]
            while self.findings.kills.total() < self.orders.kills:
                await self._kill_one()
            self._stopping.set()
            await asyncio.gather(*people)
            await self._settle()
        finally:
            for adapter in self._adapters:
                await adapter.kill()
            for node in self.nodes:
                await node.end_all()
        await self._check()
        await self.platform.close()
        await self.keeping.kill()
        self.findings.seconds = time.monotonic() - began
        return self.findings

    async def _talk(self, number: int) -> None:
        """Ask one question after the other in a session of its own, whose answers go to a place of its own."""
        dice = random.Random(f"{self.dice.random()}/{number}")
        node = self.nodes[number % len(self.nodes)]
        place = chat_pb2.Place(channel=posting_adapter.CHANNEL, address=f"place {number}")
        asked = 0
        async with MoltBot(node.address, self.setup.key, patience=120.0) as bot:
            while not self._stopping.is_set():
                asked += 1
                question = f"q{number}.{asked} {dice.choice(('quick', 'steady', 'late'))}"
                await self._ask(bot, question, f"s{number}", place)
                await asyncio.sleep(dice.random() * 0.3)

    async def _ask(self, bot: MoltBot, question: str, session: str, place: chat_pb2.Place) -> None:
        turn = text = ""
        async for event in bot.stream_turn(question, session=session, request_id=question, reply_to=place):
            turn = event.accepted.turn or turn
            text = event.completed.text or event.failed.reason or text
        self.findings.turns += 1
        self.owed.append(Owed(turn=turn, place=place.address, text=text))

    async def _kill_one(self) -> None:
        dice = self.dice
        await asyncio.sleep(0.2 + dice.random() * 1.5)
        if dice.random() < 0.5:
            node = dice.choice(self.nodes)
            await node.ready()
            await node.kill()
            self.findings.kills["core"] += 1
            await node.start()
        else:
            adapter = dice.choice(self._adapters)
            await adapter.kill()
            self.findings.kills["adapter"] += 1
            await adapter.start()

    async def _settle(self) -> None:
        """Wait until everything is posted, and confirmed."""
        until = time.monotonic() + _SETTLE
        turns = {debt.turn for debt in self.owed}
        while time.monotonic() < until:
            if turns <= {post.turn for post in self.platform.shown.values()}:
                await asyncio.sleep(1.0)  # for the last confirmations
                return
            await asyncio.sleep(0.2)  # what is posted is noted by the platform alone

    async def _check(self) -> None:
        store = self.keeping.store()
        await store.open()
        try:
            left = sum(number for (_, state), number in (await store.outbox.count()).items() if state == "open")
        finally:
            await store.close()
        posts = list(self.platform.shown.values())
        posts.sort(key=lambda post: int(post.turn.rpartition("/")[2]))
        rows = [Row(key=post.key, turn=post.turn, place=post.place, state="delivered") for post in posts]
        self.findings.repeats = sum(isinstance(note, Posted) and not note.shown for note in self.platform.notes)
        self.findings.violations = check_deliveries([*self.platform.notes, *self.owed, *rows])
        if left:
            problem = f"{left} deliveries are open still"
            self.findings.violations.append(Violation(kind=LOST, subject="outbox", problem=problem))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a program; return 1 when anything was broken."""
    parser = argparse.ArgumentParser(description="Kill cores and adapters while answers go to places.")
    parser.add_argument("--kills", type=int, default=40, help="of cores and adapters together")
    parser.add_argument("--sessions", type=int, default=12)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--adapters", type=int, default=2)
    parser.add_argument("--store", choices=("sqlite", "redis"), default="sqlite")
    parser.add_argument("--seed", type=int, default=1)
    flags = parser.parse_args(arguments)
    orders = Orders(
        kills=flags.kills, sessions=flags.sessions, nodes=flags.nodes, adapters=flags.adapters, store=flags.store
    )
    with tempfile.TemporaryDirectory(prefix="moltbot-deliveries-") as folder:
        findings = asyncio.run(Run(Path(folder), orders, flags.seed).run())
    for violation in findings.violations[:20]:
        print(f"{violation.kind}: {violation.subject}: {violation.problem}")
    kills = " ".join(f"{what}s={number}" for what, number in sorted(findings.kills.items()))
    print(f"{kills} repeats={findings.repeats} seconds={findings.seconds:.0f}")
    print(findings.line())
    return 1 if findings.violations else 0


if __name__ == "__main__":
    sys.exit(main())
