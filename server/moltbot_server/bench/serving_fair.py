"""The scenario of a loud neighbour: what others feel of a workspace, or a session, that asks fifty times its share.

Fifty use one engine; the share of each is a fiftieth of what the engine can answer. At first all of them ask half of
that. Then one asks fifty times its share, which is all that the engine can answer, and the others go on as before.
Asked is the engine role itself, which believes whom an answer is for. Slices in which the others are without the one,
in which it asks as they do, and in which it is loud take turns; figures are those of all slices of a kind together.
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

NEIGHBOURS = 50
"""How many share the engine, the loud one included."""
NORMAL = 0.5
"""What part of its share each asks for as a rule."""
_WAYS = ("without", "normal", "loud")
_SETTLED = 0.5
_DEADLINE = 10.0
_OTHERS = range(1, NEIGHBOURS)
_PAIRS = {
    "workspaces": (Job(askers=tuple((f"other-{n}", "one") for n in _OTHERS)), Job(askers=(("loud", "one"),))),
    "sessions": (Job(askers=tuple(("all", f"other-{n}") for n in _OTHERS)), Job(askers=(("all", "loud"),))),
}


def bench_fair(
    *,
    seconds: float,
    rounds: int,
    times_share: float,
    cpus: set[int] | None,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Return the others' first token without, beside a normal and beside a loud neighbour: workspaces and sessions."""
    with started(cpus=cpus) as installation, contextlib.ExitStack() as stack:
        step_aside(cpus)
        others = Crowd(stack, installation, processes=1, engine=True)
        loud = Crowd(stack, installation, processes=2, engine=True)
        capacity = _capacity(loud, seconds)
        share = capacity / NEIGHBOURS
        asked = {"without": 0.0, "normal": NORMAL * share, "loud": times_share * share}
        progress(f"the engine answers {capacity:.0f} a second; {NEIGHBOURS - 1} ask {NORMAL * share:.1f} each")
        slices: dict[str, dict[str, Slices]] = {pair: {way: Slices() for way in _WAYS} for pair in _PAIRS}
        meter = Meter(installation, others.cpu_seconds, loud.cpu_seconds)
        for number in range(rounds):
            progress(f"round {number + 1} of {rounds}")
            order = _WAYS if number % 2 == 0 else _WAYS[::-1]
            for pair, askers in _PAIRS.items():
                for way in order:
                    rates = NORMAL * share * len(_OTHERS), asked[way]
                    slices[pair][way].add(*_slice(others, loud, askers, rates, seconds))
        used = meter.read()
    found = {pair: {way: slices[pair][way].figures(seconds * rounds) for way in _WAYS} for pair in _PAIRS}
    bars: dict[str, Any] = {}
    for pair, ways in found.items():
        bars[f"{pair}_first_token_p99_of_normal"] = bar(_ratio(ways, "loud", "normal"), "<=", 1.2)
        bars[f"{pair}_others_failed"] = bar(sum(ways[way]["others_failed"] for way in _WAYS), "<=", 0)
    without = {pair: _ratio(ways, "loud", "without") for pair, ways in found.items()}
    return {
        "bars": bars,
        "capacity_per_second": round(capacity, 1),
        "neighbours": NEIGHBOURS,
        "normal_of_share": NORMAL,
        "times_share": times_share,
        "first_token_p99_of_without": without,
        **found,
        "processors": used,
    }


class Slices:
    """All slices of one way."""

    def __init__(self) -> None:
        self._others: list[Ended] = []
        self._loud: list[Ended] = []

    def add(self, others: list[Ended], loud: list[Ended]) -> None:
        """Take in what became of the calls of a slice."""
        self._others += others
        self._loud += loud

    def figures(self, seconds: float) -> dict[str, Any]:
        """Return what both felt, for so many seconds of slices."""
        answered = good(self._others)
        return {
            "others": times(answered),
            "others_per_second": round(len(answered) / seconds, 1),
            "others_failed": len(self._others) - len(answered),
            "others_failures": failures(self._others),
            "loud_asked_per_second": round(len(self._loud) / seconds, 1),
            "loud_answered_per_second": round(len(good(self._loud)) / seconds, 1),
            "loud": times(good(self._loud)),
            "loud_failures": failures(self._loud),
        }


def _capacity(loud: Crowd, seconds: float) -> float:
    loud.run(Job(streams=64, seconds=1.0))
    begin = loud.begin(Job(streams=64, seconds=seconds + _SETTLED))
    calls = [call for call in good(loud.end().ended) if begin + _SETTLED <= call.ended < begin + _SETTLED + seconds]
    if not calls:
        raise RuntimeError("the engine answered nothing")
    return len(calls) / seconds


def _slice(
    others: Crowd, loud: Crowd, askers: tuple[Job, Job], rates: tuple[float, float], seconds: float
) -> tuple[list[Ended], list[Ended]]:
    """Return the calls of one slice that were sent after it had settled, the others' and the one's."""
    one, other = (
        msgspec.structs.replace(asker, rate=rate, seconds=seconds + _SETTLED, deadline=_DEADLINE)
        for asker, rate in zip(askers, rates, strict=True)
    )
    begin = others.begin(one)
    if other.rate:
        loud.begin(msgspec.structs.replace(other, begin=begin))
    beside = loud.end().ended if other.rate else []
    asked = others.end().ended
    since = begin + _SETTLED
    return [call for call in asked if call.sent >= since], [call for call in beside if call.sent >= since]


def _ratio(ways: dict[str, Any], one: str, other: str) -> float | None:
    """Return how much later the first token of the slowest hundredth of the others was in one way than in the other."""
    late, soon = (ways[way]["others"]["first_token_ms"].get("p99") for way in (one, other))
    return round(late / soon, 3) if late and soon else None
