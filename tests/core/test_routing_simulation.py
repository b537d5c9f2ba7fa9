"""A hundred thousand turns in virtual time: what a primary with faults costs, and that no user sees one."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from moltbot_server.errors import ModelCredential, ModelUnavailable, QueueFull
from moltbot_server.models.engine import Finished
from moltbot_server.models.routing import BreakerState
from moltbot_server.turns import FinishReason, GenerationOptions, Reset, Routed
from routing_rig import HANGS, Does, Ear, Rig, said

LATENCY = 0.3
QUESTION = (said("Hi"),)
OPTIONS = GenerationOptions()
WELL = Does(pieces=("Hello", " there"), first=0.05, pace=0.01)
UNAVAILABLE = ModelUnavailable("The provider answered 500.")
FAULTS = (
    Does(pieces=(), first=0.02, error=UNAVAILABLE),  # an error, or a cut before the first word
    Does(raises=UNAVAILABLE),  # nobody listens there
    HANGS,
    Does(pieces=(), first=0.02, error=QueueFull("Too many requests.", retry_after=1.0)),
    Does(pieces=("Hel",), first=0.05, error=ModelUnavailable("What the provider sent is no JSON.")),
    Does(pieces=(), first=0.02),  # a good end without a word
)


@dataclass
class Tally:
    """What became of many turns."""

    turns: int = 0
    failures: int = 0
    wrong: int = 0
    waits: list[float] = field(default_factory=list)

    def percentile(self, share: float) -> float:
        """Return the time to the first word that so many turns had to wait at most."""
        return sorted(self.waits)[int(share * (len(self.waits) - 1))]


class Turn(Ear):
    """A listener that is counted when it has heard the end, and keeps no more than it needs."""

    def __init__(self, tally: Tally, rig: Rig) -> None:
        super().__init__(clock=rig.clock)
        self._tally = tally
        self._began = rig.clock.time()

    def ended(self, end: object) -> None:
        tally = self._tally
        tally.turns += 1
        tally.failures += isinstance(end, Exception)
        tally.wrong += self.text != "Hello there"
        tally.waits.append((self.first_text_at or 1e9) - self._began)
        self.heard.clear()

    def noted(self, what: object) -> None:
        if isinstance(what, Reset):
            self.text = what.text


def simulate(rig: Rig, turns: int, rate: float, seed: int, *, settles: bool = True) -> Tally:
    """Begin turns at random moments, `rate` a second, and let the last of them end if it `settles`."""
    tally, draw = Tally(), random.Random(seed)
    for _ in range(turns):
        rig.route.begin(QUESTION, OPTIONS, Turn(tally, rig))
        rig.clock.pass_by(draw.expovariate(rate))
    if settles:
        rig.clock.pass_by(30)
    return tally


def faulty(rig: Rig, share: float, seed: int) -> None:
    """Let the first model fail in a share of its calls, in every way."""
    draw = random.Random(seed)
    rig.a.draws = lambda: draw.choice(FAULTS) if draw.random() < share else WELL
    for model in rig.models.values():
        model.keeps_calls = False


def attempts(rig: Rig, turns: int) -> float:
    return sum(model.asked for model in rig.models.values()) / turns


@pytest.mark.parametrize(
    ("turns", "rate", "spec"),
    [
        pytest.param(100_000, 300.0, {}, id="as configured by default"),
        pytest.param(20_000, 2.0, {}, id="few turns a second"),
        pytest.param(
            20_000, 300.0, {"error_rate": 1.0, "retry_budget": 1.0}, id="thresholds that never put it to rest"
        ),
        pytest.param(20_000, 300.0, {"on_failure": "continue"}, id="answers that are continued"),
    ],
)
def test_of_a_primary_with_thirty_percent_faults_no_user_sees_one(
    turns: int, rate: float, spec: dict[str, object]
) -> None:
    rig = Rig(WELL, WELL, latency=LATENCY, **spec)
    faulty(rig, 0.3, seed=1)
    tally = simulate(rig, turns, rate, seed=2)
    each, p99 = attempts(rig, turns), tally.percentile(0.99)
    figures = f"{tally.failures} failures, {each:.3f} attempts a turn, p99 {p99:.3f} s, {rig.route.numbers}"
    print(figures)
    assert (tally.turns, tally.failures) == (turns, 0), figures
    assert tally.wrong == 0 or spec.get("on_failure") == "continue", figures
    assert each <= 1.4, figures
    assert max(tally.waits) <= LATENCY + 0.5, figures
    assert rig.clock.waiting == 0


@pytest.mark.parametrize("fault", range(len(FAULTS)))
def test_a_primary_that_always_fails_costs_little(fault: int) -> None:
    turns = 10_000
    rig = Rig(WELL, WELL, latency=LATENCY)
    if isinstance(FAULTS[fault].error, QueueFull):
        # A provider's engine that was told to wait says so until the time is over.
        _rests_when_told(rig)
    rig.a.does = FAULTS[fault]
    rig.a.keeps_calls = rig.b.keeps_calls = False
    tally = simulate(rig, turns, rate=100.0, seed=3)
    each = attempts(rig, turns)
    figures = f"{tally.failures} failures, {each:.4f} attempts a turn, p99 {tally.percentile(0.99):.3f} s"
    print(figures)
    assert (tally.turns, tally.failures, tally.wrong) == (turns, 0, 0), figures
    assert each <= 1.1, figures
    assert max(tally.waits) <= LATENCY + 0.5, figures


def test_a_primary_that_fails_in_every_way_costs_little() -> None:
    turns = 20_000
    rig = Rig(WELL, WELL, latency=LATENCY)
    faulty(rig, 1.0, seed=4)
    tally = simulate(rig, turns, rate=100.0, seed=5)
    figures = f"{tally.failures} failures, {attempts(rig, turns):.4f} attempts a turn"
    print(figures)
    assert (tally.failures, tally.wrong) == (0, 0), figures
    assert attempts(rig, turns) <= 1.1, figures


@pytest.mark.parametrize("seed", range(12))
def test_a_healed_primary_is_back_within_ten_seconds_and_nobody_sees_a_failed_trial(seed: int) -> None:
    rig = Rig(WELL, WELL, latency=LATENCY)
    faulty(rig, 1.0, seed)
    tallies = [simulate(rig, 3000 + 200 * seed, 100.0, seed, settles=False)]
    rig.a.draws, rig.a.does = None, WELL
    healed, before = rig.clock.time(), rig.a.asked
    while rig.route.models[0].state is not BreakerState.CLOSED and rig.clock.time() < healed + 30:
        tallies.append(simulate(rig, 1, 100.0, seed=len(tallies), settles=False))
    back, trials = rig.clock.time() - healed, rig.a.asked - before
    tallies.append(simulate(rig, 500, 100.0, seed))
    seen = sum(tally.failures + tally.wrong for tally in tallies)
    figures = (
        f"back after {back:.2f} s, {seen} failures seen, {trials} trials, {rig.a.asked - before} of 500 after that"
    )
    print(figures)
    assert back <= 10.0, figures
    assert (seen, trials, rig.a.asked - before) == (0, 1, 501), figures


def test_all_models_with_faults_at_once_still_answer_nearly_everybody() -> None:
    turns = 10_000
    rig = Rig(WELL, WELL, WELL, latency=LATENCY)
    draw = random.Random(6)
    for model in rig.models.values():
        model.draws = lambda: draw.choice(FAULTS) if draw.random() < 0.1 else WELL
        model.keeps_calls = False
    tally = simulate(rig, turns, 100.0, seed=7)
    figures = f"{tally.failures} of {turns} failed, {attempts(rig, turns):.3f} attempts a turn"
    print(figures)
    assert tally.failures <= 0.005 * turns, figures
    assert attempts(rig, turns) <= 1.4, figures


def _rests_when_told(rig: Rig) -> None:
    until = [0.0]
    begin = rig.a.begin

    def begin_and_rest(*args: object) -> object:
        until[0] = rig.clock.time() + 1.0
        return begin(*args)  # type: ignore[arg-type]

    class Resting(type(rig.a)):  # type: ignore[misc]
        rest = property(lambda self: max(0.0, until[0] - rig.clock.time()), lambda self, value: None)

    rig.a.__class__ = Resting
    rig.a.begin = begin_and_rest  # type: ignore[method-assign, assignment]


def _anything(draw: random.Random) -> Does:
    """Return any behaviour at all."""
    errors = (None, UNAVAILABLE, QueueFull("Busy."), ModelCredential("No key."), ValueError("a fault of ours"))
    return Does(
        pieces=draw.choice([(), ("\n",), ("Hello", " there"), (" ", "Hello", " there"), ("Hello", " there")]),
        thoughts=draw.choice([(), (), ("hm",)]),
        first=draw.choice([0.0, 0.0, 0.01, 0.29, 0.31, 0.5, 5.0]),
        pace=draw.choice([0.001, 0.01, 0.2, 3.0]),
        error=draw.choice(errors),
        hangs=draw.random() < 0.15,
        raises=draw.choice(errors) if draw.random() < 0.15 else None,
        finish_reason=draw.choice([FinishReason.STOP, FinishReason.STOP, FinishReason.LENGTH]),
        queue_position=draw.choice([0, 0, 2]),
    )


@pytest.mark.parametrize("on_failure", ["restart", "continue", "stop"])
def test_whatever_models_do_a_turn_ends_once_and_leaves_nothing_behind(on_failure: str) -> None:
    draw = random.Random(on_failure)
    for case in range(4000):
        rig = Rig(
            *[_anything(draw) for _ in range(draw.randint(1, 4))], latency=LATENCY, timeout=2.0, on_failure=on_failure
        )
        ear = rig.begin()
        if draw.random() < 0.2:
            rig.clock.pass_by(draw.random())
            rig.generation.stop()
            heard = list(ear.heard)
            rig.clock.pass_by(60)
            assert ear.heard == heard, f"case {case}: a stopped turn hears no more"
        else:
            rig.clock.pass_by(60)
            assert ear.is_over, f"case {case}: {ear.heard}"
        assert _nothing_goes_on(rig), f"case {case}: a timer stays"
        assert [entry.turns for entry in rig.entries.values()] == [0] * len(rig.entries), (
            f"case {case}: a model is held"
        )
        assert all(model.asked <= 1 for model in rig.models.values()), f"case {case}: a model was asked twice"
        if ear.is_over and isinstance(ear.heard[-1], Finished):
            told = [what.name for what in ear.heard if isinstance(what, Routed)]
            assert told[-1] == ear.end.model, f"case {case}: {ear.heard}"
            if ear.end.finish_reason is FinishReason.UPSTREAM_ERROR:
                assert on_failure == "stop", f"case {case}: {ear.heard}"
                assert "Hello there".startswith(ear.text.strip()), f"case {case}: {ear.heard}"
            elif on_failure != "continue":
                assert ear.text.strip() in ("", "Hello there"), f"case {case}: {ear.heard}"


def _nothing_goes_on(rig: Rig) -> bool:
    """Tell whether nothing is to come any more but what models that were stopped had in mind."""
    rig.clock.pass_by(60)
    return rig.clock.waiting == 0
