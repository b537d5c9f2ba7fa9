"""What turns used, in Redis: for each day of a workspace a hash, with a field for each model and user."""

from __future__ import annotations

import secrets
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence

import msgspec

from moltbot_server.store.protocol import UsagePage, UsagePlace, UsageQuery, UsageRow
from moltbot_server.store.redis_line import Argument
from moltbot_server.turns import encode

REMEMBERED = 3600
"""Seconds for which Redis knows what was added, so that nothing is added twice."""

_SUMS = struct.Struct("<dddddd")
_names = msgspec.msgpack.Decoder(tuple[str, str])

Row = tuple[str, str, str, tuple[float, ...]]
"""Day, model, user and sums."""

_Sums = dict[tuple[str, str, str], list[float]]


def addition(rows: Iterable[UsageRow]) -> tuple[str, tuple[Argument, ...]]:
    """Return a name for an addition of rows, and what the script is told of them."""
    told: list[Argument] = []
    for row in rows:
        told += (row.day, encode((row.model, row.user)), row.turns, row.input_tokens, row.output_tokens)
        told += (row.cached_input_tokens, row.cached_turns, row.cost)
    return secrets.token_hex(12), tuple(told)


def row_of(day: str, field: bytes, sums: bytes) -> Row:
    """Return a row as it is stored."""
    model, user = _names.decode(field)
    return day, model, user, _SUMS.unpack(sums)


def packed(row: UsageRow) -> tuple[bytes, bytes]:
    """Return the field of a row and its sums."""
    numbers = (row.turns, row.input_tokens, row.output_tokens, row.cached_input_tokens, row.cached_turns, row.cost)
    return encode((row.model, row.user)), _SUMS.pack(*numbers)


def usage_row(workspace: str, row: Row) -> UsageRow:
    """Return a row, or a sum of rows, as others see it."""
    day, model, user, (*counts, cost) = row
    turns, read, written, cached, cached_turns = map(int, counts)
    return UsageRow(
        workspace=workspace,
        day=day,
        model=model,
        user=user,
        turns=turns,
        input_tokens=read,
        output_tokens=written,
        cached_input_tokens=cached,
        cached_turns=cached_turns,
        cost=cost,
    )


async def list_usage(
    query: UsageQuery,
    workspaces: Callable[[], Awaitable[Sequence[str]]],
    rows: Callable[[str], AsyncIterator[Row]],
    *,
    after: UsagePlace | None,
    limit: int,
) -> UsagePage:
    """Return the page that a query asks for, and the total; `rows` yields those of a workspace in the query's days."""
    asked = [query.workspace] if query.workspace else sorted(await workspaces())
    total, found = [0.0] * 6, []
    for workspace in asked:
        sums: _Sums = {}
        async for day, model, user, numbers in rows(workspace):
            if (query.model and model != query.model) or (query.user and user != query.user):
                continue
            told = zip(("day", "model", "user"), (day, model, user), strict=True)
            first, second, third = (name if by in query.by else "" for by, name in told)
            _add(total, numbers)
            _add(sums.setdefault((first, second, third), [0.0] * 6), numbers)
        found += [usage_row(workspace, (*place, tuple(sums[place]))) for place in _in_order(sums, after)]
    chosen = found if limit < 0 else found[:limit]
    return UsagePage(rows=tuple(chosen), total=usage_row(query.workspace, ("", "", "", tuple(total))))


def _add(sums: list[float], numbers: Sequence[float]) -> None:
    for place, number in enumerate(numbers):
        sums[place] += number


def _in_order(sums: _Sums, after: UsagePlace | None) -> list[tuple[str, str, str]]:
    """Return the places after one: the newest day first, then by model and user."""
    places = sorted(sums, key=lambda place: place[1:])
    places.sort(key=lambda place: place[0], reverse=True)
    if after is None:
        return places
    return [place for place in places if place[0] < after[0] or (place[0] == after[0] and place[1:] > after[1:])]
