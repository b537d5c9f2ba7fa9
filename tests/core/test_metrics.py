"""What is counted, in Prometheus' own words."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request

import pytest
from moltbot_server.metrics import Metrics, Spread, Tally
from moltbot_server.ops import OpsServer
from prometheus_client.parser import text_string_to_metric_families


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.page().decode())
        for sample in family.samples
        if sample.name.startswith("moltbot_")
    }


def test_counters_are_counted_by_their_labels() -> None:
    metrics = Metrics()
    metrics.errors.add("A")
    metrics.errors.add("A", amount=2)
    metrics.errors.add("B")
    metrics.trimmed.add(amount=5)

    found = samples(metrics)
    assert found["moltbot_errors_total", (("reason", "A"),)] == 3
    assert found["moltbot_errors_total", (("reason", "B"),)] == 1
    assert found["moltbot_trimmed_messages_total", ()] == 5


def test_a_histogram_counts_each_duration_in_every_bucket_that_it_fits() -> None:
    metrics = Metrics()
    for seconds in (0.0, 0.001, 0.0011, 0.3, 1000.0):
        metrics.turn_seconds.of().observe(seconds)
    found = samples(metrics)

    buckets = {
        dict(labels)["le"]: value for (name, labels), value in found.items() if name == "moltbot_turn_seconds_bucket"
    }
    assert (buckets["0.001"], buckets["0.0025"], buckets["0.25"], buckets["0.5"], buckets["60.0"], buckets["+Inf"]) == (
        2,
        3,
        3,
        4,
        4,
        5,
    )
    assert found["moltbot_turn_seconds_count", ()] == 5
    assert found["moltbot_turn_seconds_sum", ()] == pytest.approx(1000.3021)
    values = list(buckets.values())
    assert values == sorted(values)


def test_a_gauge_is_asked_when_it_is_read() -> None:
    metrics, lives = Metrics(), [1, 2]
    metrics.turns_under_way.ask(lambda: len(lives))
    assert samples(metrics)["moltbot_turns_under_way", ()] == 2
    lives.clear()
    assert samples(metrics)["moltbot_turns_under_way", ()] == 0


def test_a_page_without_anything_counted_is_whole() -> None:
    found = samples(Metrics())

    assert found["moltbot_turn_seconds_count", ()] == 0
    assert found["moltbot_trimmed_messages_total", ()] == 0


def test_the_page_is_read_while_counting_goes_on() -> None:
    metrics, stop = Metrics(), threading.Event()
    failures: list[BaseException] = []

    def read() -> None:
        try:
            while not stop.is_set():
                metrics.page()
        except BaseException as error:
            failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(20_000):
        metrics.errors.add(f"reason {number % 500}")
        metrics.call_seconds.of(f"method {number % 500}").observe(0.1)
    stop.set()
    reader.join()

    assert failures == []


def test_two_cores_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.errors.add("A")

    assert ("moltbot_errors_total", (("reason", "A"),)) not in samples(other)
    assert isinstance(one.errors, Tally)
    assert isinstance(one.turn_seconds.of(), Spread)


def get(address: str, path: str, method: str = "GET") -> tuple[int, str]:
    request = urllib.request.Request(f"http://{address}{path}", method=method)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_operators_see_health_and_metrics_and_nothing_else(host: str) -> None:
    health = {"status": "ok"}
    try:
        ops = OpsServer(host=host, port=0, metrics=lambda: b"page", health=lambda: health)
    except OSError:
        pytest.skip(f"{host} cannot be bound here")
    try:
        assert get(ops.address, "/health") == (200, '{"status": "ok"}\n')
        assert get(ops.address, "/metrics?x=1") == (200, "page")
        assert get(ops.address, "/")[0] == 404
        assert get(ops.address, "/metrics", "POST")[0] == 501
        health["status"] = "leaving"
        assert get(ops.address, "/health")[0] == 503
    finally:
        ops.close()


def test_a_taken_port_is_named() -> None:
    ops = OpsServer(host="127.0.0.1", port=0, metrics=lambda: b"", health=dict)
    port = int(ops.address.rpartition(":")[2])
    try:
        with pytest.raises(OSError, match=f"127.0.0.1:{port}"):
            OpsServer(host="127.0.0.1", port=port, metrics=lambda: b"", health=dict)
    finally:
        ops.close()
