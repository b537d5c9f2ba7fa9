"""The part of `moltbot bench router` that breaks things: what users see of it, what it costs, how soon it is over."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from moltbot_server.bench.installation import spread
from moltbot_server.bench.router_load import Asked
from moltbot_server.bench.router_rig import LATENCY, Mock, Rig, firsts, good, problems

Report = dict[str, Any]
Tell = Callable[[str], None]

_SPOILT = (
    "error status=503 share=3%",
    "hang share=5%",
    "cut after=0 share=6%",
    "broken_sse how=not_json share=3%",
    "broken_sse how=truncated share=3%",
)
MIXED = (*_SPOILT, "error status=500 share=7%", "rate_limit retry_after=1s share=3%")
"""30 % of the calls meet one of these."""

KEPT_ON = (*_SPOILT, "error status=500 share=9.9%", "rate_limit retry_after=1s share=0.1%")
"""The same with fewer limits: each takes a key away for a second, and with more of them hardly a call would be made."""

_PACE = "5ms"
_STREAMS = 32
_AT_ONCE = 1000
_RELOAD_EVERY = 0.05


def mixed(rig: Rig, turns: int, tell: Tell) -> Report:
    """Return what became of turns whose first model has mixed faults in 30 % of its calls, and then fails always.

    With the usual thresholds it is put to rest and only tried now and then; a route that puts it to rest for moments
    alone shows what users see when all those faults come their way.
    """
    tell(f"{turns} turns, the first model at 30 % mixed faults")
    rig.first.follow(faults=list(MIXED), seed=1)
    found = {"mixed_faults": _counted(rig, "mixed", turns)}
    tell(f"{turns} turns, the same and hardly ever put to rest")
    rig.first.follow(faults=list(KEPT_ON), seed=1)
    found["mixed_faults_kept_on"] = _counted(rig, "kept-on", turns)
    few = max(1000, turns // 10)
    tell(f"{few} turns, the first model fails always")
    rig.first.follow(faults=["error status=500"])
    found["dead_primary"] = _counted(rig, "always-fails", few)
    rig.first.follow()
    return found


def _counted(rig: Rig, route: str, turns: int) -> Report:
    """Return what turns of a route saw, and how often its models were asked for them."""
    for mock in (rig.first, rig.second):
        mock.forget()
    meter, began = rig.processors(), time.perf_counter()
    asked = rig.loads.run(rig.job("grpc", models=(route,), streams=_STREAMS, turns=turns))
    seconds, used = time.perf_counter() - began, meter.read()
    calls = {"first": rig.first.calls(), "second": rig.second.calls()}
    return {
        "turns": len(asked),
        "visible_failures": len(asked) - len(good(asked)),
        "problems": problems(asked),
        "attempts_per_turn": round(sum(calls.values()) / max(1, len(asked)), 4),
        "calls": calls,
        "answered_by_first": sum(each.model == "first-model" for each in asked),
        "begun_anew": sum(each.resets > 0 for each in asked),
        "first_token_ms": spread(firsts(good(asked))),
        "turns_per_s": round(len(asked) / seconds, 1),
        "processors": used,
    }


def switches(rig: Rig, seconds: float, tell: Tell) -> Report:
    """Return the first token of turns that had to go on to the second model, when the first one errs and when it hangs.

    It does so in 15 % of its calls and is never put to rest for it, so that many turns meet it.
    """
    found = {}
    for route, fault in (("errs", "error status=500 share=15%"), ("hangs", "hang share=15%")):
        tell(f"{seconds:g} s of turns, the first model {route} in 15 % of its calls")
        rig.first.follow(faults=[fault], seed=2)
        asked = rig.loads.run(rig.job("grpc", models=(route,), streams=_STREAMS // 2, seconds=seconds))
        switched = [each for each in good(asked) if each.attempts > 1]
        found[route] = {
            "turns": len(asked),
            "switched": len(switched),
            "visible_failures": len(asked) - len(good(asked)),
            "problems": problems(asked),
            "first_token_ms": spread(firsts(switched)),
            "others_first_token_ms": spread(firsts([each for each in good(asked) if each.attempts <= 1])),
        }
    rig.first.follow()
    return found | {"threshold_ms": LATENCY * 1000}


def healing(rig: Rig, outages: Sequence[float], tell: Tell, *, after: float = 12.0) -> Report:
    """Return how long after the end of an outage the first model answers again, and what users saw of its trials.

    It is waited for for `after` seconds.
    """
    rows: list[Report] = []
    for outage in outages:
        tell(f"the first model is down for {outage:g} s")
        _well(rig)
        rig.loads.begin(rig.job("grpc", models=("healing",), streams=8))
        time.sleep(1.0)
        _paced(rig.first, faults=["error status=503"])
        time.sleep(outage)
        trials = rig.first.calls()
        _paced(rig.first)
        healed = time.perf_counter()
        time.sleep(after)
        asked = rig.loads.end()
        back = [each.ended for each in asked if each.model == "first-model" and each.sent >= healed]
        rows.append(
            {
                "outage_s": outage,
                "back_after_s": round(min(back) - healed, 2) if back else None,
                "calls_while_down": trials,
                "turns": len(asked),
                "visible_failures": len(asked) - len(good(asked)),
                "problems": problems(asked),
            }
        )
    rig.first.follow()
    rig.second.follow()
    waits = [row["back_after_s"] for row in rows]
    return {"outages": rows, "return_s": None if None in waits else max(waits)}


def _well(rig: Rig) -> None:
    for mock in (rig.first, rig.second):
        _paced(mock)


def _paced(mock: Mock, **script: Any) -> None:
    """Let a mock write as a model does, so that turns come and the machine has time for them; its count begins anew.

    It begins before: what fails first may be all that there is of it, as a model is put to rest for it.
    """
    mock.forget()
    mock.follow(pace=_PACE, **script)


def reloads(rig: Rig, count: int, tell: Tell) -> Report:
    """Return what turns on two routes see while the configuration changes; with every tenth reload a key does too."""
    tell(f"{count} reloads under load, two routes, keys changed")
    rig.loads.begin(rig.job("grpc", models=("", "cold"), streams=16))
    took = []
    for number in range(count):
        rig.configure(swapped=number % 2 == 0)
        if number % 10 == 9:
            rig.change_key()
        began = time.perf_counter()
        rig.reload()
        took.append(time.perf_counter() - began)
        time.sleep(_RELOAD_EVERY)
    asked = rig.loads.end()
    return {
        "reloads": count,
        "keys_changed": count // 10,
        "turns": len(asked),
        "by_model": {name: sum(each.model == name for each in asked) for name in ("first-model", "second-model")},
        "failed_turns": len(asked) - len(good(asked)),
        "problems": problems(asked),
        "reload_ms": spread(took),
    }


def single_flight(answers: str, tell: Tell) -> Report:
    """Return how often a model is asked when a thousand ask the same at once, in a MoltBot that keeps answers."""
    tell(f"{_AT_ONCE} identical questions at once")
    with contextlib.ExitStack() as stack:
        rig = Rig(stack, answers=answers, loaders=4)
        rig.first.follow(first_token="1s")
        rig.first.forget()
        job = rig.job("grpc", models=("patient",), streams=_AT_ONCE, turns=_AT_ONCE, sessions=False, same=True)
        asked = rig.loads.run(job)
        return _flight(rig, asked)


def _flight(rig: Rig, asked: Sequence[Asked]) -> Report:
    return {
        "questions": len(asked),
        "upstream_calls": rig.first.calls() + rig.second.calls(),
        "visible_failures": len(asked) - len(good(asked)),
        "problems": problems(asked),
        "said_to_be_cached": sum(each.cached for each in asked),
        "sent_within_s": round(max(each.sent for each in asked) - min(each.sent for each in asked), 3),
        "first_token_ms": spread(firsts(good(asked))),
    }
