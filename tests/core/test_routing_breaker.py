"""A model that fails rests, is tried again by single turns, and comes back; the route forgets nothing of it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from moltbot_server.config_models import ModelRoute
from moltbot_server.errors import ModelCredential, ModelUnavailable, QueueFull
from moltbot_server.models.engine import Asker
from moltbot_server.models.routing import Breakers, BreakerState, ModelOfRoute, RouteEngine
from moltbot_server.models.routing.breaker import Breaker, Limits
from moltbot_server.models.routing.budget import RetryBudget
from moltbot_server.turns import Notice
from routing_rig import ANSWERS, HANGS, Does, Rig, fails

BROKE = "The provider answered 500."


def asked(rig: Rig, turns: int, *, every: float = 0.2) -> int:
    """Return how many of so many turns asked the first model; none of them fails."""
    before = rig.a.asked
    ears = []
    for _ in range(turns):
        ears.append(rig.begin())
        rig.clock.pass_by(every)
    assert not [ear.heard[-1] for ear in ears if isinstance(ear.heard[-1], Exception)]
    return rig.a.asked - before


# --- when it rests ---------------------------------------------------------------------------------------------------


def test_five_failures_in_a_row_put_a_model_to_rest() -> None:
    rig = Rig(fails(), ANSWERS)
    for _ in range(5):
        assert rig.route.models[0].state is BreakerState.CLOSED
        rig.ask()
    assert rig.route.models[0] == ModelOfRoute(
        model="a",
        state=BreakerState.OPEN,
        reason=BROKE,
        error_rate=1.0,
        recent_attempts=5,
        rest=pytest.approx(5.4, abs=0.1),
        first_token=None,
        attempts=5,
    )
    ear = rig.ask()
    assert (rig.a.asked, ear.attempts) == (5, [("a", "SKIPPED"), ("b", "ANSWERED")])
    assert ear.end.attempts[0].reason == f"a rests: {BROKE}"
    assert not any(isinstance(what, Notice) for what in ear.heard)


def test_an_error_rate_above_the_threshold_puts_a_model_to_rest_from_so_many_attempts_on() -> None:
    rig = Rig(ANSWERS, ANSWERS, error_rate=0.15, min_attempts=20)
    rig.a.draws = iter([*([fails()] * 2 + [ANSWERS] * 3) * 3, *[ANSWERS] * 4, ANSWERS]).__next__
    asked(rig, 19)
    assert rig.route.models[0].state is BreakerState.CLOSED, "6 of 19 failed, but 19 are too few to judge"
    assert asked(rig, 1) == 1
    assert rig.route.models[0].state is BreakerState.CLOSED, "a good answer puts nobody to rest"
    rig.a.draws = None
    rig.a.does = fails()
    asked(rig, 1)
    assert rig.route.models[0].state is BreakerState.OPEN
    assert rig.route.models[0].error_rate == pytest.approx(7 / 21)


def test_below_the_threshold_a_model_goes_on() -> None:
    rig = Rig(ANSWERS, ANSWERS, error_rate=0.15)
    rig.a.draws = iter(([ANSWERS] * 9 + [fails()]) * 30).__next__
    assert asked(rig, 300) == 300


def test_old_failures_are_forgotten() -> None:
    rig = Rig(ANSWERS, ANSWERS, error_rate=0.15, window=60.0)
    rig.a.draws = iter([fails()] * 4 + [ANSWERS] + [fails()] * 4 + [ANSWERS] * 100).__next__
    asked(rig, 9)
    rig.clock.pass_by(70)
    assert asked(rig, 30) == 30
    assert (rig.route.models[0].error_rate, rig.route.models[0].recent_attempts) == (0.0, 30)


def test_a_model_that_is_alive_but_slow_rests_too() -> None:
    rig = Rig(replace(ANSWERS, first=1.0), ANSWERS, latency=0.3)
    assert asked(rig, 50, every=0.5) <= 5 + 6
    model = rig.route.models[0]
    assert (model.state, model.reason) == (BreakerState.OPEN, "a said nothing for 300 ms")


def test_answers_that_break_in_the_middle_put_a_model_to_rest() -> None:
    rig = Rig(fails(after=1), ANSWERS)
    assert asked(rig, 60) <= 12, "and one that only says a first word when it is tried comes back for no more"


# --- when it comes back ----------------------------------------------------------------------------------------------


def test_one_turn_at_a_time_tries_a_model_that_has_rested() -> None:
    rig = Rig(fails(), ANSWERS)
    asked(rig, 5)
    rig.clock.pass_by(6)
    rig.a.does = replace(ANSWERS, first=0.5)
    assert rig.route.models[0].state is BreakerState.HALF_OPEN
    first, second = rig.begin(), rig.begin()
    assert rig.a.asked == 6
    assert rig.route.models[0].state is BreakerState.HALF_OPEN
    rig.clock.pass_by(1)
    assert (first.end.model, second.end.model) == ("a", "b")
    assert rig.route.models[0].state is BreakerState.CLOSED
    assert rig.route.models[0].reason == ""
    assert rig.ask().end.model == "a"


def test_that_a_model_rests_and_that_it_is_back_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(fails(), ANSWERS)
    with caplog.at_level("INFO"):
        asked(rig, 200)
        rig.a.does = ANSWERS
        asked(rig, 100)
    assert [(each.message, each.model, each.route) for each in caplog.records] == [  # type: ignore[attr-defined]
        ("a model rests", "a", "default"),
        ("a model is back", "a", "default"),
    ]


def test_a_trial_that_fails_is_seen_by_nobody_and_pauses_grow_to_the_cooldown_at_most() -> None:
    rig = Rig(fails(), ANSWERS)
    asked(rig, 700, every=0.1)
    at = [call.at for call in rig.a.calls[4:]]
    pauses = [round(later - earlier, 1) for earlier, later in pairwise(at)]
    assert pauses[:2] == [pytest.approx(5.6, abs=0.1), pytest.approx(8.3, abs=0.1)]
    assert len(pauses) > 6
    assert 5 <= min(pauses) <= max(pauses) <= 8.4


def test_a_model_that_is_ill_and_not_dead_is_tried_again_sooner() -> None:
    breaker = Breaker(Limits(error_rate=0.2), draw=lambda: 0.0)
    now, rests = 0.0, []
    for _ in range(4):
        while not breaker.is_open:
            breaker.spoke(breaker.begin(now), now, in_time=True)
            breaker.failed(breaker.begin(now), now, "why")
        rests.append(breaker.rest(now))
        now += rests[-1]
        breaker.spoke(breaker.begin(now), now, in_time=True)
    assert rests == [0.75, 1.5, 3.0, 6.0]


@pytest.mark.parametrize("broken", [fails(), HANGS, fails(after=1)])
def test_a_healed_model_is_back_within_ten_seconds_however_it_failed(broken: Does) -> None:
    for ill in (3.0, 17.0, 61.0, 64.5):
        rig = Rig(broken, ANSWERS)
        asked(rig, int(ill / 0.1), every=0.1)
        rig.clock.pass_by(3.1)  # a trial may hang
        rig.a.does = ANSWERS
        healed = rig.clock.time()
        while rig.begin() and rig.clock.time() < healed + 20:
            rig.clock.pass_by(0.1)
            if rig.route.models[0].state is BreakerState.CLOSED:
                break
        assert rig.clock.time() - healed <= 10.0


def test_a_trial_that_is_stopped_by_its_user_is_left_to_the_next_turn() -> None:
    rig = Rig(fails(), ANSWERS)
    asked(rig, 5)
    rig.clock.pass_by(6)
    rig.a.does = HANGS
    rig.begin()
    rig.generation.stop()
    rig.a.does = ANSWERS
    assert rig.ask().end.model == "a"


def test_what_was_under_way_before_a_model_was_put_to_rest_changes_nothing() -> None:
    breaker = Breaker(Limits(), draw=lambda: 0.5)
    late = [breaker.begin(0.0) for _ in range(4)]
    for _ in range(5):
        breaker.failed(breaker.begin(0.0), 0.1, "why")
    assert breaker.rest(0.1) == pytest.approx(6.7 * 0.825)
    breaker.spoke(late[0], 0.2, in_time=True)
    breaker.failed(late[1], 0.2, "later")
    breaker.finished(late[2])
    breaker.unknown(late[3])
    assert (breaker.rest(0.1), breaker.reason, breaker.recent_attempts(0.2)) == (pytest.approx(6.7 * 0.825), "why", 5)


def test_a_model_that_comes_back_only_to_fail_rests_longer_each_time() -> None:
    breaker = Breaker(Limits(), draw=lambda: 0.0)
    now, rests = 0.0, []
    for _ in range(6):
        for _ in range(5):
            breaker.failed(breaker.begin(now), now, "why")
        rests.append(breaker.rest(now))
        now += rests[-1]
        breaker.spoke(breaker.begin(now), now, in_time=True)
        now += 1
    assert rests == pytest.approx([5.025, *[7.5] * 5])
    now += 60
    for _ in range(5):
        breaker.failed(breaker.begin(now), now, "why")
    assert breaker.rest(now) == pytest.approx(5.025)


# --- when all are ill ------------------------------------------------------------------------------------------------


def test_when_all_are_dead_turns_are_refused_at_once_and_say_when_to_come_back() -> None:
    rig = Rig(fails(), fails())
    for _ in range(5):
        rig.ask()
    before = (rig.a.asked, rig.b.asked)
    with pytest.raises(ModelUnavailable) as caught:
        rig.route.admit(Asker())
    assert 5 < (caught.value.retry_after or 0) <= 6
    ear = rig.begin()
    assert isinstance(ear.error, ModelUnavailable), "at once"
    assert 5 < (ear.error.retry_after or 0) <= 6
    assert (rig.a.asked, rig.b.asked) == before
    assert "a rests: The provider answered 500" in ear.error.message
    rig.clock.pass_by(6)
    rig.a.does = ANSWERS
    rig.route.admit(Asker())
    assert rig.ask().end.model == "a"


def test_while_all_are_dead_each_is_tried_once_in_a_pause() -> None:
    rig = Rig(fails(), fails())
    for _ in range(600):
        rig.begin()
        rig.clock.pass_by(0.1)
    assert rig.a.asked <= 5 + 11
    assert rig.b.asked <= 5 + 11


def test_a_model_that_is_slow_but_alive_answers_when_it_is_the_only_one() -> None:
    rig = Rig(replace(ANSWERS, first=1.0), latency=0.3)
    for _ in range(20):
        rig.route.admit(Asker())
        assert rig.ask().end.model == "a"
    assert rig.a.asked == 20


def test_a_model_that_fails_now_and_then_answers_when_the_others_are_dead() -> None:
    rig = Rig(ANSWERS, fails())
    rig.a.draws = iter(([fails()] + [ANSWERS] * 2) * 100).__next__
    ends = [rig.ask().heard[-1] for _ in range(120)]
    good = sum(not isinstance(end, Exception) for end in ends)
    assert good >= 75, good


def test_a_stand_in_that_died_long_ago_is_asked_by_all_who_need_it_now() -> None:
    rig = Rig(fails(), fails())
    for _ in range(5):
        rig.ask()
    rig.a.does = ANSWERS
    rig.clock.pass_by(10)
    assert asked(rig, 300) == 300  # nobody needs b, so nobody has tried it since
    assert rig.route.models[1].state is BreakerState.HALF_OPEN
    rig.a.does, rig.b.does = fails(), ANSWERS
    ears = [rig.begin() for _ in range(30)]
    rig.clock.pass_by(1)
    assert {ear.end.model for ear in ears} == {"b"}


# --- reasons that are no failures ------------------------------------------------------------------------------------


def test_a_provider_that_has_no_good_key_is_not_asked_again_and_again() -> None:
    rig = Rig(fails(ModelCredential("The provider refuses the key.")), ANSWERS)
    assert asked(rig, 300, every=0.1) <= 5
    model = rig.route.models[0]
    assert (model.state, model.reason) == (BreakerState.OPEN, "The provider refuses the key.")
    rig.a.does = ANSWERS
    asked(rig, 100, every=0.1)
    assert rig.ask().end.model == "a"


def test_a_provider_that_asked_to_wait_is_not_called_before_its_time_even_if_nobody_else_is_left() -> None:
    rig = Rig(ANSWERS)
    rig.a.rest = 20.0
    ear = rig.ask()
    assert isinstance(ear.error, QueueFull)
    assert (ear.error.retry_after, rig.a.asked) == (20.0, 0)
    assert rig.route.models[0] == ModelOfRoute(
        model="a",
        state=BreakerState.OPEN,
        reason="a asked not to be called for 20 s more.",
        error_rate=0.0,
        recent_attempts=0,
        rest=20.0,
        first_token=None,
        attempts=0,
    )
    rig.a.rest = 0.0
    assert rig.ask().end.model == "a"


# --- the retry budget ------------------------------------------------------------------------------------------------


def test_a_budget_gives_a_share_of_the_turns_and_a_floor_for_quiet_times() -> None:
    budget = RetryBudget(0.2)
    assert [budget.spend(0.0) for _ in range(11)] == [True] * 10 + [False]
    for _ in range(1000):
        budget.spend(0.0)
    assert not budget.has(10.0)
    assert budget.has(11.0), "a debt is paid back in seconds"
    busy = RetryBudget(0.2)
    covered = 0
    for _ in range(1000):
        busy.turn(0.0)
        covered += busy.has(0.0) and busy.spend(0.0)
    assert covered == pytest.approx(1000 * 0.2 + 10, abs=2)


def test_when_the_budget_is_spent_the_model_that_spent_it_rests_and_no_turn_fails() -> None:
    # So lenient a threshold would let half of all turns ask twice.
    rig = Rig(ANSWERS, ANSWERS, error_rate=0.9, retry_budget=0.2)
    rig.a.draws = iter([fails(), ANSWERS] * 2000).__next__
    turns = 2000
    asked(rig, turns, every=0.01)
    rig.clock.pass_by(1)
    assert rig.a.asked + rig.b.asked <= 1.3 * turns
    assert rig.route.numbers["route_failed"] == 0


def test_models_that_are_ill_are_not_stormed_when_the_budget_is_spent() -> None:
    rig = Rig(*[ANSWERS] * 4, error_rate=0.05)
    for model in rig.models.values():
        model.draws = iter([fails(), fails(), ANSWERS] * 4000).__next__
    turns = 2000
    for _ in range(turns):
        rig.begin()
        rig.clock.pass_by(0.01)
    total = sum(model.asked for model in rig.models.values())
    assert total <= 1.4 * turns, total / turns


# --- configuration ---------------------------------------------------------------------------------------------------


def test_a_route_that_takes_the_place_of_another_remembers_what_that_knew() -> None:
    rig = Rig(fails(), ANSWERS, ANSWERS)
    asked(rig, 5)
    spec = ModelRoute(primary="c", fallback=("a",), cooldown=2.0)
    again = RouteEngine(spec, rig.find, rig.breakers, clock=rig.clock)
    assert [model.state for model in again.models] == [BreakerState.CLOSED, BreakerState.OPEN]
    other = RouteEngine(spec, rig.find, rig.breakers, name="other", clock=rig.clock)
    assert [model.state for model in other.models] == [BreakerState.CLOSED] * 2, "thresholds of its own"
    rig.breakers.retain({"default"})
    assert [model.state for model in again.models] == [BreakerState.CLOSED, BreakerState.OPEN]
    rig.breakers.forget("a")
    assert [model.state for model in again.models] == [BreakerState.CLOSED] * 2


def test_thresholds_of_a_new_configuration_hold_at_once() -> None:
    breakers = Breakers(draw=lambda: 0.0)
    breaker = breakers.of("r", "m", Limits())
    for _ in range(8):
        breaker.spoke(breaker.begin(0.0), 0.0, in_time=True)
    breaker.failed(breaker.begin(0.0), 0.0, "why")
    assert breakers.of("r", "m", Limits(min_attempts=5)) is breaker
    assert breaker.recent_attempts(0.0) == 9
    breaker.failed(breaker.begin(0.0), 0.0, "why")
    assert breaker.is_open
    breakers.of("r", "m", Limits(window=5.0))
    assert breaker.recent_attempts(0.0) == 0, "the new window begins empty"
    breakers.retain({"other"})
    assert not breakers.has("r", "m")


def test_a_route_counts_what_it_did() -> None:
    rig = Rig(HANGS, fails(), ANSWERS, latency=0.3)
    for _ in range(6):
        rig.ask()
    assert rig.route.numbers == {
        "route_turns": 6,
        "route_attempts": 16,
        "route_passed_over": 2,
        "route_switches": 5,
        "route_hedges": 10,
        "route_failed": 0,
        "route_models_resting": 2,
    }
    assert rig.route.models[2].first_token == pytest.approx(0.05)
