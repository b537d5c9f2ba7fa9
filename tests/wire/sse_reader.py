"""Reads Server-Sent Events as a browser does."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp


@dataclass(frozen=True)
class Frame:
    """One event; its id is 0 where it has none, as what is no event of a turn."""

    id: int
    event: str
    data: dict[str, Any]


async def frames(answer: aiohttp.ClientResponse) -> AsyncIterator[Frame]:
    """Yields the events of a stream until it ends."""
    fields: dict[str, str] = {}
    async for raw in answer.content:
        line = raw.decode().rstrip("\n")
        if not line:
            if fields:
                yield Frame(int(fields.get("id", 0)), fields["event"], json.loads(fields["data"]))
            fields = {}
        elif not line.startswith(":"):
            name, _, value = line.partition(": ")
            fields[name] = value


async def all_frames(answer: aiohttp.ClientResponse) -> list[Frame]:
    """Returns the events of a whole stream."""
    assert answer.status == 200, await answer.text()
    assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    return [frame async for frame in frames(answer)]
