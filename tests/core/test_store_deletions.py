"""What every store promises of sessions that are reset or deleted."""

from __future__ import annotations

import asyncio
import time

import pytest
from kept_turns import Reopen, ended, everything, keep, key, known, new, texts
from moltbot_server.store import Deleted, Store, StoredTurn
from moltbot_server.store.protocol import KEEP_REQUESTS
from moltbot_server.store.redis import RedisStore
from moltbot_server.turns import TurnState


async def test_a_reset_session_goes_on_counting_without_what_was_said(store: Store, reopen: Reopen) -> None:
    for ordinal in (1, 2, 3):
        await keep(store, new(ordinal, title="first"))
    await store.reset_session(key())

    for again in (False, True):
        current = await reopen() if again else store
        loaded = await current.load_session(key(), 10)
        assert loaded is not None
        assert (loaded.last_ordinal, loaded.messages) == (3, ())
        session = await current.get_session(key())
        assert session is not None
        assert (session.title, session.message_count) == ("", 0)
    store = await reopen()
    await store.reset_session(key())
    await keep(store, new(4, title="second", request_id="s-1"))
    session = await store.get_session(key())
    assert session is not None
    assert (session.title, session.message_count) == ("second", 2)


@pytest.mark.parametrize("deleted", [False, True])
async def test_the_request_id_of_a_turn_that_was_deleted_is_known_for_a_day(
    store: Store, reopen: Reopen, deleted: bool
) -> None:
    change = store.delete_session if deleted else store.reset_session
    lately, before = time.time() - 60, time.time() - KEEP_REQUESTS - 60
    await keep(store, new(request_id="before", create_time=before))
    await keep(store, new(2, request_id="failed", create_time=lately), state=TurnState.FAILED)
    await store.reaccept(await known(store, new(3, request_id="failed", create_time=lately + 1)))
    await keep(store, new(4, request_id="lately", create_time=lately))
    await keep(store, new(session="other", request_id="other", create_time=lately))
    await change(key())

    for again in (False, True):
        current = await reopen() if again else store
        for request in ("lately", "failed"):
            for call in (current.accept, current.reaccept):
                assert await call(await known(current, new(5, request_id=request, digest=b"other"))) == Deleted()
        assert isinstance(await current.accept(new(9, session="other", request_id="other")), StoredTurn)
        assert await current.load_session(key("fresh"), 10) is None
        assert await texts(current) == []
        assert await current.take_over() == []
        assert (await current.get_session(key()) is None) is deleted
    current = await reopen()
    await keep(current, new(5, request_id="before"))
    assert await texts(current) == ["question", "answer"]
    # The same request_id again in the session that was made anew, and deleted again.
    await (current.delete_session if deleted else current.reset_session)(key())
    assert await current.accept(await known(current, new(6, request_id="lately"))) == Deleted()


async def test_what_is_kept_of_deleted_turns_is_forgotten_in_time(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(store, RedisStore):
        pytest.skip("Redis forgets it by itself")
    now = time.time()
    turns = [new(ordinal, create_time=now) for ordinal in range(1, 2502)]
    await asyncio.gather(*(store.accept(turn) for turn in turns), *(store.finish(ended(turn)) for turn in turns))
    await store.delete_session(key())
    await store.prune(now, ephemeral=True)
    assert await store.accept(new(request_id="s-2501")) == Deleted()
    deleted = time.time()  # 2,501 turns take a busy machine a while
    monkeypatch.setattr(time, "time", lambda: deleted + KEEP_REQUESTS + 1)
    await store.prune(now, ephemeral=True)
    for ordinal in (1, 2501):
        assert await store.accept(await known(store, new(ordinal, request_id=f"s-{ordinal}"))) is None


async def test_a_deleted_session_is_gone_and_its_request_ids_are_free_after_a_day(store: Store, reopen: Reopen) -> None:
    turn = new(request_id="r")
    await keep(store, turn)
    await keep(store, new(session="other"))

    assert await store.delete_session(key()) is True
    assert await store.delete_session(key()) is False
    for again in (False, True):
        current = await reopen() if again else store
        assert await current.find_turn(turn.key) is None
        assert await current.load_session(key(), 10) is None
        assert await everything(current) == ["other"]
    assert await (await reopen()).accept(new(request_id="r")) is None
