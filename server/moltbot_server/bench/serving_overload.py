"""The scenario of ten times too much: what is still answered, how soon the rest is refused, and how politely."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import msgspec

from moltbot_server.bench.installation import Meter, spread, started, step_aside
from moltbot_server.bench.local_prompts import Workload
from moltbot_server.bench.random_model import random_model
from moltbot_server.bench.serving_calls import Ended
from moltbot_server.bench.serving_crowd import Crowd, bar, failures, good, lateness, times
from moltbot_server.bench.serving_load import Job

_STREAMS = (16, 32, 64, 128, 256)
MODELS = {"builtin": Workload(), "random": Workload(shortest=32, longest=32, new=64)}
_FLOOD, _PROBE = 3, 100.0
"""Load processes that flood, and how many turns a second one more sends, which has time to read its clock."""
_SETTLED = 2.0
_DEADLINE = 10.0
_REFUSED = "RESOURCE_EXHAUSTED"


def bench_overload(
    *,
    times_peak: float,
    seconds: float,
    step: float,
    model: str,
    cpus: set[int] | None,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Return what becomes of `times_peak` as many turns as can be answered, each in a session of its own.

    `model` is one of `MODELS`: `random` is of the size of real ones, and its answers take long.
    """
    work = MODELS[model]
    path = str(random_model(progress=progress)) if work.longest else ""
    with started(cpus=cpus, MODEL_PATH=path) as installation, contextlib.ExitStack() as stack:
        step_aside(cpus)
        crowd = Crowd(stack, installation, processes=_FLOOD)
        probe = Crowd(stack, installation, processes=1)
        peak, ladder = _peak(crowd, work, step, progress)
        rate = times_peak * peak["turns_per_second"]
        progress(f"{rate:.0f} turns/s for {seconds:g} s")
        meter = Meter(installation, crowd.cpu_seconds, probe.cpu_seconds)
        flood, sample, begin = _flood(crowd, probe, work, rate, seconds + _SETTLED)
        used = meter.read()
        memory, answers_again = installation.memory(), _answers(probe, work)
    window = begin + _SETTLED, begin + _SETTLED + seconds
    calls = [*flood, *sample]
    done = [call for call in good(calls) if window[0] <= call.ended < window[1]]
    goodput = len(done) / seconds / peak["turns_per_second"]
    # The burst in which an overload begins fills the queue; what it is like is measured after that.
    sent = [call for call in calls if window[0] <= call.sent < window[1]]
    refused = [call for call in sent if call.status == _REFUSED]
    unanswered = [call for call in calls if call.status not in ("OK", _REFUSED)]
    first = times(good(sent))["first_token_ms"].get("p99")
    ratio = round(first / peak["first_token_ms"]["p99"], 3) if first else None
    told = _refusals(refused, [call for call in sample if call.status == _REFUSED and window[0] <= call.sent])
    bars = {
        "goodput_of_peak": bar(round(goodput, 3), ">=", 0.95),
        "refusal_p99_ms": bar(told["refusal_ms_of_the_probe"].get("p99"), "<=", 10),
        "refusals_advised": bar(told["advised_share"], ">=", 1),
        "neither_answered_nor_refused": bar(len(unanswered), "<=", 0),
        "first_token_p99_of_peak": bar(ratio, "<=", 2),
        "answers_afterwards": bar(answers_again, ">=", 1),
    }
    return {
        "bars": bars,
        "peak": peak,
        "ladder": ladder,
        "wanted_per_second": round(rate, 1),
        "offered_per_second": round(len(sent) / seconds, 1),
        "offered_of_peak": round(len(sent) / seconds / peak["turns_per_second"], 2),
        "sent_late_ms": lateness(calls),
        "answered_per_second": round(len(done) / seconds, 1),
        "admitted": times(good(sent)),
        "not_answered": failures(calls),
        **told,
        "processors": used,
        "memory_mb": memory,
    }


def _peak(
    crowd: Crowd, work: Workload, step: float, progress: Callable[[str], None]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the best completions a second of growing numbers of streams, and all that were tried."""
    crowd.run(Job(streams=_STREAMS[0], seconds=1.0, turns=1, work=work))
    ladder: list[dict[str, Any]] = []
    for streams in _STREAMS:
        progress(f"the peak: {streams} streams")
        settled = min(_SETTLED, step)
        begin = crowd.begin(Job(streams=streams, seconds=settled + step, turns=1, work=work)) + settled
        ended = crowd.end().ended
        answered = [call for call in good(ended) if begin <= call.ended < begin + step]
        speed = round(len(answered) / step, 1)
        ladder.append({"streams": streams, "turns_per_second": speed, "failures": failures(ended), **times(answered)})
        if speed < 0.8 * max(tried["turns_per_second"] for tried in ladder):
            break
    best = max(ladder, key=lambda tried: float(tried["turns_per_second"]))
    if not best["turns_per_second"]:
        raise RuntimeError(f"no turn was answered: {ladder}")
    return best, ladder


def _flood(
    crowd: Crowd, probe: Crowd, work: Workload, rate: float, seconds: float
) -> tuple[list[Ended], list[Ended], float]:
    share = min(_PROBE, rate / 10)
    job = Job(rate=rate - share, seconds=seconds, turns=1, deadline=_DEADLINE, work=work)
    begin = crowd.begin(job)
    probe.begin(msgspec.structs.replace(job, rate=share, begin=begin))
    return crowd.end().ended, probe.end().ended, begin


def _refusals(refused: list[Ended], probe: list[Ended]) -> dict[str, Any]:
    """Return how many were refused, how soon, and whether each was told when to come back.

    The processes that flood share the machine with what they measure: they read their clocks late, the probe does not.
    """
    advised = sum(call.advised for call in refused)
    return {
        "refused": len(refused),
        "refusal_ms": spread([call.ended - call.sent for call in refused]),
        "refusal_ms_of_the_probe": spread([call.ended - call.sent for call in probe]),
        "advised_share": round(advised / len(refused), 4) if refused else None,
        "refused_after_accepted": sum(call.accepted for call in refused),
    }


def _answers(probe: Crowd, work: Workload) -> float:
    """Return the share of a few turns that are answered when all is over."""
    ended = probe.run(Job(streams=4, seconds=1.0, turns=1, work=work)).ended
    return len(good(ended)) / max(1, len(ended))
