"""`/health` and `/metrics`."""

from typing import Any

from aiohttp import web

from moltbot_adapters.http.core_watch import CoreWatch
from moltbot_adapters.http.metrics import CONTENT_TYPE, Metrics
from moltbot_adapters.http.origin import Origin
from moltbot_adapters.http.sse import Streams


class Status:
    """Tells how the adapter and the core are."""

    def __init__(self, watch: CoreWatch, metrics: Metrics, streams: Streams, origin: Origin, version: str) -> None:
        self._watch = watch
        self._metrics = metrics
        self._streams = streams
        self._origin = origin
        self._version = version

    async def health(self, request: web.Request) -> web.Response:
        """`GET /health`: 200 when the core takes calls, else 503. Only this machine is told more than that.

        A store that is away is told and stays 200: all adapters have the same one, and a balancer that took them all
        out would put its own error in the place of the page and the refusals, which say why and try again.
        """
        watch = self._watch
        await watch.look()
        status = "unavailable" if not watch.serves else "store away" if watch.store == "away" else "ok"
        answer: dict[str, Any] = {"status": status}
        if self._origin.is_local(request):
            answer["version"] = self._version
            answer["core"] = {"status": watch.core}
            answer["store"] = watch.store
            answer["streams"] = len(self._streams)
        return web.json_response(answer, status=200 if watch.serves else 503)

    async def metrics(self, request: web.Request) -> web.Response:
        """`GET /metrics`: the counters for Prometheus."""
        return web.Response(body=self._metrics.exposition(), headers={"Content-Type": CONTENT_TYPE})
