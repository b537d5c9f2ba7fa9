"""The disk: nothing is acknowledged before it is there, and nothing is when the disk does not take it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from accept_run import Caller, trace
from fault_checker import check
from fault_keeping import kept_in
from fault_load import Load
from fault_nodes import TAILS, Node, Setup
from fault_tracing import failing, traced, why_not
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


async def test_each_acceptance_is_on_the_disk_before_it_is_told(node: Node, tmp_path: Path) -> None:
    found = await trace(node, tmp_path / "trace.txt", ACCEPTS)

    assert (found.accepts, found.written, found.told) == (ACCEPTS, ACCEPTS, ACCEPTS)
    assert found.early == ()


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
    assert await caller.accepted("when it confirms again")
    await caller.channel.close()
    await node.kill()
    await node.start()
    await node.ready()
    await load.finish()
    await node.kill()

    history = [*load.history, *await kept_in(SqliteStore(tmp_path / "moltbot.db"), load.history)]
    assert check(history) == []
    assert load.failed == 0
