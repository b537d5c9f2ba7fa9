"""A process that makes load like `moltbot_server.bench.load`, and takes a fifth of the processor for it.

It speaks just as much HTTP/2 as unary gRPC calls need, for benchmarks whose servers need the machine for themselves.
Run as `python -m moltbot_server.bench.lean_load`; it reads the same plan and the same lines, and makes `RunTurn` calls.
Of the contract's messages it looks at the status alone.
"""

from __future__ import annotations

import asyncio
import json
import struct
import sys
import time
import uuid
from collections.abc import Callable
from typing import Any, cast

import uvloop
from moltbot.v1 import chat_pb2, message_pb2

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GOAWAY, _WINDOW = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_LARGEST_WINDOW = (1 << 31) - 1
_TABLE_SIZE, _INITIAL_WINDOW = 1, 4  # names of settings
_FIRST_ADDED = 62  # the place in the header table of what was added last
_WELL = b"grpc-status\x010"
_METHOD = "/moltbot.v1.ChatService/RunTurn"
_TURNS_IN_A_SESSION = 10
_LOST = "the connection was lost"


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">IBI", len(payload) << 8 | kind, flags, stream) + payload


class Connection(asyncio.Protocol):
    """A connection on which unary calls of one method are made; `answered` hears of each: its mark, and what was wrong.

    What is sent is well below the windows that servers grant, so they are not kept account of.
    """

    def __init__(self, authority: str, key: str, answered: Callable[[int, str], None]) -> None:
        self._answered = answered
        self._calls: dict[int, int] = {}
        self._next = 1
        self._received = b""
        self._unsent: list[bytes] = []
        self._reading = self._lost = False
        self._transport: asyncio.Transport | None = None
        named = {
            ":path": _METHOD,
            ":authority": authority,
            "te": "trailers",
            "content-type": "application/grpc",
            "user-agent": "moltbot-bench",
            "authorization": f"Bearer {key}",
        }
        # POST and http stand in every table; the others are added by the first call, and named by their places then.
        texts = ((name.encode(), value.encode()) for name, value in named.items())
        added = b"".join(b"\x40" + bytes([len(n)]) + n + bytes([len(v)]) + v for n, v in texts)
        self._first = b"\x83\x86" + added
        self._later = b"\x83\x86" + bytes(0x80 | _FIRST_ADDED + place for place in reversed(range(len(named))))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin: no table for what the server says, and windows that never close."""
        self._transport = writing = cast(asyncio.Transport, transport)
        settings = struct.pack(">HIHI", _TABLE_SIZE, 0, _INITIAL_WINDOW, _LARGEST_WINDOW)
        window = struct.pack(">I", _LARGEST_WINDOW - 65535)
        writing.write(_PREFACE + _frame(_SETTINGS, 0, 0, settings) + _frame(_WINDOW, 0, 0, window))

    def call(self, mark: int, message: bytes) -> None:
        """Make a call; `answered` is given the mark."""
        if self._lost:
            self._answered(mark, _LOST)
            return
        stream, self._next = self._next, self._next + 2
        self._calls[stream] = mark
        headers = self._first if stream == 1 else self._later
        body = b"\x00" + len(message).to_bytes(4, "big") + message
        self._unsent += (_frame(_HEADERS, _END_HEADERS, stream, headers), _frame(_DATA, _END_STREAM, stream, body))
        if not self._reading:
            self._flush()

    def data_received(self, data: bytes) -> None:
        """Take what came frame by frame, and send what was said to it together."""
        self._reading = True
        data = self._received + data
        at = 0
        while len(data) - at >= 9:
            size_and_kind, flags, stream = struct.unpack_from(">IBI", data, at)
            end = at + 9 + (size_and_kind >> 8)
            if end > len(data):
                break
            self._take(size_and_kind & 0xFF, flags, stream, data[at + 9 : end])
            at = end
        self._received = data[at:]
        self._reading = False
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell of all calls that they are lost."""
        self._lost = True
        calls, self._calls = self._calls, {}
        for mark in calls.values():
            self._answered(mark, _LOST)

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.close()

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _HEADERS and flags & _END_STREAM:
            self._answered(self._calls.pop(stream), "" if _WELL in payload else f"refused: {payload[-300:]!r}")
        elif kind == _RESET:
            self._answered(self._calls.pop(stream), "the call was reset")
        elif kind in (_SETTINGS, _PING) and not flags & _ACK:
            self._unsent.append(_frame(kind, _ACK, 0, payload if kind == _PING else b""))

    def _flush(self) -> None:
        if self._unsent and self._transport is not None:
            self._transport.write(b"".join(self._unsent))
            self._unsent.clear()


class LeanLoad:
    """Keeps calls in flight and counts those that end within a slice."""

    def __init__(self, in_flight: int) -> None:
        self._in_flight = in_flight
        self._connections: list[Connection] = []
        self._run = uuid.uuid4().hex[:8]
        self._turns = [0] * in_flight
        self._begun = [0.0] * in_flight
        self._end = 0.0
        self._latencies: list[float] = []
        self._problems: list[str] = []
        self._left = 0
        self._over = asyncio.Event()

    async def connect(self, address: str, key: str, connections: int) -> None:
        """Connect to a server, `HOST:PORT`."""
        host, _, port = address.rpartition(":")
        loop = asyncio.get_running_loop()
        for _ in range(connections):
            _, made = await loop.create_connection(lambda: Connection(address, key, self._answered), host, int(port))
            self._connections.append(made)

    async def run(self, seconds: float) -> dict[str, Any]:
        """Make load for a while and return what was counted."""
        self._latencies, self._problems, self._left = [], [], self._in_flight
        self._over.clear()
        self._end = time.perf_counter() + seconds
        for mark in range(self._in_flight):
            self._ask(mark)
        await self._over.wait()
        ordered = sorted(self._latencies)
        return {
            "calls": len(ordered),
            "messages": len(ordered),
            "errors": len(self._problems),
            "first_error": next(iter(self._problems), ""),
            "seconds": seconds,
            "p50_ms": _percentile(ordered, 0.50),
            "p99_ms": _percentile(ordered, 0.99),
        }

    def close(self) -> None:
        """Close the connections."""
        for connection in self._connections:
            connection.close()

    def _ask(self, mark: int) -> None:
        number = self._turns[mark] = self._turns[mark] + 1
        turn = chat_pb2.TurnInput(
            session=f"sessions/bench-{self._run}-{mark}-{number // _TURNS_IN_A_SESSION}",
            request_id=f"{self._run}-{mark}-{number}",
            parts=[message_pb2.Part(text="hello")],
        )
        self._begun[mark] = time.perf_counter()
        message = chat_pb2.RunTurnRequest(turn=turn).SerializeToString()
        self._connections[mark % len(self._connections)].call(mark, message)

    def _answered(self, mark: int, problem: str) -> None:
        now = time.perf_counter()
        if problem:
            self._problems.append(problem)
        elif now <= self._end:
            self._latencies.append(now - self._begun[mark])
        if now < self._end and not problem:
            self._ask(mark)
            return
        self._left -= 1
        if not self._left:
            self._over.set()


def _percentile(ordered: list[float], share: float) -> float:
    return round(ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1000, 3) if ordered else 0.0


async def _main() -> None:
    loop = asyncio.get_running_loop()
    # Not an argument: those can be read by everybody on the machine, and the plan holds a key.
    plan = json.loads(await loop.run_in_executor(None, sys.stdin.readline))
    load = LeanLoad(plan["in_flight"])
    await load.connect(plan["address"], plan["key"], plan["channels"])
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(await load.run(float(line))), flush=True)
    load.close()


if __name__ == "__main__":
    uvloop.run(_main())
