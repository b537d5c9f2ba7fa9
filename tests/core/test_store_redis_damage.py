"""The shared store when something in it is not as it was written."""

from __future__ import annotations

import secrets

import pytest
from kept_turns import new, said
from moltbot_server.store.redis import RedisStore
from moltbot_server.turns import TurnInput
from redis.asyncio import Redis


async def test_a_damaged_turn_keeps_no_other_one_from_being_carried_on(
    redis_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    prefix = f"test-{secrets.token_hex(4)}"
    first, second = (RedisStore(host="127.0.0.1", port=redis_port, prefix=prefix) for _ in range(2))
    await first.open()
    await second.open()
    for name in "abc":
        await first.accept(new(session=name, rest=TurnInput(parts=said("question"))))
    async with Redis(host="127.0.0.1", port=redis_port, protocol=2) as client:
        assert await client.hset(f"{first.base('w')}t:1:b", "x", b"\xc1") == 0
    await first.close()

    assert [orphan.turn.key.session.session for orphan in await second.take_over()] == ["a", "c"]
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [
        "a turn of a core that is gone cannot be read and is not carried on"
    ]
    second._takeover._sweep_at = 0.0
    assert await second.take_over() == []
    await second.close()
