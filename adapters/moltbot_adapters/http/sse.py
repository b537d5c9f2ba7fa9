"""Server-Sent Events: one write for each event, pings for proxies, an end for readers that stopped reading."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping

from aiohttp import web

from moltbot_adapters.http.settings import Settings

PING = b": ping\n\n"
HEADERS: Mapping[str, str] = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",
}
_TICK_S = 1.0


class EventStream:
    """A streamed answer. Its headers leave with the first event, so that a failure before it has a status."""

    def __init__(self, request: web.Request, headers: Mapping[str, str] | None = None) -> None:
        self._request = request
        self._response = web.StreamResponse(headers={**HEADERS, **(headers or {})})
        self._opening = asyncio.Lock()
        self._began = self._wrote = self._moved = time.monotonic()
        self._sent = self._backlog = 0
        self.opened = False

    async def write(self, data: bytes) -> None:
        """Sends whole events; waits only when the reader is far behind. Raises `ConnectionError` when it left."""
        if not self.opened:
            await self._open()
        self._wrote = time.monotonic()
        self._sent += len(data)
        await self._response.write(data)

    async def end(self) -> web.StreamResponse:
        """Ends the stream properly and returns the response for aiohttp."""
        if not self.opened:
            await self._open()
        await self._response.write_eof()
        return self._response

    async def _open(self) -> None:
        # The handler and the ticker may both come here; the headers must leave once.
        async with self._opening:
            if not self.opened:
                await self._response.prepare(self._request)
                self.opened = True

    async def open_after(self, delay_s: float) -> None:
        """Lets the headers leave after a while even without an event: whoever waits for them sees that all is well."""
        await asyncio.sleep(delay_s)
        if not self.opened:
            with contextlib.suppress(ConnectionError):  # it left just now: its handler is told as well
                await self.write(PING)

    async def tick(self, now: float, settings: Settings) -> None:
        """Pings an idle stream and cuts one whose reader takes nothing. Never waits for the reader."""
        transport = self._request.transport
        if transport is None or transport.is_closing():
            return
        backlog = transport.get_write_buffer_size()
        if backlog == 0 or self._sent - backlog != self._backlog:
            self._backlog, self._moved = self._sent - backlog, now
        elif now - self._moved > settings.stalled_s:
            transport.abort()
            return
        idle_s = settings.ping_s if self.opened else settings.hold_s
        # With a backlog there is no need for a ping, and writing one might have to wait.
        if backlog == 0 and now - self._wrote > idle_s:
            with contextlib.suppress(ConnectionError):  # it left just now: its handler is told as well
                await self.write(PING)


class Streams:
    """The streams that are open in this process, and the one task that looks after them all."""

    def __init__(self, settings: Settings, on_count: Callable[[int], None]) -> None:
        self._settings = settings
        self._on_count = on_count
        self._open: set[EventStream] = set()

    def __len__(self) -> int:
        return len(self._open)

    @contextlib.asynccontextmanager
    async def stream(
        self, request: web.Request, headers: Mapping[str, str] | None = None, *, open_after_s: float | None = None
    ) -> AsyncIterator[EventStream]:
        """Opens an event stream that is looked after until the block ends."""
        stream = EventStream(request, headers)
        opening = None if open_after_s is None else asyncio.create_task(stream.open_after(open_after_s))
        self._open.add(stream)
        self._on_count(1)
        try:
            yield stream
        finally:
            if opening is not None:
                opening.cancel()
                await asyncio.wait((opening,))
            self._open.discard(stream)
            self._on_count(-1)

    async def look_after(self) -> None:
        """Ticks all streams once a second until it is cancelled."""
        while True:
            await asyncio.sleep(_TICK_S)
            now = time.monotonic()
            for stream in tuple(self._open):
                await stream.tick(now, self._settings)
