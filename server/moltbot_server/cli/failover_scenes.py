"""What `moltbot failover test` plays: a fault of the first model, one turn, and what the user should have seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moltbot_server.cli.failover_plan import Candidate
from moltbot_server.cli.failover_rig import Heard, Rig, Scene
from moltbot_server.config_models import ModelRoute
from moltbot_server.models.engines.scripted import Failure as Break
from moltbot_server.models.engines.scripted import Rule

Verdict = Literal["pass", "FAIL", "skipped"]

QUICK = 1.0
"""Seconds within which the first word comes when a model refuses or breaks at once."""

_SLACK = 0.5
_PIECES = {"pace": "20ms", "chunks": 12}
_LONG = "A word among many, said again and again. " * 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of the report: what went wrong, what the user saw, and whether that is as it should be."""

    scenario: str
    fault: str
    seen: str = ""
    asked: tuple[str, ...] = ()
    first_token: float | None = None
    verdict: Verdict = "pass"
    why: str = ""


class Wrong(Exception):
    """A turn did not go as it should have; the text says how."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A fault of the first model, as its mock plays it or, where it is a local one, as these rules do.

    `meets`: `before` the first word another model answers as if nothing had been; `after` it the route says what
    becomes of the answer; a fault that is `harmless` changes nothing of it. `within` are seconds to the first word.
    """

    scenario: str
    fault: str
    script: Mapping[str, Any]
    local: tuple[Rule, ...] = ()
    meets: Literal["before", "after", "harmless"] = "before"
    within: Callable[[ModelRoute], float] = field(default=lambda route: QUICK)


def _fails(kind: str, **options: Any) -> dict[str, Any]:
    return {"faults": [{"kind": kind, **options}]}


def _late(route: ModelRoute) -> float:
    return route.latency + _SLACK


CASES = (
    *(
        Case(scenario="S19", fault=f"{status} before the first word", script=_fails("error", status=status),
             local=(Rule(fail=Break()),) if status == 500 else ())
        for status in (500, 502, 503, 529)
    ),
    Case(scenario="S19", fault="the line is cut before the first word", script=_fails("cut")),
    Case(scenario="S19", fault="a good end without a word", script=_fails("empty"), local=(Rule(deltas=()),)),
    Case(scenario="S21", fault="it hangs before the first word", script=_fails("hang"),
         local=(Rule(first_delay=3600.0),), within=_late),
    Case(scenario="S22", fault="it dies in mid-answer", script={**_fails("cut", after=4), **_PIECES},
         local=(Rule(pace=0.02, fail=Break(after=4)),), meets="after"),
    Case(scenario="S22", fault="it falls silent in mid-answer", script=_fails("hang_after_first"),
         local=(Rule(deltas=("Well", ", now"), pace=3600.0),), meets="after"),
    Case(scenario="S23", fault="a line that is no JSON", script=_fails("broken_sse", how="not_json"), meets="after"),
    Case(scenario="S23", fault="half an event and the end", script=_fails("broken_sse", how="truncated"),
         meets="after"),
    Case(scenario="S23", fault="no last line", script=_fails("broken_sse", how="no_done"), meets="after"),
    Case(scenario="S23", fault="characters cut in the middle", script=_fails("split_utf8"), meets="harmless"),
    Case(scenario="S23", fault="a web page instead", script=_fails("wrong_content_type")),
    Case(scenario="S23", fault="10 MiB in one piece", script=_fails("huge")),
    Case(scenario="S23", fault="an answer without end", script={**_fails("endless"), "text": _LONG, "chunks": 4},
         meets="after"),
    Case(scenario="S23", fault="a call of a tool that there is not",
         script={"text": "", "tool_calls": [{"name": "no-such-tool", "arguments": {}}]}),
)  # fmt: skip
"""The faults that one turn shows."""


async def play(rig: Rig, case: Case) -> Row:
    """Play a case in a scene of its own."""
    if rig.drill.candidates[0].provider is None and not case.local:
        why = "the first model is a local one"
        return Row(scenario=case.scenario, fault=case.fault, verdict="skipped", why=why)
    async with rig.scene(case.script, case.local) as scene:
        heard = await scene.ask()
        return await judged(scene, case.scenario, case.fault, heard, lambda: _check(scene, case, heard))


async def judged(scene: Scene, scenario: str, fault: str, heard: Heard, check: Callable[[], None]) -> Row:
    """Return the line for a turn that was heard: passed unless `check` or a rule that always holds finds it wrong."""
    verdict: Verdict = "pass"
    why = ""
    try:
        await _once_each(scene, heard)
        check()
    except Wrong as problem:
        verdict, why = "FAIL", str(problem)
    names = {model: candidate.name for model, candidate in scene.ids.items()}
    return Row(
        scenario=scenario,
        fault=fault,
        seen=seen(heard, scene.ids),
        asked=tuple(names.get(model, model) for model in heard.attempts),
        first_token=heard.first_token,
        verdict=verdict,
        why=why,
    )


def seen(heard: Heard, ids: Mapping[str, Candidate]) -> str:
    """Return in a few words what a user saw of a turn; `ids` has the models by their ids."""
    if heard.error is not None:
        wait = f", come back in {heard.error.retry_after:.1f} s" if heard.error.retry_after else ""
        said = heard.error.reason or heard.error.code.name
        return f"{'a part of the answer, then ' if heard.shown.strip() else ''}{said}{wait}"
    who = ids.get(heard.model)
    if who is None or not heard.shown.strip():
        return "an empty answer"
    if heard.broke_off:
        return f"the beginning of an answer by {who.name}"
    if heard.resets:
        return f"an answer begun anew by {who.name}"
    if heard.shown != who.text and heard.shown.endswith(who.text):
        return f"an answer carried on by {who.name}"
    return f"an answer by {who.name}"


async def _once_each(scene: Scene, heard: Heard) -> None:
    """Hold what holds of every turn: no key is told, and no model is asked twice."""
    if scene.secret(heard.raw):
        raise Wrong("a key was told")
    for name, mock in scene.mocks.items():
        if (count := len(await mock.calls())) > 1:
            raise Wrong(f"{name} was asked {count} times")


def _check(scene: Scene, case: Case, heard: Heard) -> None:
    if case.meets == "after":
        _broken(scene, heard)
    elif case.meets == "harmless":
        whole(scene, heard, within=case.within(scene.drill.route))
    else:
        stood_in(scene, heard, within=case.within(scene.drill.route))


def whole(scene: Scene, heard: Heard, *, within: float) -> None:
    """Hold that a turn was answered by one model, in its own words, in time."""
    if heard.error is not None:
        raise Wrong(f"the user saw an error: {heard.error.message}")
    candidate = scene.ids.get(heard.model)
    if candidate is None or heard.told != heard.shown or heard.shown != candidate.text:
        raise Wrong("what was shown is not what one model said")
    if heard.first_token is None or heard.first_token > within:
        raise Wrong(f"the first word took longer than {within:g} s")


def stood_in(scene: Scene, heard: Heard, *, within: float) -> None:
    """Hold that another model than the first one answered, silently but for a notice."""
    whole(scene, heard, within=within)
    if scene.ids[heard.model] is scene.first:
        raise Wrong("the model that failed is said to have answered")
    if heard.resets:
        raise Wrong("something was shown and taken back")
    if not heard.switches:
        raise Wrong("no event told of the switch")


def _broken(scene: Scene, heard: Heard) -> None:
    """Hold that an answer which broke after its first word became what the route says."""
    policy = scene.drill.route.on_failure
    if heard.error is not None:
        raise Wrong(f"the user saw an error: {heard.error.message}")
    candidate = scene.ids.get(heard.model)
    if heard.broke_off:
        if policy != "stop" or candidate is not scene.first or heard.told != heard.shown or not heard.shown.strip():
            raise Wrong("an answer that broke did not end with its beginning")
        return
    if candidate is None or candidate is scene.first:
        raise Wrong("the model that broke is said to have answered")
    if heard.told != heard.shown or not heard.shown.endswith(candidate.text):
        raise Wrong("what was shown is not what was said")
    if policy != "continue" and heard.shown != candidate.text:
        raise Wrong("the answer has words of two models")
    if not heard.switches:
        raise Wrong("no event told of the switch")
