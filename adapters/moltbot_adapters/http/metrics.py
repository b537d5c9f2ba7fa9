"""What the adapter counts, for Prometheus. Labels take values from fixed sets only, never from a request."""

import os

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
    multiprocess,
)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_METHODS = frozenset(("GET", "HEAD", "POST", "DELETE", "PUT", "PATCH", "OPTIONS"))
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """The counters of one process; with PROMETHEUS_MULTIPROC_DIR set, of all workers that share the folder."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        if shared := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            multiprocess.MultiProcessCollector(self._registry, path=shared)  # type: ignore[no-untyped-call]
            own = CollectorRegistry()  # the values live in files; the collector above reads those of every worker
        else:
            own = self._registry
            ProcessCollector(registry=own)
        self._requests = Counter(
            "moltbot_http_requests",
            "Requests by outcome.",
            ("route", "method", "status", "reason"),
            registry=own,
        )
        self._seconds = Histogram(
            "moltbot_http_request_seconds",
            "From a request's arrival to the end of its answer.",
            ("route", "method"),
            buckets=_SECONDS,
            registry=own,
        )
        self._first_token = Histogram(
            "moltbot_http_first_token_seconds",
            "From a request's arrival to the first text written.",
            ("route",),
            buckets=_SECONDS,
            registry=own,
        )
        self._streams = Gauge(
            "moltbot_http_streams", "Streams that are open.", multiprocess_mode="livesum", registry=own
        )
        self._tokens = Counter("moltbot_http_tokens", "Tokens of answered turns.", ("kind",), registry=own)
        self._retries = Counter(
            "moltbot_http_core_retries", "Calls to the core that were made again unseen.", ("kind",), registry=own
        )

    def request(self, route: str, method: str, status: int, reason: str, seconds: float) -> None:
        """Counts a request that has ended. `route` is a template, `reason` an error code of ours or empty."""
        method = method if method in _METHODS else "OTHER"
        self._requests.labels(route, method, str(status), reason).inc()
        self._seconds.labels(route, method).observe(seconds)

    def first_token(self, route: str, seconds: float) -> None:
        """Counts the time to the first text of a streamed answer."""
        self._first_token.labels(route).observe(seconds)

    def stream(self, change: int) -> None:
        """Counts a stream that was opened (1) or has ended (-1)."""
        self._streams.inc(change)

    def tokens(self, read: int, written: int, cached: int) -> None:
        """Counts the tokens of a turn."""
        self._tokens.labels("input").inc(read)
        self._tokens.labels("output").inc(written)
        self._tokens.labels("cached_input").inc(cached)

    def retry(self, kind: str) -> None:
        """Counts a call that was made again: `start` or `resume`."""
        self._retries.labels(kind).inc()

    def exposition(self) -> bytes:
        """Returns the page for Prometheus."""
        return generate_latest(self._registry)


def forget_process() -> None:
    """Takes this process out of the gauges that workers share. Called once, when it leaves."""
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        multiprocess.mark_process_dead(os.getpid())  # type: ignore[no-untyped-call]
