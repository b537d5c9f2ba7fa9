"""What the core counts, for Prometheus. Labels are bounded: methods, statuses, reasons and models of this core only."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The core's counters, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        own = self.registry
        self.calls = Counter("moltbot_grpc_calls", "gRPC calls that ended.", ["method", "status"], registry=own)
        self.call_seconds = Histogram(
            "moltbot_grpc_call_seconds", "Length of gRPC calls.", ["method"], buckets=_SECONDS, registry=own
        )
        self.turns = Counter("moltbot_turns", "Turns that ended.", ["outcome"], registry=own)
        self.turn_seconds = Histogram(
            "moltbot_turn_seconds", "From arrival to end of a turn.", buckets=_SECONDS, registry=own
        )
        self.first_token_seconds = Histogram(
            "moltbot_first_token_seconds", "From arrival of a turn to its first text.", buckets=_SECONDS, registry=own
        )
        self.queue_seconds = Histogram(
            "moltbot_queue_seconds", "Wait of a turn for its session and a free engine.", buckets=_SECONDS, registry=own
        )
        self.tokens = Counter("moltbot_tokens", "Tokens read and written.", ["model", "direction"], registry=own)
        self.errors = Counter("moltbot_errors", "Calls and turns that failed.", ["reason"], registry=own)
        self.trimmed = Counter("moltbot_trimmed_messages", "Messages left out to fit the context.", registry=own)
        self.turns_under_way = Gauge("moltbot_turns_under_way", "Turns that run or wait.", registry=own)
        self.sessions_at_hand = Gauge("moltbot_sessions_at_hand", "Sessions kept in memory.", registry=own)

    def page(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self.registry)
