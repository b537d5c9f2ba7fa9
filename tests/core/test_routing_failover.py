"""A route goes on to the next model when one errs or is slow, and says so."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
from moltbot_server.errors import (
    BudgetExceeded,
    ContentTooLarge,
    ModelCredential,
    ModelUnavailable,
    MoltBotError,
    QueueFull,
    TurnInterrupted,
)
from moltbot_server.models.engine import Asker
from moltbot_server.models.routing.outcome import Refusal, final_error
from moltbot_server.turns import (
    Attempt,
    FinishReason,
    GenerationOptions,
    Notice,
    Reset,
    Role,
    Routed,
    ToolCallPart,
    Usage,
)
from routing_rig import ANSWERS, HANGS, Does, Ear, Heard, Rig, fails, said

FIRST = Routed(kind="model", name="a", reason="it is the first choice of the route default")
BROKE = "The provider answered 500."


def switched(origin: str, target: str, why: str) -> list[Heard]:
    return [
        Notice(code="FAILOVER", origin=f"models/{origin}", target=f"models/{target}", reason=why),
        Routed(kind="model", name=target, reason=f"stands in for {origin}"),
    ]


# --- before the first visible word -----------------------------------------------------------------------------------


@pytest.mark.parametrize("raised", [False, True])
def test_after_an_error_the_next_model_answers_at_once_and_the_switch_is_an_event(raised: bool) -> None:
    rig = Rig(Does(raises=ModelUnavailable(BROKE)) if raised else fails(), ANSWERS)
    ear = rig.ask()
    assert ear.heard[:-1] == [FIRST, *switched("a", "b", BROKE), "Hello", " there"]
    assert ear.end.model == "b"
    start = 0.0 if raised else 0.05
    assert [_rounded(attempt) for attempt in ear.end.attempts] == [
        Attempt(model="a", outcome="MODEL_UNAVAILABLE", reason=BROKE, total=start),
        Attempt(model="b", outcome="ANSWERED", start=start, first_token=0.05, total=0.07),
    ]
    assert rig.clock.waiting == 0
    assert [entry.turns for entry in rig.entries.values()] == [0, 0]


def test_a_chain_is_followed_to_its_end() -> None:
    rig = Rig(fails(), fails(), fails(), fails(), ANSWERS)
    ear = rig.ask()
    assert [outcome for _, outcome in ear.attempts] == ["MODEL_UNAVAILABLE"] * 4 + ["ANSWERED"]
    assert [what.target for what in ear.heard if isinstance(what, Notice)] == [f"models/{name}" for name in "bcde"]


def test_a_slow_model_is_joined_by_the_next_one_and_stopped_when_that_one_speaks() -> None:
    rig = Rig(HANGS, ANSWERS, latency=0.3)
    ear = rig.ask()
    why = "a said nothing for 300 ms"
    assert ear.heard[:-1] == [FIRST, *switched("a", "b", why), "Hello", " there"]
    assert [_rounded(attempt) for attempt in ear.end.attempts] == [
        Attempt(model="a", outcome="CANCELLED", reason="b was faster", total=0.35),
        Attempt(model="b", outcome="ANSWERED", start=0.3, first_token=0.05, total=0.07),
    ]
    assert rig.a.calls[0].stopped_at == pytest.approx(1000.35), "it is stopped in the moment that the other one speaks"
    assert rig.route.models[0].error_rate == 1.0, "slow counts as failed"


def test_a_slow_model_that_speaks_before_the_one_that_joined_it_is_the_answer() -> None:
    rig = Rig(replace(ANSWERS, first=0.32), ANSWERS, latency=0.3)
    ear = rig.ask()
    assert ear.heard[:-1] == [FIRST, "Hello", " there"], "nothing was switched, nothing is told"
    assert ear.attempts == [("a", "ANSWERED"), ("b", "CANCELLED")]
    assert rig.b.calls[0].stopped_at == pytest.approx(1000.32)
    assert rig.route.models[1].error_rate == 0.0


def test_models_that_are_all_slow_are_all_asked_one_latency_after_the_other() -> None:
    rig = Rig(HANGS, HANGS, replace(ANSWERS, first=1.0), latency=0.3)
    ear = rig.ask()
    assert [round(call.at - 1000, 2) for model in rig.models.values() for call in model.calls] == [0.0, 0.3, 0.6]
    assert ear.attempts == [("a", "CANCELLED"), ("b", "CANCELLED"), ("c", "ANSWERED")]
    assert [what.target for what in ear.heard if isinstance(what, Notice)] == ["models/c"]


def test_a_turn_in_a_hurry_waits_a_third_of_its_time_and_blames_nobody() -> None:
    rig = Rig(HANGS, ANSWERS)
    ear = rig.ask(asker=Asker(deadline=rig.clock.time() + 1.5))
    assert ear.end.attempts[1].start == pytest.approx(0.5)
    assert rig.route.models[0].error_rate == 0.0


def test_a_model_that_breaks_when_the_callers_time_is_over_is_not_blamed() -> None:
    rig = Rig(fails(first=1.0))
    rig.ask(asker=Asker(deadline=rig.clock.time() + 1.0))
    assert rig.route.models[0].recent_attempts == 0


def test_an_error_while_two_are_asked_leaves_the_other_one_to_answer() -> None:
    rig = Rig(fails(first=0.35), replace(ANSWERS, first=0.2), ANSWERS, latency=0.3)
    ear = rig.begin()
    rig.clock.pass_by(0.4)
    assert ear.heard[1:] == switched("a", "b", BROKE), "told as soon as it is known"
    rig.clock.pass_by(1)
    assert ear.attempts == [("a", "MODEL_UNAVAILABLE"), ("b", "ANSWERED")]
    assert rig.c.asked == 0


def test_when_the_one_that_joined_errs_the_next_one_joins_at_once() -> None:
    rig = Rig(HANGS, fails(), ANSWERS, latency=0.3)
    ear = rig.ask()
    assert ear.attempts == [("a", "CANCELLED"), ("b", "MODEL_UNAVAILABLE"), ("c", "ANSWERED")]
    assert rig.c.calls[0].at == pytest.approx(1000.35)
    assert ear.heard[1:3] == switched("a", "c", "a said nothing for 300 ms")


def test_a_model_that_never_speaks_is_given_up_in_the_end() -> None:
    rig = Rig(HANGS, latency=0.3, timeout=20.0)
    ear = rig.ask()
    assert isinstance(ear.error, ModelUnavailable)
    assert ear.error.message == "a gave no sign for 20.0 s."
    assert rig.a.calls[0].stopped_at == pytest.approx(1020.0)


@pytest.mark.parametrize("error", [QueueFull("Busy."), BudgetExceeded("Used up."), ContentTooLarge("parts", "too big")])
def test_a_refusal_goes_on_to_the_next_model_and_is_no_fault_of_the_first(error: Exception) -> None:
    rig = Rig(fails(error), ANSWERS)
    for _ in range(20):
        assert rig.ask().end.model == "b"
    assert (rig.a.asked, rig.route.models[0].error_rate) == (20, 0.0)


def test_an_answer_without_a_word_is_an_error_unless_nobody_has_a_better_one() -> None:
    silent = Does(pieces=())
    rig = Rig(silent, ANSWERS)
    ear = rig.ask()
    assert (ear.text, ear.attempts) == ("Hello there", [("a", "MODEL_UNAVAILABLE"), ("b", "ANSWERED")])
    alone = Rig(silent).ask()
    assert (alone.text, alone.end.finish_reason) == ("", FinishReason.STOP)
    for reason in (FinishReason.CONTENT_FILTER, FinishReason.LENGTH):
        meant = Rig(Does(pieces=(), finish_reason=reason), ANSWERS).ask()
        assert (meant.end.model, meant.end.finish_reason) == ("a", reason)


def test_tools_to_be_called_are_an_answer() -> None:
    call = ToolCallPart(call_id="1", tool="clock")
    rig = Rig(fails(), Does(pieces=(), finish_reason=FinishReason.TOOL_CALLS, attachments=(call,)))
    ear = rig.ask()
    assert (ear.end.model, ear.end.attachments, ear.end.finish_reason) == ("b", (call,), FinishReason.TOOL_CALLS)


def test_a_model_that_thinks_is_alive_and_its_thoughts_are_taken_back_when_it_breaks() -> None:
    rig = Rig(Does(thoughts=("hm", "so"), pieces=(), pace=1.0, error=ModelUnavailable(BROKE)), ANSWERS, latency=0.3)
    ear = rig.ask()
    assert ear.heard[:-1] == [
        FIRST, "?hm", "?so", *switched("a", "b", BROKE), Reset(text="", reason=BROKE), "Hello", " there",
    ]  # fmt: skip
    assert ear.attempts == [("a", "MODEL_UNAVAILABLE"), ("b", "ANSWERED")]


def test_thoughts_and_blanks_are_no_visible_words() -> None:
    for does in (
        Does(thoughts=("hm",), pieces=(), error=ModelUnavailable(BROKE)),
        Does(pieces=("\n",), error=ModelUnavailable(BROKE)),
    ):
        ear = Rig(does, ANSWERS, on_failure="stop").ask()
        assert (ear.text, ear.end.model) == ("Hello there", "b")


def test_the_place_in_the_queue_is_told_of_the_model_that_was_told() -> None:
    rig = Rig(replace(ANSWERS, first=0.5, queue_position=3), replace(ANSWERS, queue_position=9), latency=0.3)
    ear = rig.ask()
    assert "#3" in ear.heard
    assert "#9" not in ear.heard


def test_a_stopped_turn_stops_all_that_were_asked_and_hears_no_more() -> None:
    rig = Rig(HANGS, HANGS, latency=0.3)
    ear = rig.begin()
    rig.clock.pass_by(0.4)
    rig.generation.stop()
    rig.generation.stop()
    rig.clock.pass_by(100)
    assert ear.heard == [FIRST]
    assert [call.stopped_at for model in rig.models.values() for call in model.calls] == [pytest.approx(1000.4)] * 2
    assert rig.clock.waiting == 0
    assert [(attempt.model, attempt.outcome) for attempt in rig.generation.attempts] == [
        ("a", "CANCELLED"),
        ("b", "CANCELLED"),
    ]
    assert [entry.turns for entry in rig.entries.values()] == [0, 0]


def test_a_turn_that_is_stopped_by_who_hears_of_it_stops_even_a_model_that_is_only_beginning() -> None:
    class Impatient(Ear):
        def wrote(self, text: str, tokens: int) -> None:
            super().wrote(text, tokens)
            rig.generation.stop()

    rig = Rig(HANGS, Does(pieces=("Hello", " there"), first=0.0, hangs=True), latency=0.3)
    ear = Impatient(clock=rig.clock)
    rig.generation = rig.route.begin((said("Hi"),), GenerationOptions(), ear)
    rig.clock.pass_by(100)
    assert (ear.text, rig.b.calls[0].stopped_at) == ("Hello", pytest.approx(1000.3))
    assert rig.clock.waiting == 0


# --- after the first visible word ------------------------------------------------------------------------------------


def test_restart_takes_the_text_back_when_the_next_model_speaks_and_begins_anew() -> None:
    rig = Rig(fails(after=1), ANSWERS)
    ear = rig.ask()
    assert ear.heard[:-1] == [
        FIRST, "Hello", *switched("a", "b", BROKE), Reset(text="", reason=BROKE), "Hello", " there",
    ]  # fmt: skip
    assert ear.text == "Hello there"
    assert rig.b.calls[0].messages == (said("Hi"),)
    assert ear.end.attempts[0].first_token == pytest.approx(0.05)


def test_restart_leaves_the_text_when_nobody_can_begin_anew() -> None:
    ear = Rig(fails(after=1), fails(), Does(pieces=())).ask()
    assert ear.text == "Hello"
    assert not any(isinstance(what, Reset) for what in ear.heard)
    assert isinstance(ear.error, ModelUnavailable)


def test_continue_gives_the_next_model_the_text_so_far_and_goes_on() -> None:
    rig = Rig(
        Does(pieces=("Once ", "upon "), error=ModelUnavailable(BROKE)),
        Does(pieces=("a ", "time.")),
        on_failure="continue",
    )
    ear = rig.ask(options=GenerationOptions(max_output_tokens=10))
    assert ear.heard[:-1] == [FIRST, "Once ", "upon ", *switched("a", "b", BROKE), "a ", "time."]
    assert rig.b.calls[0].messages == (said("Hi"), said("Once upon", Role.ASSISTANT))
    assert rig.b.calls[0].options == GenerationOptions(max_output_tokens=8)
    assert ear.end.usage == Usage(input_tokens=7, output_tokens=4), "what was said before the switch counts"


def test_continue_with_nothing_to_add_is_a_whole_answer() -> None:
    ear = Rig(fails(after=2), Does(pieces=()), on_failure="continue").ask()
    assert (ear.text, ear.end.model) == ("Hello there", "b")


def test_stop_ends_the_answer_where_it_broke_and_says_so() -> None:
    for error in (ContentTooLarge("parts", "too big"), TurnInterrupted("It stopped."), ModelUnavailable(BROKE)):
        rig = Rig(fails(error, after=2), ANSWERS, on_failure="stop")
        ear = rig.ask()
        notice = Notice(code="UPSTREAM_ERROR", origin="models/a", target="", reason=error.message)
        assert ear.heard[:-1] == [FIRST, "Hello", " there", notice]
        assert (ear.end.finish_reason, ear.end.model) == (FinishReason.UPSTREAM_ERROR, "a")
        assert ear.end.usage.output_tokens == 2
        assert ear.attempts == [("a", error.reason)]
        assert (rig.b.asked, rig.route.numbers["route_failed"]) == (0, 1)
        assert rig.clock.waiting == 0


def test_stop_is_no_good_end_of_a_turn_whose_time_is_over() -> None:
    rig = Rig(fails(after=1), ANSWERS, on_failure="stop")
    ear = rig.ask(asker=Asker(deadline=rig.clock.time() + 0.05))
    assert isinstance(ear.error, ModelUnavailable)


def test_a_model_that_falls_silent_in_its_answer_has_broken() -> None:
    rig = Rig(Does(pieces=("Hel",), hangs=True), ANSWERS, timeout=20.0)
    ear = rig.ask()
    assert (ear.text, ear.end.model) == ("Hello there", "b")
    assert ear.end.attempts[0].total == pytest.approx(20.05)
    assert ear.end.attempts[0].reason == "a gave no sign for 20.0 s."


def test_a_long_answer_that_goes_on_is_left_alone() -> None:
    rig = Rig(Does(pieces=("word ",) * 60, pace=5.0), ANSWERS, timeout=20.0)
    ear = rig.ask()
    assert (ear.end.model, len(ear.text), rig.b.asked) == ("a", 300, 0)


# --- what is told when all fail --------------------------------------------------------------------------------------


def test_a_model_that_was_asked_twice_is_named_once_with_what_it_said_last() -> None:
    error = final_error(
        [
            Refusal("a", ModelUnavailable("Slow."), asked=True),
            Refusal("b", ModelUnavailable("Gone."), asked=False),
            Refusal("a", ModelUnavailable("Slower."), asked=True),
        ]
    )
    assert error.message == "None of the route's 2 models (1 asked) could answer: a: Slower; b: Gone"


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ((BudgetExceeded("Used up.", retry_after=60.0), BudgetExceeded("Used up too.")), BudgetExceeded),
        ((BudgetExceeded("Used up.", retry_after=60.0), QueueFull("Busy.", retry_after=2.0)), QueueFull),
        ((BudgetExceeded("Used up."), ModelUnavailable("Gone.")), ModelUnavailable),
    ],
)
def test_a_used_up_budget_is_told_as_such_where_that_is_all(
    errors: tuple[MoltBotError, ...], expected: type[MoltBotError]
) -> None:
    error = final_error([Refusal(name, each, asked=False) for name, each in zip("ab", errors, strict=True)])
    assert type(error) is expected


def test_the_only_model_of_a_route_is_told_as_such() -> None:
    error = final_error([Refusal("a", RuntimeError(), asked=True)])
    assert error.message.startswith("Not even the route's only model could answer: a: ")


def test_when_all_fail_the_error_names_them_and_the_shortest_wait() -> None:
    rig = Rig(
        fails(), fails(ModelUnavailable("Gone.", retry_after=9.0)), fails(QueueFull("Busy.", retry_after=4.0)), ANSWERS
    )
    del rig.entries["d"]
    ear = rig.ask()
    assert isinstance(ear.error, ModelUnavailable)
    assert ear.error.message == (
        "None of the route's 4 models (3 asked) could answer: "
        "a: The provider answered 500; b: Gone; c: Busy; d: There is no model 'd'"
    )
    assert ear.error.retry_after == 4.0
    assert ear.attempts == [
        ("a", "MODEL_UNAVAILABLE"),
        ("b", "MODEL_UNAVAILABLE"),
        ("c", "QUEUE_FULL"),
        ("d", "SKIPPED"),
    ]


def test_when_all_are_full_the_caller_is_told_so_and_when_to_come_back() -> None:
    ear = Rig(fails(QueueFull("Busy.", retry_after=20.0)), fails(QueueFull("Busy.", retry_after=30.0))).ask()
    assert isinstance(ear.error, QueueFull)
    assert ear.error.retry_after == 20.0


def test_what_can_be_mended_is_told_rather_than_what_is_only_so() -> None:
    too_big, no_key = ContentTooLarge("turn.parts", "too big"), ModelCredential("No key.")
    assert Rig(fails(no_key), fails(too_big)).ask().error is too_big
    assert Rig(fails(no_key), fails(ModelCredential("None here."))).ask().error is no_key
    assert isinstance(Rig(fails(too_big), fails()).ask().error, ModelUnavailable)


def test_an_error_that_nobody_expected_is_logged_and_not_told(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(fails(ZeroDivisionError("secret")), ANSWERS)
    with caplog.at_level(logging.ERROR):
        assert rig.ask().attempts == [("a", "INTERNAL"), ("b", "ANSWERED")]
    assert [record.message for record in caplog.records] == ["a model failed"]
    caplog.clear()
    ear = Rig(fails(ZeroDivisionError("secret"))).ask()
    assert isinstance(ear.error, ModelUnavailable)
    assert "secret" not in str(ear.error)


def _rounded(attempt: Attempt) -> Attempt:
    first = None if attempt.first_token is None else round(attempt.first_token, 3)
    return Attempt(
        model=attempt.model,
        outcome=attempt.outcome,
        reason=attempt.reason,
        start=round(attempt.start, 3),
        first_token=first,
        total=round(attempt.total, 3),
    )
