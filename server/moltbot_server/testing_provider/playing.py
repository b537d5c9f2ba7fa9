"""How an answer goes out: at its pace, and spoiled where a fault says so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

from aiohttp import web

from moltbot_server.testing_provider.answers import Frames
from moltbot_server.testing_provider.script import Fault

_EVENTS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
_JSON = {"Content-Type": "application/json"}


class _Gone(Exception):
    """The connection was closed on purpose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Playing:
    """One answer on its way out. `wait` and `pace` are seconds; `broken` words an event that is no JSON."""

    request: web.Request
    fault: Fault | None
    wait: float
    pace: float
    broken: Callable[[str], bytes]

    async def stream(self, frames: Frames) -> web.StreamResponse:
        """Send an answer as a stream. Its opening goes out at once, its first word after `wait`."""
        return await self._send(frames, _EVENTS)

    async def whole(self, body: bytes, steps: int) -> web.StreamResponse:
        """Send an answer in one piece, after the time that a stream of so many steps takes."""
        if self._kind == "hang":
            await asyncio.Event().wait()
        await _pass(self.wait + self.pace * max(steps - 1, 0))
        if self._kind in ("", "slow", "empty", "huge"):
            return web.Response(body=body, headers=_JSON)
        half = len(body) // 2
        if self._kind == "broken_sse":  # without a stream there are no lines to spoil: the object breaks off
            return web.Response(body=body[:half], headers=_JSON)
        frames = Frames(opening=b"", chunks=[body[:half], body[half:]], closing=b"", done=b"")
        quick = replace(self, wait=0, pace=0)  # the time has passed already
        return await quick._send(frames, _JSON)

    @property
    def _kind(self) -> str:
        return "" if self.fault is None else self.fault.kind

    async def _send(self, frames: Frames, headers: dict[str, str]) -> web.StreamResponse:
        if self._kind == "hang":
            await asyncio.Event().wait()  # until the client leaves or the provider ends
        response = web.StreamResponse(headers=headers)
        response.enable_chunked_encoding()
        await response.prepare(self.request)
        try:
            if self.wait == 0 and self.pace == 0 and self._kind in ("", "slow", "empty", "huge"):
                await response.write_eof(frames.whole)
            else:
                await self._play(response, frames)
                await response.write_eof()
        except (_Gone, ConnectionResetError):
            # Nobody is there any more, by their wish or by ours: there is nobody to tell.
            self.request.protocol.force_close()
        return response

    async def _play(self, response: web.StreamResponse, frames: Frames) -> None:
        fault, kind = self.fault, self._kind
        await self._write(response, frames.opening)
        await _pass(self.wait)
        for at, chunk in enumerate(frames.chunks):
            if at:
                await _pass(self.pace)
            if fault is not None:
                if kind == "cut" and at == fault.after:
                    self._close()
                if kind == "broken_sse" and at == 1 and await self._break(response, fault, chunk):
                    return
            await self._write(response, chunk)
            if kind == "hang_after_first":
                await asyncio.Event().wait()
        if kind == "cut":
            self._close()  # it was to come later than the answer is long
        while kind == "endless" and frames.chunks:  # until the client leaves or the provider ends
            for chunk in frames.chunks:
                await _pass(self.pace)
                await self._write(response, chunk)
        spoiled = fault is not None and kind == "broken_sse"
        if spoiled and len(frames.chunks) < 2 and await self._break(response, fault, frames.closing):
            return
        await self._write(response, frames.closing)
        if not (spoiled and fault is not None and fault.how == "no_done"):
            await self._write(response, frames.done)

    async def _break(self, response: web.StreamResponse, fault: Fault | None, chunk: bytes) -> bool:
        """Spoil the stream after its first chunk; return whether that is its end."""
        if fault is not None and fault.how == "not_json":
            await self._write(response, self.broken("oops"))
        elif fault is not None and fault.how == "truncated":
            await self._write(response, chunk[: len(chunk) // 2])
            return True
        return False

    async def _write(self, response: web.StreamResponse, data: bytes) -> None:
        if not data:
            return
        for part in _split(data) if self._kind == "split_utf8" else (data,):
            await response.write(part)
            if self._kind == "split_utf8":
                await asyncio.sleep(0)

    def _close(self) -> None:
        if self.request.transport is not None:
            self.request.transport.close()  # what was written still goes out, and then the line is gone
        raise _Gone


async def _pass(seconds: float) -> None:
    if seconds > 0:
        await asyncio.sleep(seconds)


def _split(data: bytes) -> list[bytes]:
    """Cut bytes in the middle of each character that has several; where none has, in the middle of all."""
    edges = [at + 1 for at, byte in enumerate(data) if byte >= 0xC0] or [len(data) // 2]
    edges = [0, *edges, len(data)]
    return [data[begin:end] for begin, end in pairwise(edges) if begin < end]
