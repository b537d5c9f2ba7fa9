"""The scenario of a loud neighbour: what a workspace, or a session, feels of one that asks fifty times its share.

Asked is the engine role itself, which believes whom an answer is for. Slices in which the quiet one is alone, beside a
neighbour that asks its share, and beside a loud one take turns; figures are those of all slices of a kind together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import msgspec

from moltbot_server.bench.installation import Meter, started, step_aside
from moltbot_server.bench.serving_calls import Ended
from moltbot_server.bench.serving_crowd import Crowd, bar, failures, good, times
from moltbot_server.bench.serving_load import Job

SHARE = 0.1
"""What each is meant to ask: a tenth of what the engine can answer."""
_WAYS = ("alone", "share", "loud")
_SETTLED = 0.5
_DEADLINE = 10.0
_PAIRS = {
    "workspaces": (Job(workspace="quiet", session="one"), Job(workspace="loud", session="one")),
    "sessions": (Job(workspace="both", session="quiet"), Job(workspace="both", session="loud")),
}


def bench_fair(
    *,
    seconds: float,
    rounds: int,
    times_share: float,
    cpus: set[int] | None,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Return the quiet one's first token alone and beside neighbours, between workspaces and between sessions."""
    with started(cpus=cpus) as installation, contextlib.ExitStack() as stack:
        step_aside(cpus)
        quiet = Crowd(stack, installation, processes=1, engine=True)
        loud = Crowd(stack, installation, processes=2, engine=True)
        capacity = _capacity(loud, seconds)
        progress(f"the engine answers {capacity:.0f} a second; the quiet one asks {SHARE * capacity:.0f}")
        slices: dict[str, dict[str, Slices]] = {pair: {way: Slices() for way in _WAYS} for pair in _PAIRS}
        meter = Meter(installation, quiet.cpu_seconds, loud.cpu_seconds)
        for number in range(rounds):
            progress(f"round {number + 1} of {rounds}")
            order = _WAYS if number % 2 == 0 else _WAYS[::-1]
            for pair, askers in _PAIRS.items():
                for way in order:
                    rates = SHARE * capacity, _factor(way, times_share) * SHARE * capacity
                    slices[pair][way].add(*_slice(quiet, loud, askers, rates, seconds))
        used = meter.read()
    found = {pair: {way: slices[pair][way].figures(seconds * rounds) for way in _WAYS} for pair in _PAIRS}
    bars: dict[str, Any] = {}
    for pair, ways in found.items():
        bars[f"{pair}_first_token_p99_of_alone"] = bar(_ratio(ways, "loud", "alone"), "<=", 1.2)
        bars[f"{pair}_quiet_failed"] = bar(sum(ways[way]["quiet_failed"] for way in _WAYS), "<=", 0)
    beside = {pair: _ratio(ways, "loud", "share") for pair, ways in found.items()}
    return {
        "bars": bars,
        "capacity_per_second": round(capacity, 1),
        "first_token_p99_of_beside_a_neighbour_that_asks_its_share": beside,
        "times_share": times_share,
        **found,
        "processors": used,
    }


class Slices:
    """All slices of one way."""

    def __init__(self) -> None:
        self._quiet: list[Ended] = []
        self._loud: list[Ended] = []

    def add(self, quiet: list[Ended], loud: list[Ended]) -> None:
        """Take in what became of the calls of a slice."""
        self._quiet += quiet
        self._loud += loud

    def figures(self, seconds: float) -> dict[str, Any]:
        """Return what both felt, for so many seconds of slices."""
        answered = good(self._quiet)
        return {
            "quiet": times(answered),
            "quiet_per_second": round(len(answered) / seconds, 1),
            "quiet_failed": len(self._quiet) - len(answered),
            "quiet_failures": failures(self._quiet),
            "loud_asked_per_second": round(len(self._loud) / seconds, 1),
            "loud_answered_per_second": round(len(good(self._loud)) / seconds, 1),
            "loud": times(good(self._loud)),
            "loud_failures": failures(self._loud),
        }


def _capacity(loud: Crowd, seconds: float) -> float:
    loud.run(Job(streams=64, seconds=1.0, workspace="warm"))
    begin = loud.begin(Job(streams=64, seconds=seconds + _SETTLED, workspace="warm"))
    calls = [call for call in good(loud.end().ended) if begin + _SETTLED <= call.ended < begin + _SETTLED + seconds]
    if not calls:
        raise RuntimeError("the engine answered nothing")
    return len(calls) / seconds


def _slice(
    quiet: Crowd, loud: Crowd, askers: tuple[Job, Job], rates: tuple[float, float], seconds: float
) -> tuple[list[Ended], list[Ended]]:
    """Return the calls of one slice that were sent after it had settled, the quiet one's and its neighbour's."""
    one, other = (
        msgspec.structs.replace(asker, rate=rate, seconds=seconds + _SETTLED, deadline=_DEADLINE)
        for asker, rate in zip(askers, rates, strict=True)
    )
    begin = quiet.begin(one)
    if other.rate:
        loud.begin(msgspec.structs.replace(other, begin=begin))
    beside = loud.end().ended if other.rate else []
    asked = quiet.end().ended
    since = begin + _SETTLED
    return [call for call in asked if call.sent >= since], [call for call in beside if call.sent >= since]


def _factor(way: str, times_share: float) -> float:
    return {"alone": 0.0, "share": 1.0, "loud": times_share}[way]


def _ratio(ways: dict[str, Any], one: str, other: str) -> float | None:
    """Return how much later the first token of the slowest hundredth was in one way than in the other."""
    late, soon = (ways[way]["quiet"]["first_token_ms"].get("p99") for way in (one, other))
    return round(late / soon, 3) if late and soon else None
