"""What is in Redis under which keys, how long, and what is left in the end."""

from __future__ import annotations

import time

import pytest
from kept_turns import keep, key, new, said
from moltbot_server.errors import StorageUnavailable
from moltbot_server.store import UsageRow
from moltbot_server.store.protocol import KEEP_REQUESTS
from moltbot_server.turns import TurnInput
from redis_nodes import Nodes, wrote

ASKED = TurnInput(parts=said("question"))


async def test_every_key_of_a_workspace_begins_alike_whatever_its_name_is(nodes: Nodes) -> None:
    store = await nodes.join()
    for workspace in ("a}:t:1:x", "{", "å b"):
        await keep(store, new(workspace=workspace, user="u", text=workspace))
        await store.add_usage([UsageRow(workspace=workspace, day="2026-01-01", turns=1)])
    async with nodes.keys() as client:
        names = [name async for name in client.scan_iter(f"*{nodes.prefix}*", count=10_000)]

    rests = ("schema", "data", "workspaces", "nodes", "left", f"node:{store.node}", f"connection:{store.node}")
    apart = {f"{nodes.prefix}:{rest}".encode() for rest in rests}
    begins = [store.base(workspace).encode() for workspace in ("a}:t:1:x", "{", "å b")]
    assert all(len([1 for begin in begins if name.startswith(begin)]) == 1 for name in set(names) - apart)
    for workspace in ("a}:t:1:x", "{", "å b"):
        (message, _) = await store.list_messages(key(workspace=workspace), after=(0, 0), limit=10)
        assert message.text == workspace


async def test_no_key_is_left_over_when_all_sessions_are_deleted(nodes: Nodes) -> None:
    store = await nodes.join()
    async with nodes.keys() as client:

        async def names() -> set[bytes]:
            return {name async for name in client.scan_iter(f"{store.base('w')}*", count=10_000)}

        await keep(store, new(session="x"))
        await store.delete_session(key("x"))
        before = await names()
        for number in range(40):
            name = f"s{number}"
            await keep(store, new(1, session=name, user="u", ephemeral=number % 2 == 0))
            await store.reaccept(new(2, session=name, request_id=f"f{number}", rest=ASKED))
            await store.append([wrote(new(2, session=name), "word")])
            assert await store.reaccept(new(3, session=name, request_id=f"f{number}", rest=ASKED)) is None
            await store.append([wrote(new(3, session=name), "word")])
        for number in range(40):
            assert await store.delete_session(key(f"s{number}")) is True
        assert await names() == before
        assert {name.rpartition(b":")[2] for name in before} == {b"accepted", b"nodes"}


async def test_data_of_a_newer_release_is_left_alone(nodes: Nodes) -> None:
    async with nodes.keys() as client:
        await client.set(f"{nodes.prefix}:schema", 2)
    with pytest.raises(StorageUnavailable, match="newer release"):
        await nodes.join()


@pytest.mark.parametrize("deleted", [False, True])
async def test_the_request_id_of_a_turn_that_was_deleted_is_kept_for_a_day_and_no_longer(
    nodes: Nodes, deleted: bool
) -> None:
    store = await nodes.join()
    await keep(store, new(request_id="r", create_time=time.time()))
    await (store.delete_session if deleted else store.reset_session)(key())
    async with nodes.keys() as client:
        assert KEEP_REQUESTS - 60 < await client.ttl(f"{store.base('w')}x:r") <= KEEP_REQUESTS
