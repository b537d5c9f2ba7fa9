"""The scenes of `moltbot failover test` that take several turns: limits that are obeyed, keys, and a total outage."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from statistics import median

from moltbot_server.cli.failover_rig import Heard, Rig, Scene
from moltbot_server.cli.failover_scenes import QUICK, Row, Wrong, judged, stood_in, whole
from moltbot_server.models.engines.scripted import Failure as Break
from moltbot_server.models.engines.scripted import Rule

_RETRY_AFTER = 2
_BACK_WITHIN = 3.0
_EVERY = 0.1
_FURTHER_TURNS = 5
_OUTAGE = 6.5
_SHORTEST_PAUSE = 5.0  # seconds: a dead model is not tried more often, unless its route's cooldown is shorter
_SHARE_OF_COOLDOWN = 0.75
_REFUSED_WITHIN = 0.05
_AT_DEATH = 12  # so many turns at most until each model has failed often enough
_DOWN = "Is anybody there while all is down?"

Wait = Callable[[Rig], Awaitable[Row]]


def _remote_first(rig: Rig) -> bool:
    return rig.drill.candidates[0].provider is not None


async def limit(rig: Rig) -> Row:
    """Play a 429 with Retry-After: another model answers at once, and the key is left alone for exactly that time."""
    scenario, fault = "S20", f"429 with Retry-After: {_RETRY_AFTER}"
    if not _remote_first(rig):
        return Row(scenario=scenario, fault=fault, verdict="skipped", why="the first model is a local one")
    script = {"faults": [{"kind": "rate_limit", "retry_after": f"{_RETRY_AFTER}s", "until": "1 call"}]}
    async with rig.scene(script) as scene:
        heard = await scene.ask()
        row = await judged(scene, scenario, fault, heard, lambda: stood_in(scene, heard, within=QUICK))
        return await _and_then(row, _left_alone(scene))


async def _left_alone(scene: Scene) -> None:
    mock = scene.mocks[scene.first.name]
    limited = float((await mock.calls())[0]["time"])
    while time.time() < limited + _RETRY_AFTER + _BACK_WITHIN:
        heard = await scene.ask()
        whole(scene, heard, within=QUICK)
        calls = await mock.calls()
        if len(calls) > 1:
            after = float(calls[1]["time"]) - limited
            if after < _RETRY_AFTER - 0.005:  # times are told in milliseconds
                raise Wrong(f"it was asked again after {after:.2f} s")
            return
        await asyncio.sleep(_EVERY)
    raise Wrong(f"it was not asked again within {_BACK_WITHIN:g} s after its time")


def refused_key(status: int) -> Wait:
    """Return what plays a key that the provider refuses: another model answers, and the key is not tried again."""

    async def play(rig: Rig) -> Row:
        scenario, fault = "S24", f"{status}: the key is refused"
        if not _remote_first(rig):
            return Row(scenario=scenario, fault=fault, verdict="skipped", why="the first model is a local one")
        async with rig.scene({"faults": [{"kind": "unauthorized", "status": status}]}) as scene:
            heard = await scene.ask()
            row = await judged(scene, scenario, fault, heard, lambda: stood_in(scene, heard, within=QUICK))
            return await _and_then(row, _not_again(scene))

    return play


async def _not_again(scene: Scene) -> None:
    for _ in range(_FURTHER_TURNS):
        heard = await scene.ask()
        whole(scene, heard, within=QUICK)
        if scene.secret(heard.raw):
            raise Wrong("a key was told")
    if (count := len(await scene.mocks[scene.first.name].calls())) > 1:
        raise Wrong(f"the refused key was tried {count} times in {_FURTHER_TURNS + 1} turns")


async def outage(rig: Rig) -> Row:
    """Play a time in which every model is down: quick refusals with the time to wait, few trials, and a return."""
    down = {"faults": [{"kind": "error", "status": 503}]}
    rules = (Rule(match="while all is down", fail=Break()),)
    async with rig.scene(down, rules, all_local=True) as scene:
        for mock in scene.mocks.values():
            await mock.follow(**down)
        row = Row(scenario="S25", fault=f"all down for {_OUTAGE:g} s, then well")
        try:
            seen, refused = await _all_down(scene)
            back, heard = await _healed(scene)
        except Wrong as problem:
            return replace(row, verdict="FAIL", why=str(problem))
        names = {model: candidate.name for model, candidate in scene.ids.items()}
        return replace(
            row,
            seen=f"{seen} within {refused * 1000:.0f} ms; an answer {back:.1f} s after the end",
            asked=tuple(names.get(model, model) for model in heard.attempts),
            first_token=heard.first_token,
        )


async def _all_down(scene: Scene) -> tuple[str, float]:
    """Ask while all is down; return what the user saw and the seconds that a refusal took, by the median."""
    for _ in range(_AT_DEATH):
        _refused(await scene.ask(_DOWN))
    for mock in scene.mocks.values():
        await mock.forget()
    ends, took, last = time.monotonic() + _OUTAGE, [], None
    while time.monotonic() < ends:
        last = await scene.ask(_DOWN)
        took.append(last.total)
        _refused(last)
        await asyncio.sleep(_EVERY)
    pause = min(_SHORTEST_PAUSE, _SHARE_OF_COOLDOWN * scene.drill.route.cooldown)
    most = 1 + int(_OUTAGE / pause)
    for name, mock in scene.mocks.items():
        if (count := len(await mock.calls())) > most:
            raise Wrong(f"{name} was tried {count} times in {_OUTAGE:g} s")
    if median(took) > _REFUSED_WITHIN:
        raise Wrong(f"a refusal took {median(took) * 1000:.0f} ms")
    assert last is not None
    assert last.error is not None
    return last.error.reason, median(took)


def _refused(heard: Heard) -> None:
    if heard.error is None:
        raise Wrong("somebody answered while all were down")
    if not heard.error.retryable:
        raise Wrong(f"the error cannot be tried again: {heard.error.message}")


async def _healed(scene: Scene) -> tuple[float, Heard]:
    """Let all be well; return the seconds until a turn is answered, and that turn."""
    for mock in scene.mocks.values():
        await mock.follow()
    healed = time.monotonic()
    longest = scene.drill.route.cooldown + QUICK
    while time.monotonic() < healed + longest:
        heard = await scene.ask()
        if heard.error is None:
            after = time.monotonic() - healed
            whole(scene, heard, within=QUICK)
            for _ in range(_FURTHER_TURNS):
                whole(scene, await scene.ask(), within=QUICK)
            return after, heard
        await asyncio.sleep(_EVERY)
    raise Wrong(f"nobody answered within {longest:g} s after all were well again")


async def _and_then(row: Row, rest: Awaitable[None]) -> Row:
    """Return a line after the rest of its scene was played too."""
    try:
        await rest
    except Wrong as problem:
        return replace(row, verdict="FAIL", why="; ".join(filter(None, (row.why, str(problem)))))
    return row


WAITS: Sequence[Wait] = (limit, refused_key(401), refused_key(403), outage)
"""The scenes that take several turns."""
