"""`/health` and `/metrics`."""

import time
from typing import Any

from aiohttp import web

from moltbot_adapters.core_client import CoreClient
from moltbot_adapters.http.metrics import CONTENT_TYPE, Metrics
from moltbot_adapters.http.origin import Origin
from moltbot_adapters.http.sse import Streams

_GOOD = "SERVING"
_FRESH_S = 1.0
_FRESH_BAD_S = 0.1  # who waits for the core to start must not wait for the news of it


class Status:
    """Tells how the adapter and the core are."""

    def __init__(self, core: CoreClient, metrics: Metrics, streams: Streams, origin: Origin, version: str) -> None:
        self._core = core
        self._metrics = metrics
        self._streams = streams
        self._origin = origin
        self._version = version
        self._ask_again = 0.0
        self._core_status = "UNKNOWN"

    async def health(self, request: web.Request) -> web.Response:
        """`GET /health`: 200 when turns can be answered, else 503. Only this machine is told more than that."""
        now = time.monotonic()
        if now >= self._ask_again:  # so that asking often does not reach the core often
            self._ask_again = now + _FRESH_BAD_S
            self._core_status = await self._core.health()
            if self._core_status == _GOOD:
                self._ask_again = now + _FRESH_S
        good = self._core_status == _GOOD
        answer: dict[str, Any] = {"status": "ok" if good else "unavailable"}
        if self._origin.is_local(request):
            answer["version"] = self._version
            answer["core"] = {"status": self._core_status}
            answer["streams"] = len(self._streams)
        return web.json_response(answer, status=200 if good else 503)

    async def metrics(self, request: web.Request) -> web.Response:
        """`GET /metrics`: the counters for Prometheus."""
        return web.Response(body=self._metrics.exposition(), headers={"Content-Type": CONTENT_TYPE})
