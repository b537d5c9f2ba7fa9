"""Many small worlds: a core or two, some clients, and faults at any step; each has to keep every promise.

`python tests/faults/simulation.py --schedules 20000` runs seeds one after the other on all processors; a seed that
breaks a promise is printed, and `--seed N` plays it again with its whole history.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import msgspec
from fault_checker import Violation, check
from fault_deliveries import Note, check_deliveries
from fault_history import Entry, Fault, Kept, KeptEvent, Listed, name_of
from moltbot_server.store.sealed import Sealed
from moltbot_server.store.sqlite_rows import messages_of
from moltbot_server.turns import Completed, Event, Place, Reset, TextDelta, WhenBusy
from simulated_adapters import Adapter, Platform, kept_deliveries
from simulated_clients import KINDS, Follower, fault
from simulated_core import CHANNEL, Node, virtual_time
from simulated_disk import Disk
from simulated_world import World

_events: Sealed[tuple[Event, ...]] = Sealed(tuple[Event, ...])
_LIVELY = 60
"""A core takes about so many steps for a few turns; faults come at any of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What may go wrong in a world."""

    kills: int = 0
    leaves: int = 0
    zombies: int = 0
    power: int = 0
    refusals: float = 0.0
    nodes: int = 1


def plan_of(seed: int) -> Plan:
    """Return what goes wrong for a seed, and to how many cores that share the store: in most worlds there is one."""
    return replace(_faults_of(seed), nodes=2 + seed % 2 if seed // 48 % 3 == 2 else 1)


def _faults_of(seed: int) -> Plan:
    """Return what goes wrong: mostly kills, by turns the rest."""
    kind = seed % 8
    if kind == 5:
        return Plan(leaves=1 + seed % 3, kills=seed % 2)
    if kind == 6:
        return Plan(zombies=1, kills=seed % 2)
    if kind == 7:
        return Plan(power=1, kills=seed % 2) if seed % 3 else Plan(refusals=0.08, kills=seed // 24 % 3)
    return Plan(kills=1 + seed % 3)


def _adapters(seed: int) -> int:
    """Return how many adapters a world has: most have none, which is quicker."""
    return 0 if seed // 8 % 3 else 1 + seed % 2


class Town:
    """A world with its nodes, its clients and its history."""

    def __init__(self, seed: int, disk: Disk, plan: Plan, *, kill_at: int | None = None) -> None:
        """`kill_at` kills the first core before just this step, instead of at steps of the seed's choice."""
        self.world = World(seed)
        self.disk = disk
        self.plan = plan
        self.history: list[Entry] = []
        self.streams = 0
        self.nodes: list[Node] = []
        self.followers: list[Follower] = []
        self.asking_anew: list[Follower] = []
        self.notes: list[Note] = []
        self.platform = Platform(self)
        self.adapters = [Adapter(self, f"a{number}", kills=seed // 24 % 3) for number in range(_adapters(seed))]
        self._is_impatient = seed // 8 % 3 == 1
        """Whether turns interrupt each other and join."""
        self._places: dict[str, str] = {}
        self._quiet = (0, 0.0)
        self._kills = plan.kills
        self._kill_at = kill_at
        self._generations = itertools.count(1)
        disk.clear(may_lose_power=plan.power > 0, refusals=plan.refusals)

    def serving(self) -> Sequence[Node]:
        """Return the nodes that take calls."""
        return [node for node in self.nodes if node.serving and not node.loop.stopped and node not in self._shunned]

    @property
    def _shunned(self) -> list[Node]:
        """A core that another one stands in for is sent nobody any more, when it wakes."""
        return self.nodes[:-1] if self.plan.nodes == 1 else []

    def live(self) -> None:
        """Let it all happen."""
        for _ in range(self.plan.nodes):
            self._start_node()
        self._settle_clients()
        for adapter in self.adapters:
            self.world.soon(1.0, adapter.start)
        for _ in range(self.plan.leaves):
            self.world.after(self.world.random.random() * 2, self._tell_to_leave)
        for _ in range(self.plan.zombies):
            self.world.after(self.world.random.random(), self._stop_one)
        for _ in range(self.plan.power):
            self.world.after(self.world.random.random(), self._lose_power)
        self.world.run()

    def all_is_said(self) -> bool:
        """Tell whether nobody has asked anything for a while, and nothing runs or waits to be delivered."""
        if self._quiet[0] != self.streams:
            self._quiet = (self.streams, self.world.now)
        people = (*self.followers, *self.asking_anew)
        if self.world.now - self._quiet[1] < 2.0 or not all(follower.done for follower in people):
            return False
        query = "SELECT 1 FROM turns WHERE state = 'running' UNION ALL SELECT 1 FROM outbox WHERE state = 'open'"
        return self.disk.connection.execute(query).fetchone() is None

    def _start_node(self) -> None:
        others = self.nodes if self.plan.nodes > 1 else None
        name = f"n{len(self.nodes) + 1}"
        node = Node(self.world, self.disk, name, self.history.append, self._generations, others)
        node.on_gone = self._gone
        node.at_rest = self.all_is_said
        self.nodes.append(node)
        if self._kill_at is not None:
            node.loop.kill_at, self._kill_at = self._kill_at, None
        elif self._kills > 0:
            self._kills -= 1
            node.loop.kill_at = int(self.world.random.random() * _LIVELY * len(self.followers or "xx"))

    def _gone(self, node: Node) -> None:
        fault(self, "gone", node)
        if node is self.nodes[-1] or self.plan.nodes > 1:
            self.world.soon(1.0, self._start_node)

    def _some_node(self) -> Node:
        """Return a core that something is to happen to."""
        there = [node for node in self.nodes if not node.is_gone]
        return self.world.random.choice(there) if self.plan.nodes > 1 and there else self.nodes[-1]

    def _tell_to_leave(self) -> None:
        node = self._some_node()
        if node.serving:
            fault(self, "leave", node)
            node.leave(self.world.random.choice((0.0, 0.1, 1.0)))

    def _stop_one(self) -> None:
        """Stop a core, start another one that takes its turns over, and wake the first one up.

        Only one core at a time accepts turns for this store: what the first one has not accepted yet is waited for.
        """
        node = self._some_node()
        # One that begins again, for its session was not new after all, is on its way too.
        accepted = not node.pipeline._moving and all(live.is_stored for live in node.journal.under_way())
        unready = not accepted or not all(stream.begun for stream in node.calls)
        if not node.serving or (unready and self.plan.nodes == 1):
            if self.world.now < 3.0:
                self.world.soon(0.1, self._stop_one)
            return
        fault(self, "stop", node)
        node.stop()
        if self.plan.nodes == 1:
            self._start_node()

        def wake() -> None:
            if not node.is_gone:
                fault(self, "go_on", node)
                node.go_on()
                if self.plan.nodes == 1:
                    self.world.after(3.0, lambda: node.leave(0.0) if not node.is_gone else None)

        self.world.soon(1.0, wake)

    def _lose_power(self) -> None:
        there = [node for node in self.nodes if not node.is_gone]
        if there:
            self.disk.lose_power(self.world)
        for node in there:
            fault(self, "power", node)
            node.lose_power()

    # --- who asks -------------------------------------------------------------------------------------------------

    def _settle_clients(self) -> None:
        dice = self.world.random
        numbers = itertools.count(1)
        for session in range(1 + (dice.random() < 0.4)):
            moment = 0.0
            for _ in range(dice.randint(2, 5) if self._is_impatient else dice.randint(1, 3)):
                moment += dice.random() * (0.03 if self._is_impatient else dice.choice((0.01, 0.3)))
                self._settle(f"s{session}", f"q{session}.{next(numbers)}", moment)

    def _settle(self, session: str, request: str, moment: float) -> None:
        dice, world = self.world.random, self.world
        fields = {"flush_interval": dice.choice((0.0, None)), "cancel_on_disconnect": dice.random() < 0.05}
        if self._is_impatient:
            fields["when_busy"] = dice.choice((None, WhenBusy.JOIN, WhenBusy.JOIN, WhenBusy.INTERRUPT))
        if self.adapters:
            self._places[request] = dice.choice(("p1", "p2", session))
            fields["reply_to"] = Place(channel=CHANNEL, address=self._places[request])
        deadline = moment + dice.random() * 2 if dice.random() < 0.15 else 0.0
        first = Follower(self, f"{request}a", session, request, deadline=deadline, fields=fields)
        self.followers.append(first)
        world.after(moment, first.open)
        if dice.random() < 0.15:
            second = Follower(self, f"{request}b", session, request, deadline=deadline, fields=fields)
            world.after(moment + dice.random() * 0.3, second.open)
        if dice.random() < 0.05:
            other = Follower(self, f"{request}x", session, request, other=True)
            world.after(moment + 0.3 + dice.random(), lambda: other.open() if first.turn else None)
        for chance, happens in ((0.1, first.lose_line), (0.05, first.leave), (0.08, first.cancel)):
            if dice.random() < chance:
                world.after(moment + dice.random() * 0.5, happens)

    # --- what is left ---------------------------------------------------------------------------------------------

    def verdict(self) -> list[Violation]:
        """Return what was broken."""
        self.history += self._kept()
        self.notes += kept_deliveries(self.disk.connection, self._places)
        stopped = self.plan.zombies > 0
        found = check(self.history, power_failed=self.plan.power > 0)
        if stopped:
            # A process that stands still ends nothing in time.
            found = [violation for violation in found if violation.kind != "late"]
        found += check_deliveries(self.notes)
        litter = [problem for node in self.nodes for problem in node.litter()] + self.world.failures
        return found + [Violation(kind="broken", subject="core", problem=problem) for problem in litter]

    def _kept(self) -> Iterator[Entry]:
        execute = self.disk.connection.execute
        left: dict[tuple[str, int], int] = {
            (session, ordinal): count
            for session, ordinal, count in execute(
                "SELECT session, ordinal, count(*) FROM journal GROUP BY session, ordinal"
            )
        }
        listed: dict[str, list[str]] = {}
        rows = execute(
            "SELECT session, ordinal, request_id, state, events, question, answer, model, create_time, end_time, "
            "finish FROM turns ORDER BY session, ordinal"
        ).fetchall()
        for session, ordinal, request, state, events, question, answer, *rest in rows:
            yield Kept(
                turn=name_of(session, ordinal),
                request=request.partition("\x1f")[0],
                state=state,
                events=tuple(_kept_event(event) for event in _events.decode(events)) if events else (),
                gave_way="\x1f" in request,
                journal=left.get((session, ordinal), 0),
            )
            if question != b"\x90":
                said = messages_of(ordinal, question, answer, *rest)
                listed.setdefault(session, []).extend(message.text for message in said)
        for session, texts in listed.items():
            yield Listed(session=session, texts=tuple(texts))

    def bury(self) -> None:
        """Let everything go."""
        for node in self.nodes:
            node.bury()


def _kept_event(event: Event) -> KeptEvent:
    kind = event.kind
    text = kind.text if isinstance(kind, TextDelta | Reset | Completed) else ""
    code = str(kind.finish_reason) if isinstance(kind, Completed) else ""
    return KeptEvent(sequence=event.sequence, at=event.at, kind=KINDS[type(kind)], text=text, code=code)


@dataclass(slots=True)
class Outcome:
    """What became of some worlds. `broken`: for each that broke a promise, how to have it again, and what it broke."""

    schedules: int = 0
    steps: int = 0
    turns: int = 0
    ends: int = 0
    broken: list[tuple[str, list[Violation]]] = field(default_factory=list)

    def count(self, town: Town, found: list[Violation], name: str) -> None:
        """Add what became of one."""
        self.schedules += 1
        self.steps += town.world.steps
        self.turns += sum(isinstance(entry, Kept) for entry in town.history)
        self.ends += sum(isinstance(entry, Fault) and entry.what == "gone" for entry in town.history)
        if found:
            self.broken.append((name, found))

    def add(self, other: Outcome) -> None:
        """Add what became of others."""
        self.schedules += other.schedules
        self.steps += other.steps
        self.turns += other.turns
        self.ends += other.ends
        self.broken += other.broken


class Player:
    """Plays worlds one after the other; use it in a `with` block, in which time is virtual."""

    def __init__(self) -> None:
        self._disk = Disk()
        self._time = virtual_time()
        self._put_into: Callable[[World], None] = lambda world: None

    def __enter__(self) -> Player:
        logging.disable(logging.CRITICAL)
        self._put_into = self._time.__enter__()
        return self

    def __exit__(self, *failed: object) -> None:
        self._time.__exit__(None, None, None)
        self._disk.close()
        logging.disable(logging.NOTSET)

    def play(self, seed: int, *, plan: Plan | None = None, kill_at: int | None = None) -> tuple[Town, list[Violation]]:
        """Let the world of a seed happen, and return it with what it broke."""
        town = Town(seed, self._disk, plan or plan_of(seed), kill_at=kill_at)
        self._put_into(town.world)
        try:
            town.live()
            found = town.verdict()
        except Exception as error:
            found = [Violation(kind="broken", subject="simulation", problem=repr(error))]
        finally:
            town.bury()
        return town, found


def run(seeds: Iterable[int], *, most_broken: int = 5) -> Outcome:
    """Play seeds, until so many have broken something."""
    outcome = Outcome()
    with Player() as player:
        for seed in seeds:
            town, found = player.play(seed)
            outcome.count(town, found, f"--seed {seed}")
            if len(outcome.broken) >= most_broken:
                break
    return outcome


def sweep(seeds: Iterable[int], *, most_broken: int = 5) -> Outcome:
    """Play seeds without faults, then each once more for every step of its core, which is killed just before it."""
    outcome = Outcome()
    with Player() as player:
        for seed in seeds:
            calm, found = player.play(seed, plan=Plan())
            outcome.count(calm, found, f"--seed {seed} --calm")
            for step in range(calm.nodes[0].loop.taken):
                town, found = player.play(seed, plan=Plan(), kill_at=step)
                outcome.count(town, found, f"--seed {seed} --kill-at {step}")
                if len(outcome.broken) >= most_broken:
                    return outcome
    return outcome


_SHARE = 500


def run_all(
    first: int, schedules: int, processes: int, outcome: Outcome, *, told: Callable[[Outcome], None] = lambda _: None
) -> None:
    """Play seeds on several processors, until some have broken something; `told` hears how far it is."""
    shares = (range(start, min(start + _SHARE, first + schedules)) for start in range(first, first + schedules, _SHARE))
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for part in pool.imap(run, shares):
            outcome.add(part)
            told(outcome)
            if len(outcome.broken) >= 5:
                pool.terminate()
                break


def _replay(seed: int, kill_at: int | None, *, calm: bool) -> int:
    with Player() as player:
        plan = Plan() if calm or kill_at is not None else None
        town, found = player.play(seed, plan=plan, kill_at=kill_at)
    for entry in sorted((*town.history, *town.notes), key=lambda entry: getattr(entry, "at", 0.0) or town.world.now):
        print(msgspec.json.encode(entry).decode())
    for violation in found:
        print(f"{violation.kind}: {violation.subject}: {violation.problem}")
    print(f"seed={seed} steps={town.world.steps} broken={len(found)}")
    return 1 if found else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a program; return 1 when a promise was broken."""
    parser = argparse.ArgumentParser(description="Play turns, clients and faults in virtual time.")
    parser.add_argument("--schedules", type=int, default=20_000, help="how many seeds to play (default: 20000)")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--sweep", type=int, default=20, help="seeds of which every step is a kill (default: 20)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, help="play this seed alone and print all that happens")
    parser.add_argument("--kill-at", type=int, help="with --seed: kill the core just before this step")
    parser.add_argument("--calm", action="store_true", help="with --seed: without faults")
    flags = parser.parse_args(arguments)
    if flags.seed is not None:
        return _replay(flags.seed, flags.kill_at, calm=flags.calm)
    began = time.monotonic()

    def told(outcome: Outcome) -> None:
        if outcome.schedules % 20_000 < _SHARE:
            print(f"{outcome.schedules} schedules, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)

    outcome, swept = Outcome(), 0
    try:
        run_all(flags.first, flags.schedules, flags.processes, outcome, told=told)
    except KeyboardInterrupt:
        flags.sweep = 0
        print("stopped before the end", file=sys.stderr)
    if flags.sweep and not outcome.broken:
        found = sweep(range(flags.first, flags.first + flags.sweep))
        outcome.add(found)
        swept = found.schedules
    seconds = time.monotonic() - began
    for name, violations in outcome.broken:
        print(f"broken by {name}:")
        for violation in violations[:8]:
            print(f"  {violation.kind}: {violation.subject}: {violation.problem}")
    print(
        f"schedules={outcome.schedules - swept} swept={swept} steps={outcome.steps} turns={outcome.turns} "
        f"cores_ended={outcome.ends} seconds={seconds:.0f} broken={len(outcome.broken)}"
    )
    return 1 if outcome.broken else 0


if __name__ == "__main__":
    sys.exit(main())
