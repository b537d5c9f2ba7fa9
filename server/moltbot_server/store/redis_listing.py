"""Lists of sessions in Redis: from an index that is sorted by time, in steps, until enough was found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moltbot_server.store.redis_line import Call, RedisLine
from moltbot_server.store.redis_rows import SESSION_FIELDS, session_from
from moltbot_server.turns import Session, SessionKey

_STEP = 200


async def list_sessions(
    line: RedisLine,
    base: str,
    workspace: str,
    *,
    user: str,
    channel: str,
    before: tuple[float, str] | None,
    limit: int,
) -> Sequence[Session]:
    """Return sessions, last used first, that come after a place.

    Raises:
        StorageUnavailable: Redis does not answer.
    """
    index = f"{base}u:{user}" if user else f"{base}listed"
    lowest = "-inf" if before is None else repr(-before[0])
    found: list[Session] = []
    start = 0
    while len(found) < limit:
        step = ("ZRANGEBYSCORE", index, lowest, "+inf", "WITHSCORES", "LIMIT", start, _STEP)
        place: list[Any] = await line.put(Call(step, read=lambda replies: replies[0]))
        names = [
            name.decode()
            for name, score in zip(place[::2], place[1::2], strict=True)
            if before is None or -float(score) < before[0] or name.decode() > before[1]
        ]
        found += [
            session
            for session in await _sessions(line, base, workspace, names)
            if session is not None and (not channel or session.channel == channel)
        ]
        if len(place) < 2 * _STEP:
            break
        start += _STEP
    return found[:limit]


async def _sessions(line: RedisLine, base: str, workspace: str, names: Sequence[str]) -> list[Session | None]:
    if not names:
        return []
    keys = [SessionKey(workspace=workspace, session=name) for name in names]

    def read(replies: list[Any]) -> list[Session | None]:
        return [session_from(key, fields) for key, fields in zip(keys, replies, strict=True)]

    return await line.put(Call(*(("HMGET", f"{base}s:{name}", *SESSION_FIELDS) for name in names), read=read))
