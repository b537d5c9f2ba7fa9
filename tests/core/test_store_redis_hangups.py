"""Nodes whose process has ended are gone as soon as Redis has seen it, those that were cut off for a moment are not."""

from __future__ import annotations

import asyncio
import secrets
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from kept_turns import new, said
from moltbot_server.store.redis import RedisStore
from moltbot_server.store.redis_hangups import Hangups, Lease
from moltbot_server.turns import TurnInput
from redis.asyncio import Redis
from redis_process import RedisProcess

NODE = """
import asyncio, sys
from kept_turns import new, said
from moltbot_server.store.redis import RedisStore
from moltbot_server.turns import TurnInput

async def main():
    store = RedisStore(host="127.0.0.1", port=int(sys.argv[1]), prefix=sys.argv[2], lease=float(sys.argv[3]))
    await store.open()
    await store.accept(new(session="its", rest=TurnInput(parts=said("question"))))
    print(store.node, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@asynccontextmanager
async def opened(port: int, prefix: str, lease: float) -> AsyncIterator[RedisStore]:
    """Open the store of a node."""
    store = RedisStore(host="127.0.0.1", port=port, prefix=prefix, lease=lease)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


async def test_a_process_that_was_killed_is_followed_long_before_its_lease_is_over(redis_port: int) -> None:
    prefix, lease = f"test-{secrets.token_hex(4)}", 15.0
    words = [sys.executable, "-c", NODE, str(redis_port), prefix, str(lease)]
    process = await asyncio.create_subprocess_exec(*words, stdout=PIPE, cwd=Path(__file__).parent)
    assert process.stdout is not None
    async with opened(redis_port, prefix, lease) as store:
        store._lease._calm_until = 0.0  # the Redis of the tests may have been there for less than a lease
        node = (await process.stdout.readline()).decode().strip()
        assert [await store.take_over() for _ in range(10)] == [[]] * 10
        process.kill()
        await process.wait()

        async with asyncio.timeout(60):
            while not (orphans := await store.take_over()):  # noqa: ASYNC110 - it is the look itself
                await asyncio.sleep(0.2)

        assert [orphan.turn.key.session.session for orphan in orphans] == ["its"]
        async with Redis(host="127.0.0.1", port=redis_port, protocol=2) as client:
            assert await client.pttl(f"{prefix}:node:{node}") > 0


async def test_a_node_whose_connections_break_is_not_gone(redis_port: int) -> None:
    prefix, lease = f"test-{secrets.token_hex(4)}", 1.5
    async with opened(redis_port, prefix, lease) as one, opened(redis_port, prefix, lease) as other:
        for store in (one, other):
            await store.accept(new(session=store.node, rest=TurnInput(parts=said("question"))))
        async with Redis(host="127.0.0.1", port=redis_port, protocol=2) as client:
            for _ in range(3):
                for store in (one, other):
                    await client.client_kill_filter(_id=str(store._reading.client_id))
                for _ in range(10):
                    assert (await one.take_over(), await other.take_over()) == ([], [])
                    await asyncio.sleep(0.1)


async def test_only_who_is_silent_for_several_looks_has_hung_up(redis_port: int) -> None:
    async with opened(redis_port, f"test-{secrets.token_hex(4)}", 3.0) as store:
        mine, closed = str(store._reading.client_id).encode(), b"987654321"
        hangups = Hangups(store._reading, lease=0.3)
        ends = {"here": 1000, "gone": 1000, "renews": 1000, "older release": 1000}
        lines = {"here": mine, "gone": closed, "renews": closed, "older release": None}
        told = []
        for _ in range(8):
            told.append(list(await hangups.among({node: Lease(ends[node], lines[node]) for node in ends})))
            ends["renews"] += 200
            await asyncio.sleep(0.06)
        assert told[:3] == [[]] * 3  # a look that comes late counts no more than others
        assert told[-1] == ["gone"]

        hangups.forget()
        assert await hangups.among({"gone": Lease(1000, closed)}) == []


async def test_where_redis_does_not_tell_who_is_connected_nobody_has_hung_up(tmp_path: Path) -> None:
    async with RedisProcess.keeping(tmp_path) as redis, opened(redis.port, "p", 3.0) as store:
        hangups = Hangups(store._reading, lease=0.0)
        leases = {"gone": Lease(1000, b"987654321")}
        assert [list(await hangups.among(leases)) for _ in range(2)] == [[], ["gone"]]
        async with Redis(host="127.0.0.1", port=redis.port, protocol=2) as client:
            await client.execute_command("ACL", "SETUSER", "default", "-client|list")
        assert [list(await hangups.among(leases)) for _ in range(2)] == [[], []]
        assert store.away is None
