"""Scenarios of a workday: turns that come at a steady rate, and many sessions that each speak now and then."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

from moltbot_server.bench.chat import bench_chat
from moltbot_server.bench.installation import Meter, started, step_aside
from moltbot_server.bench.serving_crowd import Crowd, bar, failures, good, lateness, missing_messages, times
from moltbot_server.bench.serving_load import Job

_A_DAY = 86_400
_PAUSE = 5.0
"""Seconds that a session is silent between two of its turns, on average."""


def bench_steady(
    *, rate: float, seconds: float, cpus: set[int] | None, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Return how turns are answered that come by chance, `rate` a second, in sessions of five turns."""
    job = Job(rate=rate, seconds=seconds, conversations=math.ceil(rate * _PAUSE))
    warm = Job(rate=rate, seconds=min(5.0, seconds / 4), conversations=job.conversations)
    with started(cpus=cpus) as installation, contextlib.ExitStack() as stack:
        step_aside(cpus)
        crowd = Crowd(stack, installation, processes=2)
        progress(f"{rate:g} turns/s for {seconds:g} s")
        crowd.run(warm)
        memory, meter = installation.memory(), Meter(installation, crowd.cpu_seconds)
        haul = crowd.run(job)
        used = meter.read()
        after, missing = installation.memory(), missing_messages(installation, haul.sessions)
    answered = good(haul.ended)
    figures = times(answered, since_due=True)
    failed = len(haul.ended) - len(answered)
    own_idle = round(1 - used["installation_share"], 4)
    bars = {
        "mean_full_response_ms": bar(figures["full_response_ms"].get("mean"), "<", 300),
        "failed": bar(failed, "<=", 0),
        "missing_messages": bar(missing, "<=", 0),
    }
    if rate * _A_DAY <= 110_000:
        bars["idle_but_for_moltbot"] = bar(own_idle, ">=", 0.95)
    return {
        "bars": bars,
        "rate": rate,
        "a_day": round(rate * _A_DAY),
        "turns": len(haul.ended),
        "failed": failed,
        "failures": failures(haul.ended),
        "turns_per_second": round(len(answered) / seconds, 3),
        **figures,
        "sent_late_ms": lateness(haul.ended),
        "processors": used | {"idle_but_for_moltbot": own_idle},
        "memory_mb": {"before": memory, "after": after},
        "sessions": len(haul.sessions),
        "missing_messages": missing,
    }


def bench_sessions(
    *, sessions: int, every: float, seconds: float, cpus: set[int] | None, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Return how many sessions are answered that each speak every few seconds; `moltbot bench chat` does the work."""
    found = bench_chat(sessions=sessions, every=every, seconds=seconds, chats=20, cpus=cpus, progress=progress)
    many = found["sessions"]
    bars = {
        "memory_mb": bar(found["memory_after_sessions_mb"]["all"], "<", 1000),
        "errors": bar(many["errors"], "<=", 0),
        "first_token_p99_ms": bar(many["first_token_ms"].get("p99"), "<=", 500),
    }
    del found["machine"], found["cpus"]
    return {"bars": bars, **found}
