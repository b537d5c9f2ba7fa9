"""A core in virtual time: the real pipeline, runs, journal, sessions and embedded store, on a disk that several share.

What is not real: the event loop, the clock, the threads of the store and the model. The store's groups are carried out
by the real code, on one database in memory, at moments that the world chooses.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import moltbot_server.store.groups as groups
import moltbot_server.store.sqlite as sqlite
import moltbot_server.store.sqlite_outbox as sqlite_outbox
import moltbot_server.store.sqlite_use as sqlite_use
from fault_history import Read
from moltbot_server import live_turn, pipeline, turn_end, turn_run
from moltbot_server.config_models import Delivering
from moltbot_server.errors import MoltBotError, NotServing
from moltbot_server.journal import Journal
from moltbot_server.live_turn import LiveTurn
from moltbot_server.metrics import Metrics
from moltbot_server.models.caching.answers import AnswerCache
from moltbot_server.models.caching.backend import MemoryBackend
from moltbot_server.models.catalog import Catalog
from moltbot_server.models.context import ContextWindow
from moltbot_server.outbox import Deliveries
from moltbot_server.pipeline import TurnPipeline
from moltbot_server.sessions import Sessions
from moltbot_server.store.sqlite_at_once import set_up
from moltbot_server.store.sqlite_journal_files import JournalFiles
from moltbot_server.store.sqlite_sessions import Places
from moltbot_server.turns import (
    Event,
    Message,
    Principal,
    TurnInput,
    TurnKey,
)
from simulated_disk import Disk, Orders
from simulated_model import Model
from simulated_nodes import Nodes, way_to
from simulated_world import Clock, SimulatedLoop, World

WORKSPACE = "default"
CHANNEL = "chat"
_OWNER = Principal(workspace=WORKSPACE, key_id="k", role="owner")
_METRICS = Metrics()
_CLOCK = Clock()


class _Thread:
    """Stands in for the store's threads: the disk carries out what they would."""

    def __init__(self, **_: Any) -> None:
        """Take what a thread is made with."""

    def start(self) -> None:
        """Do nothing."""

    def join(self) -> None:
        """Do nothing."""


class _Threading:
    Thread = _Thread


@contextmanager
def virtual_time() -> Iterator[Callable[[World], None]]:
    """Let the core's code live in a world: yields what puts it into one. It is put back at the end."""
    places: list[tuple[Any, str, Any]] = [
        (live_turn, "time", _CLOCK),
        (turn_run, "time", _CLOCK),
        (turn_end, "time", _CLOCK),
        (pipeline, "time", _CLOCK),
        (sqlite_outbox, "time", _CLOCK),
        (sqlite_use, "time", _CLOCK),
        (groups, "threading", _Threading),
        (groups, "SimpleQueue", Orders),
    ]
    real = [getattr(module, name) for module, name, _ in places]
    for module, name, ours in places:
        setattr(module, name, ours)
    try:
        yield lambda world: setattr(_CLOCK, "world", world)
    finally:
        for (module, name, _), original in zip(places, real, strict=True):
            setattr(module, name, original)


# --- the store --------------------------------------------------------------------------------------------------------


class _Store(sqlite.SqliteStore):
    """The embedded store, on the world's disk."""

    def __init__(self, node: Node) -> None:
        super().__init__(Path("/nowhere"))  # its folder is there, and the file is not made
        self._node = node
        if node.others is not None:
            self.nodes: Any = Nodes(node.name, node.others)
            self.shared = True
            self._places = Places(node.name, shared=True)
        self._files = JournalFiles(node.disk.folder, self.nodes.node)

    async def open(self) -> None:
        """Open the store, and have its threads' work done by the disk."""
        await super().open()
        for thread in (self._reader, self._writer):
            thread._groups.bound = (self._node.disk, self._node, thread)  # type: ignore[attr-defined]

    def _join(self) -> tuple[sqlite3.Connection, sqlite3.Connection]:
        self._files.open()
        return self._prepare()

    def _prepare(self) -> tuple[sqlite3.Connection, sqlite3.Connection]:
        connection = self._node.disk.connection
        connection.execute(sqlite.CATCH_UP)
        set_up(connection)
        return connection, connection


# --- the process ------------------------------------------------------------------------------------------------------


class _Ordered(dict[Any, None]):
    """A set that remembers the order, so that a run does not depend on addresses in memory."""

    def add(self, item: Any) -> None:
        """Add an item."""
        self[item] = None

    def discard(self, item: Any) -> None:
        """Remove an item."""
        self.pop(item, None)


class Node:
    """A core: it starts, serves, and can be killed, stopped, or told to leave."""

    def __init__(
        self,
        world: World,
        disk: Disk,
        name: str,
        record: Callable[[Any], None],
        generations: Iterator[int],
        others: Sequence[Node] | None = None,
    ) -> None:
        """`others` are those that share the store, this one among them; None for a core that is the only one."""
        self.others = others
        self.at_rest: Callable[[], bool] = lambda: True
        self.world, self.disk, self.name, self.record, self._generations = world, disk, name, record, generations
        self.loop = SimulatedLoop(world)
        self.loop.on_kill = self.kill
        self.serving = False
        self.is_gone = False
        self.pending: dict[Callable[[], None], Callable[[], Any]] = {}
        self.on_go_on: list[Callable[[], None]] = []
        self.on_gone: Callable[[Node], None] = lambda node: None
        self.calls: dict[Any, asyncio.Task[None]] = {}
        self.loop.within(self._compose)
        self.loop.within(lambda: self.loop.create_task(self._start()))

    def _compose(self) -> None:
        self.store = _Store(self)
        self.journal = Journal(self.store)
        engine = Model(self)
        catalog = Catalog()
        catalog.add(engine)
        dice = self.world.random
        self.sessions = Sessions(
            self.store,
            lambda past: ContextWindow.of(past, engine.count, 1 << 30),
            clock=_CLOCK.monotonic,
            ttl=dice.choice((0.05, 60.0)),
            guessed_from=dice.choice((0.0, 2.0)),
        )
        settings = Delivering(lease=1.0, max_attempts=1000)
        self.deliveries = Deliveries(lambda: self.store.outbox, settings, _METRICS)
        self.pipeline = TurnPipeline(
            store=self.store,
            journal=self.journal,
            sessions=self.sessions,
            catalog=catalog,
            metrics=_METRICS,
            answers=AnswerCache(MemoryBackend(max_bytes=0, ttl=1.0), ttl=1.0, answers="off"),
            ledger=_FREE,  # type: ignore[arg-type]
            price=lambda model: None,
            system_prompt="",
            flush_interval=0.02,
            announce=self.deliveries.announce,
        )
        self.pipeline._runs = _Ordered()  # type: ignore[assignment]

    async def _start(self) -> None:
        while True:
            try:
                await self.store.open()
                await self.pipeline.take_over()
                break
            except MoltBotError:
                # The process would end, and be started again.
                self.kill()
                return
        self.serving = True
        while self.store.shared and not self.at_rest():
            await asyncio.sleep(0.1 + 0.4 * self.world.random.random())
            with contextlib.suppress(MoltBotError):
                await self.pipeline.take_over()

    # --- calls ----------------------------------------------------------------------------------------------------

    def take(self, stream: Any) -> None:
        """Serve a stream."""
        self.calls[stream] = self.loop.within(lambda: self.loop.create_task(self._serve(stream)))

    async def _serve(self, stream: Any) -> None:
        try:
            async for events in self._wherever(stream):
                for event in events:
                    stream.send(event)
                if self.world.random.random() < 0.1:
                    await asyncio.sleep(self.world.random.random() * 0.1)  # a slow reader
            stream.end()
        except MoltBotError as error:
            stream.fail(error.status.name, error.reason)
        finally:
            self.calls.pop(stream, None)

    async def _wherever(self, stream: Any) -> AsyncGenerator[list[Event], None]:
        """Yield the events of a stream, from here or from the core that has its turn."""
        try:
            async for events in self._events(stream):
                yield events
        except NotServing as elsewhere:
            if not elsewhere.node:
                raise
            leg = way_to(self, self.store.nodes, elsewhere, stream)
            leg.open()
            try:
                while (event := await leg.next()) is not None:
                    stream.begun = True
                    yield [event]
            finally:
                leg.close()

    async def _events(self, stream: Any) -> AsyncGenerator[list[Event], None]:
        if stream.key is not None:
            turn = await self.journal.find(stream.key)
        else:
            left = stream.deadline - self.world.now if stream.deadline else None
            deadline = None if left is None else self.world.now + left
            turn = await self.pipeline.start(_OWNER, stream.input, deadline=deadline, arrived=self.world.now)
        stream.begun = True
        with self.journal.follow(turn, stream.after) as batches:
            async for batch in batches:
                yield batch

    def hang_up(self, stream: Any) -> None:
        """Let the call of a client that is gone end."""
        call = self.calls.pop(stream, None)
        if call is not None and self.loop.alive:
            self.loop.within(call.cancel)

    def cancel(self, key: TurnKey, answered: Callable[[bool], None]) -> None:
        """Cancel a turn, as the RPC does."""

        async def carry_out() -> None:
            try:
                turn = await self.journal.find(key)
                if isinstance(turn, LiveTurn):
                    cancelled = turn.cancel()
                    ending = await turn.outcome()
                    answered(cancelled and ending is not None)
            except NotServing as elsewhere:
                if (there := self.store.nodes.find(elsewhere.node) if self.store.shared else None) is not None:
                    self.world.soon(0.01, lambda: there.cancel(key, answered) if there.serving else None)
            except MoltBotError:
                return  # its caller is told so

        self.loop.within(lambda: self.loop.create_task(carry_out()))

    def hand_out(self, line: Any, *, most: int) -> None:
        """Give deliveries to an adapter."""

        async def serve() -> None:
            try:
                receiver = self.deliveries.receive(WORKSPACE, CHANNEL, most)
                try:
                    async for delivery in receiver:
                        line.send(delivery)
                finally:
                    self.deliveries.leave(receiver)
            except MoltBotError:
                line.end()
            finally:
                self.calls.pop(line, None)

        self.calls[line] = self.loop.within(lambda: self.loop.create_task(serve()))

    def ask(self, line: Any, what: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        """Carry out a call, and say whether it needs no repeating."""

        async def carry_out() -> None:
            try:
                await what()
            except MoltBotError as error:
                line.send(not error.retryable)
            else:
                line.send(True)
            finally:
                self.calls.pop(line, None)

        self.calls[line] = self.loop.within(lambda: self.loop.create_task(carry_out()))

    # --- faults ---------------------------------------------------------------------------------------------------

    def kill(self) -> None:
        """End at once: what the disk was about to write is written, or is not."""
        if self.is_gone:
            return
        self.loop.die()
        pending, self.pending = self.pending, {}
        for carry_out in pending.values():
            if self.world.random.random() < 0.5:
                carry_out()
        self._gone()

    def lose_power(self) -> None:
        """End at once, with nothing more written."""
        self.loop.die()
        self.pending.clear()
        self._gone()

    def stop(self) -> None:
        """Stand still."""
        self.loop.stopped = True

    def go_on(self) -> None:
        """Go on after having stood still."""
        self.loop.stopped = False
        waiting, self.on_go_on = self.on_go_on, []
        for order in waiting:
            order()

    def leave(self, grace: float) -> None:
        """Refuse new turns, end those under way within a time, hand the others over, and end."""

        async def go() -> None:
            await self.pipeline.drain(grace)
            await self.deliveries.close()
            await asyncio.sleep(0.05)  # streams deliver their last events
            self.serving = False
            for stream in tuple(self.calls):
                stream.cut()
                self.hang_up(stream)
            await self.store.close()
            self.loop.die()
            self._gone()

        self.loop.within(lambda: self.loop.create_task(go()))

    def _gone(self) -> None:
        self.is_gone, self.serving = True, False
        for stream in tuple(self.calls):
            stream.cut()
        self.calls.clear()
        self.on_gone(self)

    def bury(self) -> None:
        """Let everything go; of a process that was killed, too, nothing is left open."""
        self.store._files.close()
        self.loop.bury()

    def litter(self) -> list[str]:
        """Return what is left of turns, when there are none any more."""
        if self.is_gone:
            return []
        counts = {
            "runs": len(self.pipeline),
            "live turns": len(self.journal),
            "claims": sum(session.claims for session in self.sessions._open.values()),
            "calls": len(self.calls),
            "noted turns": len(self.journal._noted),
            "turns in files": len(self.store._files),
            "sessions taken for new": len(self.sessions._loading),
            "receivers": len(self.deliveries._receivers),
        }
        return [f"{self.name} has {count} {name} left" for name, count in counts.items() if count]

    # --- what its model says --------------------------------------------------------------------------------------

    def pieces(self) -> list[str]:
        """Return an answer that nobody else gives."""
        number = next(self._generations)
        return [f"<{number}.{piece}>" for piece in range(self.world.random.randrange(5))]

    def record_read(self, messages: Sequence[Message], pieces: list[str]) -> None:
        """Take note of what a model read."""
        texts = tuple(message.text for message in messages)
        self.record(
            Read(
                at=self.world.now, generation=self.name, question=texts[-1], history=texts[:-1], answer="".join(pieces)
            )
        )


class _FreeOfCharge:
    """A ledger for which everything is free."""

    def check(self, workspace: str, user: str, model: str) -> str:
        """Let everybody ask."""
        return ""

    def record(self, *used: Any) -> None:
        """Take no note."""


_FREE = _FreeOfCharge()


def asked(session: str, question: str, request: str, **fields: Any) -> TurnInput:
    """Return the input of a turn."""
    from moltbot_server.turns import TextPart

    return TurnInput(parts=(TextPart(text=question),), session=session, request_id=request, **fields)
