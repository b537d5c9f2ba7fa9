"""A route asks its models in order, and passes over those that cannot serve a turn."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import msgspec
import pytest
from moltbot_server.config_models import ModelRoute
from moltbot_server.errors import (
    ContextLengthExceeded,
    ModelCredential,
    ModelUnavailable,
    QueueFull,
    Unimplemented,
    UnsupportedContent,
    UnsupportedOption,
)
from moltbot_server.models.catalog import CatalogEntry
from moltbot_server.models.engine import Asker
from moltbot_server.models.routing import RouteEngine
from moltbot_server.turns import Attempt, GenerationOptions, MediaPart, Message, Role, Routed, TextPart, Tool
from routing_rig import ANSWERS, EVERYTHING, Model, Rig, fails, said

PICTURE = Message(
    role=Role.USER, parts=(TextPart(text="What is this?"), MediaPart(kind="image", media_type="image/png", data=b"x"))
)
TOOLS = GenerationOptions(tools=(Tool(name="clock"),))


def test_the_first_choice_answers_and_nothing_else_is_told() -> None:
    rig = Rig(ANSWERS, ANSWERS)
    ear = rig.ask()
    assert ear.heard[:-1] == [
        Routed(kind="model", name="a", reason="it is the first choice of the route default"),
        "Hello",
        " there",
    ]
    assert (ear.end.model, ear.end.attempts) == ("a", ())
    assert (rig.a.asked, rig.b.asked) == (1, 0)
    assert rig.clock.waiting == 0, "no timer stays behind"
    assert rig.entries["a"].turns == 0, "the model is let go"


def test_models_that_do_it_all_before_begin_returns_are_heard() -> None:
    rig = Rig(fails(first=0.0), replace(ANSWERS, first=0.0))
    ear = rig.begin()
    assert (ear.text, ear.end.model, ear.attempts) == (
        "Hello there", "b", [("a", "MODEL_UNAVAILABLE"), ("b", "ANSWERED")],
    )  # fmt: skip
    assert rig.clock.waiting == 0


@pytest.mark.parametrize(
    ("lacks", "messages", "options", "why"),
    [
        ("image_input", (PICTURE,), GenerationOptions(), "reads no image content"),
        ("image_input", (PICTURE, said("A cat?")), GenerationOptions(), "reads no image content"),
        ("tools", None, TOOLS, "options.tools: this model cannot honour it"),
        ("sampling", None, GenerationOptions(temperature=0.5), "options.temperature: this model cannot honour it"),
    ],
)
def test_a_model_that_cannot_serve_the_turn_is_passed_over_with_a_reason(
    lacks: str, messages: tuple[Message, ...] | None, options: GenerationOptions, why: str
) -> None:
    rig = Rig(ANSWERS, ANSWERS)
    rig.a.capabilities = msgspec.structs.replace(EVERYTHING, **{lacks: False})
    ear = rig.ask(messages=messages, options=options)
    assert (rig.a.asked, ear.end.model) == (0, "b")
    skipped, answered = ear.end.attempts
    assert skipped == Attempt(model="a", outcome="SKIPPED", reason=skipped.reason)
    assert why in skipped.reason
    assert (answered.model, answered.outcome, round(answered.first_token or 0, 3)) == ("b", "ANSWERED", 0.05)
    assert ear.heard[0] == Routed(kind="model", name="b", reason=f"stands in: {skipped.reason}")
    assert rig.route.models[0].recent_attempts == 0, "it is no fault of the model's"


def test_a_request_that_no_model_can_serve_is_told_why() -> None:
    rig = Rig(ANSWERS, ANSWERS)
    rig.a.capabilities = msgspec.structs.replace(EVERYTHING, image_input=False)
    rig.b.capabilities = msgspec.structs.replace(EVERYTHING, tools=False)
    with_both = rig.ask(messages=(PICTURE,), options=TOOLS)
    assert isinstance(with_both.error, UnsupportedContent)
    assert (with_both.error.field, with_both.error.retryable) == ("turn.parts", False)
    assert with_both.attempts == [("a", "SKIPPED"), ("b", "SKIPPED")]
    # What no model at all can do is refused before anything is stored of the turn.
    rig.a.capabilities = msgspec.structs.replace(rig.a.capabilities, tools=False)
    with pytest.raises(UnsupportedOption):
        rig.route.check(TOOLS)
    rig.route.check(GenerationOptions(temperature=0.5))


def test_a_conversation_too_long_for_a_model_goes_to_one_that_reads_more() -> None:
    rig = Rig(ANSWERS, ANSWERS)
    rig.a.capabilities = msgspec.structs.replace(EVERYTHING, context_length=256)
    assert rig.ask("Hi").end.model == "a"
    assert rig.ask("x" * 100).end.model == "a"  # counted: 256 less a quarter for the answer less a margin
    ear = rig.ask("x" * 200)
    assert (ear.end.model, ear.attempts[0]) == ("b", ("a", "SKIPPED"))
    assert "takes about 200 tokens" in ear.end.attempts[0].reason
    assert "a reads 256, of which 64 are kept for the answer" in ear.end.attempts[0].reason
    assert rig.ask("x" * 100, options=GenerationOptions(max_output_tokens=128)).end.model == "a"
    assert rig.ask("x" * 150, options=GenerationOptions(max_output_tokens=128)).end.model == "b"


def test_when_those_that_read_it_all_fail_one_answers_that_reads_less_of_the_history() -> None:
    rig = Rig(fails(), ANSWERS)
    rig.b.capabilities = msgspec.structs.replace(EVERYTHING, context_length=256)
    history = [said("x" * 90, role) for _ in range(3) for role in (Role.USER, Role.ASSISTANT)]
    ear = rig.ask(messages=(*history, said("And now?")))
    assert (ear.end.model, ear.end.trimmed_messages) == ("b", 6)
    assert rig.b.calls[0].messages == [said("And now?")]
    assert ear.attempts == [("a", "MODEL_UNAVAILABLE"), ("b", "SKIPPED"), ("b", "ANSWERED")]
    too_long = rig.ask("x" * 300)
    assert isinstance(too_long.error, ModelUnavailable), "another time the one that reads it may be well"


def test_what_no_context_holds_is_told_as_such() -> None:
    rig = Rig(fails(ContextLengthExceeded("messages", "takes 9000 tokens")))
    assert isinstance(rig.ask().error, ContextLengthExceeded)
    assert rig.route.models[0].error_rate == 0.0


@pytest.mark.parametrize(
    ("obstacle", "why"),
    [
        ("missing", "There is no model 'a'."),
        ("loading", "a cannot answer: The model is being loaded."),
        ("broken", "a cannot answer: The model stopped working; the log says why."),
        ("no key", "There is no key for a: `moltbot key add a`."),
        ("asked to wait", "a asked not to be called for 20 s more."),
        ("key refused", "The provider refuses the key."),
        ("full", "Too much waits."),
        ("route", "nested is a route; a route leads to models only."),
    ],
)
def test_a_model_that_cannot_be_asked_is_passed_over_with_a_reason(obstacle: str, why: str) -> None:
    rig = Rig(ANSWERS, ANSWERS)
    match obstacle:
        case "missing":
            del rig.entries["a"]
        case "loading":
            rig.entries["a"] = CatalogEntry(rig.a)
        case "broken":
            rig.a.healthy = False
        case "no key":
            rig.a.healthy = False
            rig.a.refusal = ModelCredential(why)
        case "asked to wait":
            rig.a.rest = 20.0
        case "key refused":
            rig.a.rest = 20.0
            rig.a.refusal = ModelCredential(why)
        case "full":
            rig.a.refusal = QueueFull(why)
        case "route":
            rig.entries["a"] = CatalogEntry(RouteEngine(ModelRoute(name="nested", primary="b"), rig.find))
    rig.route.admit(Asker())
    ear = rig.ask()
    assert (rig.a.asked, ear.end.model) == (0, "b")
    assert ear.end.attempts[0].reason == why
    assert rig.route.healthy


def test_one_model_by_two_names_is_asked_once() -> None:
    rig = Rig(fails(), ANSWERS, ANSWERS)
    rig.entries["b"] = rig.entries["a"]
    assert rig.ask().attempts == [("a", "MODEL_UNAVAILABLE"), ("c", "ANSWERED")]


async def test_a_model_that_leaves_gets_no_more_turns_and_ends_those_it_has() -> None:
    rig = Rig(ANSWERS, ANSWERS)
    under_way = rig.begin()
    draining = rig.entries["a"].drain()
    draining.send(None)  # it waits for the turn
    assert rig.ask().end.model == "b"
    rig.clock.pass_by(1)
    assert under_way.end.model == "a"
    with pytest.raises(StopIteration):
        draining.send(None)


def test_what_a_route_can_do_is_what_any_of_its_models_can() -> None:
    rig = Rig(ANSWERS, ANSWERS, ANSWERS)
    none = msgspec.structs.replace(EVERYTHING, image_input=False, tools=False, token_counts=False)
    rig.a.capabilities = msgspec.structs.replace(none, context_length=1000)
    rig.b.capabilities = msgspec.structs.replace(none, context_length=4000, tools=True, token_counts=True)
    rig.c.capabilities = msgspec.structs.replace(none, context_length=2000, image_input=True)
    route = rig.route
    assert route.capabilities == msgspec.structs.replace(EVERYTHING, context_length=4000)
    rig.b.capabilities = msgspec.structs.replace(rig.b.capabilities, context_length=5000)
    rig.clock.pass_by(0.1)
    assert route.capabilities.context_length == 5000
    rig.b.healthy = False
    rig.clock.pass_by(0.1)
    assert route.capabilities.context_length == 5000, "sessions are not cut because a model is ill"
    assert (route.parallel, route.id, route.is_route, route.rest) == (12, "default", True, 0.0)
    rig.a.parallel = 0
    assert route.parallel == 0


async def test_a_route_counts_as_its_first_model_that_counts() -> None:
    class Halving(Model):
        def count(self, message: Message) -> int:
            return len(message.text) // 2

        async def tokens(self, content: object) -> int:
            return 42

    rig = Rig(ANSWERS, ANSWERS)
    rig.a.capabilities = msgspec.structs.replace(EVERYTHING, token_counts=False)
    rig.entries["b"] = CatalogEntry(Halving("b", rig.clock))
    rig.entries["b"].loaded()
    assert (rig.route.count(said("four")), await rig.route.tokens("four")) == (2, 42)
    with pytest.raises(Unimplemented):
        await rig.route.embed(["text"])
    rig.entries.clear()
    rig.clock.pass_by(0.1)
    with pytest.raises(ModelUnavailable):
        rig.route.count(said("four"))


def test_a_route_is_as_healthy_as_any_of_its_models() -> None:
    rig = Rig(ANSWERS, ANSWERS)
    rig.a.healthy = False
    assert rig.route.healthy
    rig.b.healthy = False
    assert not rig.route.healthy


def test_a_turn_that_nobody_would_take_is_refused_before_it_is_stored() -> None:
    rig = Rig(ANSWERS, ANSWERS)
    rig.a.rest = 20.0
    rig.b.refusal = QueueFull("Too much waits.", retry_after=3.0)
    with pytest.raises(QueueFull) as caught:
        rig.route.admit(Asker())
    assert caught.value.retry_after == 3.0, "the shortest wait"
    rig.b.refusal = None
    rig.route.admit(Asker())
    rig.entries.clear()
    with pytest.raises(ModelUnavailable):
        rig.route.admit(Asker())


def test_models_with_weights_share_their_place_and_sessions_stay_with_theirs() -> None:
    rig = Rig(ANSWERS, ANSWERS, ANSWERS, weights=(("a", 3), ("c", 1)))
    first = {f"s{n}": rig.ask(asker=Asker(workspace="w", session=f"s{n}")).end.model for n in range(400)}
    shares = Counter(first.values())
    assert set(shares) == {"a", "c"}
    assert 270 <= shares["a"] <= 330, shares
    again = {name: rig.ask(asker=Asker(workspace="w", session=name)).end.model for name in list(first)[:50]}
    assert again.items() <= first.items()
    without = Counter(rig.ask().end.model for _ in range(200))
    assert without["a"] > without["c"] > 10, without


def test_of_models_with_weights_the_next_one_stands_in_before_those_after_them() -> None:
    rig = Rig(fails(), ANSWERS, ANSWERS, weights=(("a", 1), ("c", 0)))
    ear = rig.ask(asker=Asker(session="s"))
    assert ear.attempts == [("a", "MODEL_UNAVAILABLE"), ("c", "ANSWERED")]


def test_how_its_models_are_is_known_before_there_was_a_turn_also_to_a_thread_without_a_loop() -> None:
    rig = Rig(ANSWERS, ANSWERS)
    rig.route._clock = None  # as it is made: the loop that its turns belong to does not run yet

    assert [model.model for model in rig.route.models] == ["a", "b"]
    assert rig.route._clock is None
