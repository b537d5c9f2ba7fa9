"""The disk: nothing is acknowledged before it is there, and nothing is when the disk does not take it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from fault_checker import check
from fault_keeping import kept_in
from fault_load import Load, reason_of
from fault_nodes import TAILS, Node, Setup
from fault_tracing import calls, failing, traced, why_not
from grpc import aio
from moltbot.v1 import chat_pb2, chat_pb2_grpc, message_pb2
from moltbot_server.store.sqlite import SqliteStore

ACCEPTS = int(os.environ.get("ACCEPTS", "300"))
pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "strace is there")


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    """A core in a process of its own."""
    setup = Setup(folder=tmp_path)
    setup.prepare()
    node = Node(setup, "n0", lambda entry: None)
    await node.start()
    await node.ready()
    yield node
    await node.kill()


class Caller:
    """Asks a core for turns."""

    def __init__(self, node: Node) -> None:
        self.channel = aio.insecure_channel(node.address, options=[("grpc.use_local_subchannel_pool", 1)])
        self.chat = chat_pb2_grpc.ChatServiceStub(self.channel)
        self.metadata = (("authorization", f"Bearer {node.setup.key}"),)

    async def accepted(self, request: str) -> str:
        """Start a turn and return its name when it is acknowledged; leave it then."""
        turn = chat_pb2.TurnInput(parts=[message_pb2.Part(text="q1.1 long")], request_id=request)
        call = self.chat.StreamTurn(chat_pb2.StreamTurnRequest(turn=turn), metadata=self.metadata)
        try:
            response = await call.read()
            if response is aio.EOF:
                raise AssertionError(await call.details())
            return str(response.event.accepted.turn)
        finally:
            call.cancel()

    async def refused(self, request: str) -> tuple[grpc.StatusCode, str]:
        """Start a turn that is not accepted, and return why."""
        try:
            turn = await self.accepted(request)
        except aio.AioRpcError as error:
            return error.code(), reason_of(error)
        raise AssertionError(f"{turn} was accepted")


async def test_each_acceptance_is_on_the_disk_before_it_is_told(node: Node, tmp_path: Path) -> None:
    caller = Caller(node)
    output = tmp_path / "trace.txt"
    names = [f"accept-{number:05}-end" for number in range(ACCEPTS)]
    watched = ("-e", "trace=pwrite64,fdatasync,fsync,sendmsg,sendto,write,writev")
    async with traced(node.process_id, output, *watched):
        for start in range(0, ACCEPTS, 10):
            await asyncio.gather(*map(caller.accepted, names[start : start + 10]))
    await caller.channel.close()

    written: dict[str, int] = {}
    told: dict[str, int] = {}
    synced: list[tuple[int, int]] = []
    for call in calls(output):
        if call.name in ("fdatasync", "fsync") and not call.error:
            synced.append((call.began, call.ended))
        for name in names if "accept-" in call.given else ():
            if name in call.given:
                if call.name == "pwrite64":
                    written.setdefault(name, call.ended)
                elif call.name.startswith(("send", "write")):
                    told.setdefault(name, call.began)
    assert set(written) == set(told) == set(names)
    early = [
        name for name in names if not any(written[name] <= began and ended <= told[name] for began, ended in synced)
    ]
    assert early == []


async def test_a_full_disk_refuses_new_turns_and_loses_nothing_of_those_under_way(node: Node, tmp_path: Path) -> None:
    load = Load(1, [node], node.setup.key, sessions=8, kinds=("steady", "long"))
    load.begin()
    caller = Caller(node)
    await asyncio.sleep(0.5)
    for _ in range(2):
        async with traced(node.process_id, tmp_path / "full.txt", *failing("pwrite64", "ENOSPC")):
            code, reason = await caller.refused("new")
            assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "STORAGE_FULL")
            await asyncio.sleep(1.0)
        assert await caller.accepted(f"after {reason}")
    await caller.channel.close()
    await load.finish()
    await node.kill()

    history = [*load.history, *await kept_in(SqliteStore(tmp_path / "moltbot.db"), load.history)]
    assert check(history) == []
    assert load.failed == 0


async def test_nothing_is_acknowledged_when_the_disk_does_not_confirm_it(node: Node, tmp_path: Path) -> None:
    load = Load(1, [node], node.setup.key, sessions=8, kinds=tuple(TAILS))
    load.begin()
    caller = Caller(node)
    await asyncio.sleep(0.5)
    async with traced(node.process_id, tmp_path / "failing.txt", *failing("fdatasync", "EIO")):
        code, reason = await caller.refused("new")
        assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "STORAGE_UNAVAILABLE")
        await asyncio.sleep(0.5)
    await caller.channel.close()
    await node.kill()
    await node.start()
    await node.ready()
    await load.finish()
    await node.kill()

    history = [*load.history, *await kept_in(SqliteStore(tmp_path / "moltbot.db"), load.history)]
    assert check(history) == []
    assert load.failed == 0
