"""Whether a Redis store is set up well, which nodes it has, and whether what is in it belongs together."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence

from moltbot_server.store.damage import Unreadable
from moltbot_server.store.findings import Finding, dead_letters
from moltbot_server.store.redis import RedisStore
from moltbot_server.store.redis_line import Command
from moltbot_server.store.redis_moving import RedisRecords
from moltbot_server.store.redis_owners import REMEDY, fingerprints
from moltbot_server.store.redis_rows import TURN_FIELDS, key_of, messages_from, turn_from
from moltbot_server.turns import TurnKey

_STEP = 200
_SAID = ("q", "a", "m", "f")
_MESSAGE = ("q", "a", "m", "c", "e", "f")


async def check_redis(store: RedisStore, *, progress: Callable[[float, str], None]) -> AsyncIterator[Finding]:
    """Yield what is wrong with an open store; nothing is changed. `progress` hears how far it is, from 0 to 1.

    Raises:
        StorageUnavailable: Redis does not answer.
    """
    for finding in await store.judge():
        yield finding
    async for finding in _nodes(store):
        yield finding
    if dead := sum(number for (_, state), number in (await store.outbox.count()).items() if state == "dead"):
        yield Finding(text=dead_letters(dead), weight="note")
    workspaces = await store.workspaces()
    for place, workspace in enumerate(workspaces):
        progress(place / len(workspaces), "turns")
        async for finding in _turns(store, workspace):
            yield finding
        async for finding in _requests(store, workspace):
            yield finding


async def _nodes(store: RedisStore) -> AsyncIterator[Finding]:
    """Yield which nodes are there, and what others have left."""
    there = await nodes_there(store)
    for node, told in there.items():
        yield Finding(text=f"the core {node} is there ({told})", weight="note")
    keys = len({mark for mark, _ in (await fingerprints(store.ask, store.prefix)).values()})
    if keys > 1:
        text = f"its cores have {keys} different keys, and a caller's is good at some of them alone: {REMEDY}"
        yield Finding(text=text, weight="warning")
    for workspace in await store.workspaces():
        base = store.base(workspace)
        (nodes,) = await store.ask(("SMEMBERS", f"{base}nodes"))
        for name in sorted(name.decode() for name in nodes):
            (running,) = await store.ask(("ZCARD", f"{base}run:{name}"))
            if running and name not in there:
                turns = "1 turn" if running == 1 else f"{running} turns"
                waits = "waits" if running == 1 else "wait"
                text = f"{turns} of workspace {workspace} {waits} to be carried on: their core ({name}) is gone"
                yield Finding(text=text, weight="note")


async def nodes_there(store: RedisStore) -> dict[str, str]:
    """Return the cores that are there, but this process, and what is told of each: host and process.

    Raises:
        StorageUnavailable: Redis does not answer.
    """
    (known,) = await store.ask(("SMEMBERS", f"{store.prefix}:nodes"))
    names = sorted({name.decode() for name in known} - {store.node})
    told = await store.ask(*(("GET", f"{store.prefix}:node:{name}") for name in names)) if names else []
    return {name: lease.decode() for name, lease in zip(names, told, strict=True) if lease is not None}


async def _turns(store: RedisStore, workspace: str) -> AsyncIterator[Finding]:
    """Yield the turns that cannot be read, and what belongs to none."""
    base = store.base(workspace)
    unread: list[str] = []
    lost = 0
    async for name in RedisRecords(store).names(workspace, "t:"):
        unread.append(name)
        if len(unread) == _STEP:
            async for finding in _read(store, workspace, unread):
                yield finding
            unread.clear()
    async for finding in _read(store, workspace, unread):
        yield finding
    async for name in RedisRecords(store).names(workspace, "j:"):
        (state,) = await store.ask(("HGET", f"{base}t:{name}", "s"))
        lost += state != b"running"
    if lost:
        yield Finding(text=f"{lost} journals of workspace {workspace} belong to no turn that runs", weight="warning")


async def _read(store: RedisStore, workspace: str, names: Sequence[str]) -> AsyncIterator[Finding]:
    base = store.base(workspace)
    reading: list[Command] = [("HMGET", f"{base}t:{name}", *TURN_FIELDS, *_SAID) for name in names]
    owning: list[Command] = [("ZSCORE", f"{base}o:{name.partition(':')[2]}", name) for name in names]
    if not names:
        return
    replies = await store.ask(*reading, *owning)
    found, places = replies[: len(names)], replies[len(names) :]
    told = [dict(zip((*TURN_FIELDS, *_SAID), fields, strict=True)) for fields in found]
    running = [
        (name, (turn["n"] or b"").decode("utf-8", "replace"))
        for name, turn in zip(names, told, strict=True)
        if turn["s"] == b"running"
    ]
    scores = await store.ask(*(("ZSCORE", f"{base}run:{node}", name) for name, node in running)) if running else []
    for (name, _), score in zip(running, scores, strict=True):
        if score is None and (await store.ask(("HGET", f"{base}t:{name}", "s")))[0] == b"running":
            yield Finding(text=f"{_told(workspace, name)} runs, and no core has it")
    for name, turn, place in zip(names, told, places, strict=True):
        if all(field is None for field in turn.values()):
            continue  # deleted meanwhile
        if place is None:
            yield Finding(text=f"{_told(workspace, name)} belongs to no session", weight="warning")
        if not _readable(key_of(workspace, name.encode()), turn):
            yield Finding(text=f"{_told(workspace, name)} cannot be read")


def _readable(key: TurnKey, turn: dict[str, bytes | None]) -> bool:
    """Return whether all that is kept of a turn can be read."""
    if any(turn[name] is None for name in ("r", "d", "s", "c", "e")):
        return False
    try:
        turn_from(key, [turn[name] for name in TURN_FIELDS])
        messages_from(key.session, (str(key.ordinal).encode(), *(turn[name] for name in _MESSAGE)))
    except Unreadable:
        return False
    return True


async def _requests(store: RedisStore, workspace: str) -> AsyncIterator[Finding]:
    """Yield how many request_ids lead to turns that are not there."""
    base, cursor, lost = store.base(workspace), b"0", 0
    while True:
        ((cursor, found),) = await store.ask(("HSCAN", f"{base}requests", cursor, "COUNT", _STEP))
        names = found[1::2]
        if names:
            there = await store.ask(*(("EXISTS", f"{base}t:".encode() + name) for name in names))
            lost += there.count(0)
        if cursor == b"0":
            break
    if lost:
        text = f"{lost} request_ids of workspace {workspace} lead to turns that are not there"
        yield Finding(text=text, weight="warning")


def _told(workspace: str, name: str) -> str:
    key = key_of(workspace, name.encode())
    return f"turn {key.ordinal} of session {key.session.session} in workspace {workspace}"
