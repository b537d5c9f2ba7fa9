"""Calls that are spread over several cores: evenly, and over those alone that serve."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

from moltbot.channel import Ways
from moltbot_server.testing import running_server


async def until_picked(ways: Ways, wanted: set[str]) -> None:
    """Wait until calls go to these addresses and to no others."""
    async with asyncio.timeout(20):
        while {ways.pick().address for _ in range(12)} != wanted:  # noqa: ASYNC110 - channels tell it one by one
            await asyncio.sleep(0.01)


async def test_calls_are_spread_evenly_over_the_cores_that_serve(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        cores = [await stack.enter_async_context(running_server(tmp_path / str(number))) for number in range(3)]
        addresses = [core.address for core in cores]
        ways = Ways(",".join(addresses), None, copies=2, spread=True)
        stack.push_async_callback(ways.close)
        await until_picked(ways, set(addresses))
        assert Counter(ways.pick().address for _ in range(30)) == dict.fromkeys(addresses, 10)
        assert len({id(ways.pick()) for _ in range(30)}) == 6, "each copy of a way is used"

        await cores[0].core.server.retire()
        await until_picked(ways, set(addresses[1:]))
        assert Counter(ways.pick().address for _ in range(30)) == dict.fromkeys(addresses[1:], 15)


async def test_calls_that_are_not_spread_stay_with_one_core(tmp_path: Path) -> None:
    async with running_server(tmp_path / "a") as one, running_server(tmp_path / "b") as other:
        ways = Ways(f"{one.address},{other.address}", None)
        assert len({ways.pick().address for _ in range(10)}) == 1
        first = ways.pick()
        ways.leave(first)
        assert ways.pick().address != first.address
        await ways.close()


async def test_a_call_has_a_way_before_any_core_is_known_to_serve() -> None:
    ways = Ways("127.0.0.1:1,127.0.0.1:2", None, spread=True)
    assert {ways.pick().address for _ in range(4)} == {"127.0.0.1:1", "127.0.0.1:2"}
    await ways.close()


async def test_calls_of_a_session_stay_with_one_core_as_long_as_it_serves(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        cores = [await stack.enter_async_context(running_server(tmp_path / str(number))) for number in range(3)]
        addresses = [core.address for core in cores]
        ways = Ways(",".join(addresses), None, copies=2, spread=True)
        stack.push_async_callback(ways.close)
        await until_picked(ways, set(addresses))

        names = [f"sessions/s{number}" for number in range(60)]
        homes = {name: ways.pick(name).address for name in names}
        assert min(Counter(homes.values())[address] for address in addresses) >= 8, "sessions are spread"
        assert all(ways.pick(name).address == homes[name] for name in names for _ in range(3))
        another = Ways(",".join(addresses), None, spread=True)
        stack.push_async_callback(another.close)
        await until_picked(another, set(addresses))
        assert {name: another.pick(name).address for name in names} == homes, "all adapters agree"

        await cores[0].core.server.retire()
        await until_picked(ways, set(addresses[1:]))
        left = {name: ways.pick(name).address for name in names}
        assert all(left[name] == home for name, home in homes.items() if home != addresses[0])
        assert addresses[0] not in left.values()
