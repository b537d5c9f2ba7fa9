"""What the core counts, for Prometheus. Labels are bounded: methods, statuses, reasons and models of this core only.

Counting happens on the event loop's thread, several times in each call, so it takes no lock; prometheus-client turns
the counts into its text when somebody asks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics_core import Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from moltbot_server.turns import Completed, Failed

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_MOST_MODELS = 200


class Tally(Collector):
    """A counter by labels, for one thread."""

    def __init__(self, name: str, text: str, labels: tuple[str, ...] = ()) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._counts: defaultdict[tuple[str, ...], float] = defaultdict(int, {} if labels else {(): 0})

    def add(self, *labels: str, amount: float = 1) -> None:
        """Count something under its labels."""
        self._counts[labels] += amount

    def collect(self) -> Iterable[Metric]:
        """Yield the counter for Prometheus."""
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for labels, count in list(self._counts.items()):
            family.add_metric(labels, count)
        yield family


class Spread:
    """How a duration is spread over buckets, for one thread."""

    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (len(_SECONDS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one duration."""
        self.counts[bisect_left(_SECONDS, seconds)] += 1
        self.sum += seconds


class Spreads(Collector):
    """A histogram of seconds by at most one label."""

    def __init__(self, name: str, text: str, label: str = "") -> None:
        self._name, self._text, self._label = name, text, label
        self._spreads: dict[str, Spread] = {} if label else {"": Spread()}

    def of(self, label: str = "") -> Spread:
        """Return the histogram of a label's value, to be kept by whoever observes often."""
        spread = self._spreads.get(label)
        return self._spreads.setdefault(label, Spread()) if spread is None else spread

    def collect(self) -> Iterable[Metric]:
        """Yield the histogram for Prometheus."""
        family = HistogramMetricFamily(self._name, self._text, labels=(self._label,) if self._label else ())
        bounds = [*map(str, _SECONDS), "+Inf"]
        for label, spread in list(self._spreads.items()):
            total, buckets = 0, []
            for bound, count in zip(bounds, spread.counts, strict=True):
                total += count
                buckets.append((bound, total))
            family.add_metric((label,) if self._label else (), buckets, spread.sum)
        yield family


class Measure(Collector):
    """A gauge that asks for its value when it is read."""

    def __init__(self, name: str, text: str) -> None:
        self._name, self._text = name, text
        self._value: Callable[[], float] = lambda: 0

    def ask(self, value: Callable[[], float]) -> None:
        """Name the function that tells the value."""
        self._value = value

    def collect(self) -> Iterable[Metric]:
        """Yield the gauge for Prometheus."""
        yield GaugeMetricFamily(self._name, self._text, value=self._value())


class Readings(Collector):
    """A gauge by labels that asks for all of its values when it is read."""

    def __init__(self, name: str, text: str, labels: tuple[str, ...]) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._read: Callable[[], Iterable[tuple[tuple[str, ...], float]]] = lambda: ()

    def ask(self, read: Callable[[], Iterable[tuple[tuple[str, ...], float]]]) -> None:
        """Name the function that tells the values, each with its labels."""
        self._read = read

    def collect(self) -> Iterable[Metric]:
        """Yield the gauge for Prometheus."""
        family = GaugeMetricFamily(self._name, self._text, labels=self._labels)
        for labels, value in self._read():
            family.add_metric(labels, value)
        yield family


class CacheCounts:
    """What one cache counts of itself: had, had not, and had because somebody else was waiting for the same."""

    __slots__ = ("hits", "joined", "misses")

    def __init__(self) -> None:
        self.hits = self.misses = self.joined = 0


class CountedCache(Protocol):
    """A cache as its counters are read: see `moltbot_server.rpc.cache` for what else it can."""

    @property
    def name(self) -> str:
        """What it is called, such as `answers`."""

    @property
    def counts(self) -> CacheCounts:
        """Its counters."""

    @property
    def failures(self) -> int:
        """How often what is kept could not be reached."""

    @property
    def entries(self) -> int:
        """How many entries it holds here."""

    @property
    def size(self) -> int:
        """What they take, in bytes."""


class CacheReadings(Collector):
    """The counters of all caches, read from them when somebody asks."""

    def __init__(self) -> None:
        self._caches: Sequence[CountedCache] = ()

    def read(self, caches: Sequence[CountedCache]) -> None:
        """Name the caches."""
        self._caches = caches

    def collect(self) -> Iterable[Metric]:
        """Yield the counters for Prometheus."""
        label = ("cache",)
        totals = {
            "hits": CounterMetricFamily("moltbot_cache_hits", "What a cache had.", labels=label),
            "misses": CounterMetricFamily("moltbot_cache_misses", "What a cache had not.", labels=label),
            "joined": CounterMetricFamily(
                "moltbot_cache_joined", "Who waited for what another asked for.", labels=label
            ),
        }
        failures = CounterMetricFamily("moltbot_cache_failures", "How often a cache was out of reach.", labels=label)
        entries = GaugeMetricFamily("moltbot_cache_entries", "Entries that a cache holds here.", labels=label)
        sizes = GaugeMetricFamily("moltbot_cache_bytes", "What they take in memory.", labels=label)
        for cache in self._caches:
            name = (cache.name,)
            for what, family in totals.items():
                family.add_metric(name, getattr(cache.counts, what))
            failures.add_metric(name, cache.failures)
            entries.add_metric(name, cache.entries)
            sizes.add_metric(name, cache.size)
        yield from (*totals.values(), failures, entries, sizes)


class Metrics:
    """The core's counters, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self.calls = Tally("moltbot_grpc_calls", "gRPC calls that ended.", ("method", "status"))
        self.call_seconds = Spreads("moltbot_grpc_call_seconds", "Length of gRPC calls.", "method")
        self.turns = Tally("moltbot_turns", "Turns that ended.", ("outcome",))
        self.turn_seconds = Spreads("moltbot_turn_seconds", "From arrival to end of a turn.")
        self.first_token_seconds = Spreads("moltbot_first_token_seconds", "From arrival of a turn to its first text.")
        self.queue_seconds = Spreads("moltbot_queue_seconds", "Wait of a turn for its session and a free engine.")
        self.tokens = Tally("moltbot_tokens", "Tokens read and written.", ("model", "direction"))
        self.cost = Tally("moltbot_cost", "Cost of answers, in the currency of the prices.", ("model",))
        self.forwarded = Tally(
            "moltbot_forwarded_calls", "Calls that were made at another node for their callers.", ("method", "outcome")
        )
        self.errors = Tally("moltbot_errors", "Calls and turns that failed.", ("reason",))
        self.trimmed = Tally("moltbot_trimmed_messages", "Messages left out to fit the context.")
        self.turns_under_way = Measure("moltbot_turns_under_way", "Turns that run or wait.")
        self.tasks = Measure("moltbot_tasks", "Tasks of the event loop; at rest always the same number.")
        self.sessions_at_hand = Measure("moltbot_sessions_at_hand", "Sessions kept in memory.")
        self.deliveries = Tally("moltbot_deliveries", "What became of deliveries.", ("channel", "outcome"))
        self.outbox = Readings("moltbot_outbox", "Deliveries that are open, leased here, dead.", ("channel", "state"))
        self.models = Readings("moltbot_model", "What a model's engine counts of itself.", ("model", "number"))
        self._models: set[str] = set()
        self.caches = CacheReadings()
        self._turns, self._queues = self.turn_seconds.of(), self.queue_seconds.of()
        self._first_tokens = self.first_token_seconds.of()
        for own in vars(self).values():
            if isinstance(own, Tally | Spreads | Measure | Readings | CacheReadings):
                self.registry.register(own)

    def call_ended(self, method: str, status: str, seconds: float) -> None:
        """Count a call that ended."""
        self.calls.add(method, status)
        self.call_seconds.of(method).observe(seconds)

    def turn_ended(self, ending: Completed | Failed, model: str) -> None:
        """Count a turn that ended."""
        timings = ending.timings
        self._turns.observe(timings.total)
        if isinstance(ending, Failed):
            self.turns.add("failed")
            self.errors.add(ending.reason)
            return
        self.turns.add(ending.finish_reason.value)
        self._queues.observe(timings.queue)
        self._first_tokens.observe(timings.queue + timings.first_token)
        if not ending.cached:
            label = self._model(model)
            self.tokens.add(label, "input", amount=ending.usage.input_tokens)
            self.tokens.add(label, "output", amount=ending.usage.output_tokens)
        if timings.trimmed_messages:
            self.trimmed.add(amount=timings.trimmed_messages)

    def spent(self, model: str, cost: float) -> None:
        """Count what an answer cost, in millionths of the currency."""
        self.cost.add(self._model(model), amount=cost / 1e6)

    def _model(self, model: str) -> str:
        """Return the label of a model: callers may name any that a provider has, and labels are never forgotten."""
        if model in self._models:
            return model
        if len(self._models) >= _MOST_MODELS:
            return "others"
        self._models.add(model)
        return model

    def page(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self.registry)
