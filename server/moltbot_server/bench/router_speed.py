"""The part of `moltbot bench router` that compares: through MoltBot, at the mock directly, through LiteLLM.

Slices of each alternate within the run, every other round in the opposite order; each round gives a ratio, and the
report has the median, the lowest and the highest.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from moltbot_server.bench.installation import spread
from moltbot_server.bench.router_load import Job
from moltbot_server.bench.router_rig import FLAT_OUT, LiteLlm, Rig, firsts, good, problems

Report = dict[str, Any]
Tell = Callable[[str], None]

_MODEL_PACE = "20ms"
_LENGTH_OF_A_TURN = 32 * 0.02
_PACED_STREAMS = 16


class Comparison:
    """Slices of load at several doors to the same mocks."""

    def __init__(self, rig: Rig, lite: LiteLlm | None, *, seconds: float, rounds: int, tell: Tell) -> None:
        self._rig, self._lite = rig, lite
        self._seconds, self._rounds = seconds, rounds
        self._tell = tell

    def flat_out(self, streams: int) -> Report:
        """Return what streams get through that ask again at once, of mocks that wait for nothing."""
        return self._compared(f"{streams} streams, flat out", self._doors(streams, "first", ""))

    def paced(self, *, together: bool) -> Report:
        """Return the same for 16 streams of a mock that writes at the pace of a model.

        The streams ask one after the other, spread over the length of a turn, or all at the same moment, `together`.
        Turns last as long as each other, so they stay as they began.
        """
        count = _PACED_STREAMS
        delays = () if together else tuple(_LENGTH_OF_A_TURN * stream / count for stream in range(count))
        doors = {
            door: msgspec.structs.replace(job, delays=delays) for door, job in self._doors(count, "first", "").items()
        }
        self._rig.first.follow(pace=_MODEL_PACE)
        found = self._compared(f"{count} streams, {_MODEL_PACE} a chunk, {'at once' if together else 'spread'}", doors)
        self._rig.first.follow(pace=FLAT_OUT)
        return found

    def dead_first(self, streams: int = 16) -> Report:
        """Return what streams get through whose first model always answers 500."""
        doors = self._doors(streams, "dead", "dead-first")
        del doors["direct"]
        return self._compared(f"{streams} streams, a dead first model", doors)

    def _doors(self, streams: int, name: str, route: str) -> dict[str, Job]:
        rig, seconds = self._rig, self._seconds
        doors = {
            "direct": rig.direct(streams=streams, seconds=seconds, texts=rig.texts),
            "moltbot": rig.job("http", models=(route or "default",), streams=streams, seconds=seconds),
        }
        if self._lite is not None:
            doors["litellm"] = self._lite.job(name, streams=streams, seconds=seconds, texts=rig.texts)
        return doors

    def _compared(self, what: str, doors: Mapping[str, Job]) -> Report:
        self._tell(f"{what}: {self._rounds} rounds of {self._seconds:g} s at {', '.join(doors)}")
        for door, job in doors.items():
            warm = self._slice(door, job)  # connections, code paths and caches are warm from here on
            if not warm["turns_per_s"]:
                raise RuntimeError(f"{door} answered nobody: {warm['problems']}")
        rounds = []
        for number in range(self._rounds):
            order: Sequence[str] = list(doors) if number % 2 == 0 else list(doors)[::-1]
            rounds.append({door: self._slice(door, doors[door]) for door in order})
        return {"doors": {door: _median([each[door] for each in rounds]) for door in doors}} | _ratios(rounds)

    def _slice(self, door: str, job: Job) -> Report:
        others = (("litellm", self._lite.pid),) if self._lite is not None else ()
        meter = self._rig.processors(*others)
        begin = self._rig.loads.begin(job)
        asked = self._rig.loads.end()
        used = meter.read()
        ends = begin + job.seconds
        # What began in the slice and ended after it belongs to it with its share.
        counted = sum(1.0 if each.ended <= ends else _share(each.sent, each.ended, ends) for each in good(asked))
        return {
            "turns_per_s": round(counted / job.seconds, 1),
            "first_token_ms": spread(firsts(good(asked))),
            "full_ms": spread([each.ended - each.sent for each in good(asked)]),
            "visible_failures": len(asked) - len(good(asked)),
            "problems": problems(asked),
            "processors": used,
            "over_s": round(time.perf_counter() - ends, 2),
        }


def _share(sent: float, ended: float, ends: float) -> float:
    return max(0.0, ends - sent) / max(ended - sent, 1e-9)


def _median(slices: Sequence[Report]) -> Report:
    """Return the median of each figure over rounds, the sum of the failures, and all rounds' turns a second."""

    def of(*path: str) -> float | None:
        found = []
        for each in slices:
            value: Any = each
            for name in path:
                value = value.get(name) if value is not None else None
            if value is not None:
                found.append(value)
        return round(statistics.median(found), 2) if found else None

    return {
        "turns_per_s": of("turns_per_s"),
        "first_token_ms": {name: of("first_token_ms", name) for name in ("p50", "p99")},
        "full_ms": {name: of("full_ms", name) for name in ("p50", "p99")},
        "visible_failures": sum(each["visible_failures"] for each in slices),
        "problems": next((each["problems"] for each in slices if each["problems"]), {}),
        "processors": {name: of("processors", name) for name in slices[0]["processors"]},
        "rounds": [each["turns_per_s"] for each in slices],
    }


def _ratios(rounds: Sequence[Mapping[str, Report]]) -> Report:
    """Return MoltBot against the others, round by round: turns a second as ratios, first tokens as differences."""
    found: Report = {}
    for other in ("direct", "litellm"):
        if other not in rounds[0]:
            continue
        pairs = [(each["moltbot"], each[other]) for each in rounds if each[other]["turns_per_s"]]
        ratios = [ours["turns_per_s"] / theirs["turns_per_s"] for ours, theirs in pairs]
        found[f"{other}_ratio"] = _spread(ratios)
        if other == "direct":
            added = [ours["first_token_ms"]["p50"] - theirs["first_token_ms"]["p50"] for ours, theirs in pairs
                     if ours["first_token_ms"] and theirs["first_token_ms"]]  # fmt: skip
            found["added_ttft_ms_p50"] = _spread(added)
    return found


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {
        "median": round(statistics.median(values), 3),
        "lowest": round(min(values), 3),
        "highest": round(max(values), 3),
    }
