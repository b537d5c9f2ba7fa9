"""What a store holds, moved to a file and into another store: nothing is lost, changed or there twice."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from kept_turns import ended, keep, key, new, said
from moltbot_server.store import Deleted, NewTurn, Store, UsageQuery, UsageRow
from moltbot_server.store.moving import NotMovable, Records, check_file, export, take_in
from moltbot_server.store.outbox import Held, delivery_of
from moltbot_server.store.protocol import JournalEntry
from moltbot_server.store.redis import RedisStore
from moltbot_server.store.redis_moving import RedisRecords
from moltbot_server.store.sqlite import SqliteStore
from moltbot_server.store.sqlite_moving import SqliteRecords
from moltbot_server.turns import (
    Completed,
    Event,
    Failed,
    MediaPart,
    Place,
    SessionKey,
    TextDelta,
    TurnInput,
    TurnKey,
    TurnState,
)

ASKED = TurnInput(parts=said("question"), system_prompt="Be brief.")


class Home:
    """A place for a store: it can be opened, and its records read while nobody has it open."""

    def __init__(self, kind: str, folder: Path, port: int) -> None:
        self.kind = kind
        self._path = folder / f"{secrets.token_hex(4)}.db"
        self._redis = {"host": "127.0.0.1", "port": port, "prefix": f"test-{secrets.token_hex(6)}"}

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Store]:
        """Open the store."""
        store: Any = SqliteStore(self._path) if self.kind == "sqlite" else RedisStore(**self._redis)  # type: ignore[arg-type]
        await store.open()
        try:
            yield store
        finally:
            await store.close()

    @asynccontextmanager
    async def records(self) -> AsyncIterator[Records]:
        """Open what it holds."""
        async with self.opened() as store:
            yield RedisRecords(store) if isinstance(store, RedisStore) else SqliteRecords(self._path)


Make = Callable[[str], Home]


@pytest.fixture
def make(tmp_path: Path, redis_port: int) -> Make:
    """Makes a home for a store of a kind."""
    return lambda kind: Home(kind, tmp_path, redis_port)


async def fill(store: Store) -> None:
    """Store a bit of everything."""
    await keep(store, new(1, title="first", user="ann", channel="web", text="\x00 你好"))
    await keep(store, new(2), answer="ha", state=TurnState.CANCELLED)
    await keep(store, new(3, request_id="again"), state=TurnState.FAILED)
    again = new(4, request_id="again")
    await store.reaccept(again)
    await store.finish(ended(again, answer="good"))
    picture = MediaPart(kind="image", media_type="image/png", data=b"\x89PNG\xff")
    await keep(store, new(1, session="picture", user="bob"))
    shown = NewTurn(
        key=TurnKey(session=key("picture"), ordinal=2), request_id="p", digest=b"\xff\x00", create_time=5.25,
        question=(picture,), opens_session=False,
    )  # fmt: skip
    await store.accept(shown)
    await store.finish(ended(shown))
    await keep(store, new(1, session="closed", ephemeral=True))
    for ordinal in (1, 2):
        await keep(store, new(ordinal, session="reset", create_time=time.time()))
    await store.reset_session(key("reset"))
    await keep(store, new(1, workspace="other", request_id="again"))
    running = new(9, session="runs", rest=ASKED, deadline=1e9 + 0.5)
    await store.accept(running)
    events = tuple(Event(sequence=number, at=2.5, kind=TextDelta(text=f"{number} ")) for number in (1, 2, 3))
    await store.append([JournalEntry(key=running.key, events=events[:2])])
    await store.append([JournalEntry(key=running.key, events=events[2:])])
    rows = [
        UsageRow(workspace=workspace, day="2026-01-02", model=model, user="u", turns=3, input_tokens=5, cost=1.5)
        for workspace in ("w", "other")
        for model in ("m", "n")
    ]
    await store.add_usage(rows)
    await deliver(store)


async def deliver(store: Store) -> None:
    """Store deliveries of each kind: three that wait for one place, one that was posted, one that was given up."""
    for ordinal in range(1, 6):
        address = f"place {min(ordinal, 3)}"
        asked = TurnInput(parts=said("x"), request_id=f"d{ordinal}", reply_to=Place(channel="slack", address=address))
        turn = new(ordinal, session="delivers", request_id=f"d{ordinal}")
        end = ended(turn, answer=f"answer {ordinal}")
        await store.accept(turn)
        last = end.events[-1].kind
        assert isinstance(last, Completed)
        await store.finish(msgspec.structs.replace(end, delivery=delivery_of(turn.key, asked, last)))
    found = await store.outbox.lease(("w", "slack"), limit=9, seconds=-1.0, most_attempts=9)
    given = {delivery.place.address: delivery for delivery in found.deliveries}
    await store.outbox.confirm("w", given["place 1"].id, "m1")
    lease = Held(workspace="w", id=given["place 2"].id, attempt=1)
    await store.outbox.reject(lease, reason="no", delay=0.0, permanent=True, most_attempts=9)


async def deliveries(store: Store) -> list[Any]:
    """Return what can be seen of deliveries, in order."""
    dead = await store.outbox.list_dead("w", channel="", before=None, limit=9)
    seen: list[Any] = [(one.delivery.request_id, one.delivery.ending, one.reason, one.delivery.attempt) for one in dead]
    while found := (await store.outbox.lease(("w", "slack"), limit=9, seconds=60.0, most_attempts=9)).deliveries:
        for delivery in found:
            seen.append((delivery.request_id, delivery.place, delivery.ending, delivery.attempt, delivery.turn))
            await store.outbox.confirm("w", delivery.id, "m")
    return [*seen, await store.outbox.confirm("w", posted(), "other"), dict(await store.outbox.count())]


def posted() -> str:
    """Return the id of what was posted."""
    asked = TurnInput(parts=(), request_id="d1", reply_to=Place(channel="slack", address="place 1"))
    end = Failed(status=1, reason="", message="", retryable=False)
    delivery = delivery_of(TurnKey(session=key("delivers"), ordinal=1), asked, end)
    assert delivery is not None
    return delivery.id


async def everything(store: Store) -> list[Any]:
    """Take over what runs in a store, and return all that can be seen of it; who has a session is each store's own."""
    seen: list[Any] = [await store.take_over()]
    for workspace in ("w", "other"):
        listed = await store.list_sessions(workspace, user="", channel="", before=None, limit=100)
        seen += [listed, await store.list_sessions(workspace, user="ann", channel="web", before=None, limit=100)]
        for name in [session.key.session for session in listed] + ["closed"]:
            session = SessionKey(workspace=workspace, session=name)
            loaded, listed_alone = await store.load_session(session, 10), await store.get_session(session)
            seen += [loaded and (loaded.last_ordinal, loaded.messages, bool(loaded.running_on)), listed_alone]
            seen.append(await store.list_messages(session, after=(0, 0), limit=100))
            turns = [await store.find_turn(TurnKey(session=session, ordinal=number)) for number in range(1, 6)]
            seen += [turn and msgspec.structs.replace(turn, node="") for turn in turns]
    again = [new(1, session="elsewhere", request_id=f"reset-{number}") for number in (1, 2)]
    seen += [await store.accept(turn) for turn in again]
    assert seen[-2:] == [Deleted(), Deleted()]
    query = UsageQuery(first="2026-01-01", last="2026-12-31", by=("day", "model", "user"))
    seen.append(await store.list_usage(query, after=None, limit=-1))
    return seen


@pytest.mark.parametrize("target", ["sqlite", "redis"])
@pytest.mark.parametrize("source", ["sqlite", "redis"])
async def test_all_that_a_store_holds_is_found_in_the_one_that_it_is_moved_to(
    source: str, target: str, make: Make, tmp_path: Path
) -> None:
    old, fresh = make(source), make(target)
    path, progress = tmp_path / "moved.jsonl", list[int]()
    async with old.opened() as store:
        await fill(store)
    async with old.records() as records:
        with path.open("wb") as file:
            written = await export(records, file, progress.append)
        assert await records.count() > 0
    async with fresh.records() as records:
        assert await records.count() == 0
        assert await take_in(records, path, progress.append) == (written, written)
    # Once more changes nothing.
    async with fresh.records() as records:
        assert await take_in(records, path, progress.append) == (written, 0)
    assert sum(progress) == 2 * len(await asyncio.to_thread(path.read_bytes))

    async with old.opened() as before, fresh.opened() as after:
        assert await everything(after) == await everything(before)
        told = await deliveries(after)
        assert told == await deliveries(before)
        assert [row[0] for row in told[:-2]] == ["d2", "d3", "d4", "d5"]
        assert told[-2:] == [("m1", None), {("slack", "dead"): 1}]
        # What was taken from the file is as if it had been written here.
        assert (await after.accept(new(7, request_id="again"))) is not None
        assert await after.delete_session(key()) is True
        assert await after.accept(new(7, request_id="again")) is None


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
async def test_what_is_there_already_stays_as_it_is(kind: str, make: Make, tmp_path: Path) -> None:
    path = tmp_path / "moved.jsonl"
    source, target = make("sqlite"), make(kind)
    async with source.opened() as store:
        await fill(store)
    async with source.records() as records:
        with path.open("wb") as file:
            await export(records, file, lambda _: None)
    async with target.opened() as store:
        await keep(store, new(1, title="mine", text="mine", request_id="mine"), answer="mine")
        await keep(store, new(1, session="elsewhere", request_id="again", text="also mine"))
        await store.add_usage([UsageRow(workspace="w", day="2026-01-02", model="m", user="u", turns=100)])
    async with target.records() as records:
        read, fresh = await take_in(records, path, lambda _: None)
    assert 0 < fresh < read
    async with target.opened() as store:
        messages = await store.list_messages(key(), after=(0, 0), limit=100)
        assert [message.text for message in messages] == ["mine", "mine", "question", "ha"]
        session = await store.get_session(key())
        assert session is not None
        assert (session.title, session.message_count) == ("mine", 4)
        query = UsageQuery(workspace="w", first="2026-01-01", last="2026-12-31", by=())
        assert (await store.list_usage(query, after=None, limit=-1)).total.turns == 103
        session = await store.get_session(key("reset"))
        assert session is not None


async def test_a_file_that_is_not_whole_is_refused_before_anything_is_stored(make: Make, tmp_path: Path) -> None:
    path, home = tmp_path / "moved.jsonl", make("sqlite")
    async with home.opened() as store:
        await fill(store)
    async with home.records() as records:
        with path.open("wb") as file:
            await export(records, file, lambda _: None)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for content, text in (
        (b"", "was not written by"),
        (b"{}\n", "was not written by"),
        (whole[:-30], "end is missing"),
        (b"".join(lines[:-1]), "end is missing"),
        (whole.replace(b'"version":3', b'"version":4'), "a newer release"),
    ):
        path.write_bytes(content)
        with pytest.raises(NotMovable, match=text):
            check_file(path)
    for content, text in (
        (b"".join((*lines[:4], b"nonsense\n", *lines[5:])), "line 5 cannot be read"),
        (b"".join((*lines[:4], *lines[5:])), r"should have \d+ records"),
        (whole.replace(b'"ordinal":1,', b'"ordinal":-1,'), r"line \d+ cannot be read: .*ordinal"),
    ):
        path.write_bytes(content)
        async with make("sqlite").records() as records:
            with pytest.raises(NotMovable, match=text):
                await take_in(records, path, lambda _: None)
