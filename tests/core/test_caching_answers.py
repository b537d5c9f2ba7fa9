"""Kept answers: what is asked again is answered again, at once, and only where that is right."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from cache_desk import COLD, DONE, Desk, Pen, Route, said
from moltbot_server.errors import ModelUnavailable
from moltbot_server.models.caching.answers import KEPT
from moltbot_server.models.engine import Asker, Finished
from moltbot_server.turns import (
    Attempt,
    FinishReason,
    GenerationOptions,
    MediaPart,
    Message,
    Notice,
    Part,
    Reset,
    Role,
    Routed,
    TextPart,
    Tool,
    ToolCallPart,
)


class TestKeptAnswers:
    """What was asked before."""

    def test_the_same_question_is_answered_at_once_without_the_engine(self) -> None:
        desk = Desk()
        first, _ = desk.ask()
        desk.engine.write("He", "llo")

        second, generation = desk.ask()
        generation.stop()

        assert (first.text, second.text) == ("Hello", "Hello")
        assert first.end == DONE
        assert second.end == msgspec.structs.replace(DONE, cached=True, queue=0.0)
        assert len(desk.engine.listeners) == 1
        assert desk.counts == (1, 1, 0)

    def test_a_long_answer_comes_back_whole_in_pieces_of_a_fair_size(self) -> None:
        desk = Desk()
        pieces = [f"{number} " for number in range(2000)]
        desk.ask()
        desk.engine.write(*pieces)

        ear, _ = desk.ask()

        assert ear.text == "".join(pieces)
        assert 10 < len(ear.heard) < 30

    def test_what_the_model_thought_comes_back_and_is_no_text(self) -> None:
        desk = Desk()
        desk.ask()
        desk.engine.listeners[-1].thought("hm")
        desk.engine.write("yes")

        assert desk.ask()[0].heard == [("thought", "hm"), "yes"]

    @pytest.mark.parametrize(
        "other",
        [
            {"text": "Hello"},
            {"workspace": "v"},
            {"options": GenerationOptions(temperature=0.0, max_output_tokens=5)},
            {"options": GenerationOptions(temperature=0.0, stop=("x",))},
            {"messages": [said("be brief", Role.SYSTEM), said("hello")]},
            {"messages": [said("hi"), said("ho", Role.ASSISTANT), said("hello")]},
            {"messages": [said("hello", Role.SYSTEM)]},
        ],
        ids=["text", "workspace", "length", "stop", "rules", "history", "role"],
    )
    def test_what_differs_in_anything_is_another_question(self, other: dict[str, Any]) -> None:
        desk = Desk()
        desk.ask()
        desk.engine.write("one")

        assert desk.ask(**other)[0].end is None
        assert len(desk.engine.listeners) == 2

    def test_two_messages_are_not_the_same_as_one_with_both_texts(self) -> None:
        desk = Desk()
        desk.ask(messages=[said("a"), said("b")])
        desk.engine.write("one")

        assert desk.ask(messages=[said("ab")])[0].end is None

    def test_where_and_when_the_same_words_were_said_makes_no_difference(self) -> None:
        desk = Desk()
        desk.ask(messages=[said("hi", id="1.0", turn=1, create_time=5.0), said("hello")])
        desk.engine.write("one")

        assert desk.ask(messages=[said("hi", id="7.0", turn=7, create_time=9.0), said("hello")])[0].text == "one"

    def test_an_answer_is_forgotten_after_its_time(self) -> None:
        desk = Desk()
        desk.ask()
        desk.engine.write("one")
        desk.now += 59.9
        assert desk.ask()[0].text == "one"

        desk.now += 0.2

        assert desk.ask()[0].end is None
        assert desk.cache.entries == 0

    async def test_a_workspace_forgets_its_own_answers_only(self) -> None:
        desk = Desk()
        for workspace in ("w", "v"):
            desk.ask(workspace=workspace)
            desk.engine.write("one")

        assert await desk.cache.clear("w") == 1

        assert desk.ask(workspace="v")[0].text == "one"
        assert desk.ask(workspace="w")[0].end is None

    def test_a_model_that_was_loaded_anew_is_asked_anew(self) -> None:
        desk = Desk()
        desk.ask()
        desk.engine.write("one")

        assert desk.ask(engine=Pen())[0].end is None

    def test_nothing_is_kept_of_before_once_the_routes_have_changed(self) -> None:
        desk = Desk()
        desk.ask()
        desk.engine.write("one")

        desk.cache.renew(b"other routes")

        assert desk.ask()[0].end is None
        assert desk.cache.entries == 0

    def test_an_answer_that_cannot_be_read_is_asked_for_again(self) -> None:
        desk = Desk()
        desk.ask()
        desk.engine.write("one")
        (key,) = desk.backend._kept
        desk.backend.put(key, b"from another release")

        assert desk.ask()[0].end is None


class TestWhatIsNotKept:
    """What may be otherwise the next time, or is no answer."""

    @pytest.mark.parametrize(
        ("engine", "options", "kept"),
        [
            (Pen, GenerationOptions(), True),
            (Pen, GenerationOptions(temperature=0.7), False),
            (Pen, COLD, True),
            (Route, GenerationOptions(), False),
            (Route, COLD, True),
        ],
        ids=["greedy", "warm", "cold", "a route by itself", "a cold route"],
    )
    def test_only_what_leaves_nothing_to_chance_is_kept(
        self, engine: type[Pen], options: GenerationOptions, kept: bool
    ) -> None:
        desk = Desk(engine())
        desk.ask(options=options)
        desk.engine.write("one")

        assert (desk.ask(options=options)[0].end is not None) is kept

    def test_everything_is_kept_where_the_configuration_says_always(self) -> None:
        desk = Desk(Route(), answers="always")
        warm = GenerationOptions(temperature=1.5)
        desk.ask(options=warm)
        desk.engine.write("one")

        assert desk.ask(options=warm)[0].text == "one"

    @pytest.mark.parametrize("options", [COLD, GenerationOptions()])
    def test_nothing_is_kept_or_shared_where_the_configuration_says_off(self, options: GenerationOptions) -> None:
        desk = Desk(answers="off")
        desk.ask(options=options)
        desk.ask(options=options)
        desk.engine.write("one")
        desk.ask(options=options)

        assert len(desk.engine.listeners) == 3
        assert desk.counts == (0, 0, 0)

    def test_a_script_is_played_each_time(self) -> None:
        desk = Desk()
        desk.engine.type = "scripted"
        desk.ask()
        desk.engine.write("one")

        assert desk.ask()[0].end is None

    @pytest.mark.parametrize(
        "part",
        [
            MediaPart(kind="image", media_type="image/png", data=b"x"),
            ToolCallPart(call_id="c", tool="t"),
        ],
        ids=["picture", "tool call"],
    )
    def test_what_holds_more_than_text_is_neither_kept_nor_shared(self, part: Part) -> None:
        desk = Desk()
        asked = [Message(role=Role.USER, parts=(TextPart(text="what is this?"), part))]
        desk.ask(messages=asked)
        desk.ask(messages=asked)

        assert len(desk.engine.listeners) == 2
        assert desk.counts == (0, 0, 0)

    def test_a_question_with_tools_is_neither_kept_nor_shared(self) -> None:
        desk = Desk(answers="always")
        options = GenerationOptions(temperature=0.0, tools=(Tool(name="t"),))
        desk.ask(options=options)
        desk.ask(options=options)

        assert len(desk.engine.listeners) == 2

    @pytest.mark.parametrize(
        "end",
        [
            ModelUnavailable("gone"),
            msgspec.structs.replace(DONE, finish_reason=FinishReason.CONTENT_FILTER),
            msgspec.structs.replace(DONE, finish_reason=FinishReason.CANCELLED),
            msgspec.structs.replace(DONE, finish_reason=FinishReason.TOOL_CALLS),
            msgspec.structs.replace(DONE, attachments=(ToolCallPart(call_id="c", tool="t"),)),
            msgspec.structs.replace(
                DONE, attempts=(Attempt(model="a", outcome="MODEL_ERROR"), Attempt(model="b", outcome="ANSWERED"))
            ),
        ],
        ids=["failed", "filtered", "cancelled", "tools", "attachment", "stood in"],
    )
    def test_an_answer_that_does_not_stand_is_asked_for_again(self, end: Finished | Exception) -> None:
        desk = Desk()
        ear, _ = desk.ask()
        desk.engine.write("one", end=end)

        assert ear.end == end
        assert desk.ask()[0].end is None

    def test_an_empty_answer_is_asked_for_again(self) -> None:
        desk = Desk()
        desk.ask()
        desk.engine.write()

        assert desk.ask()[0].end is None

    def test_an_answer_that_was_stopped_is_asked_for_again(self) -> None:
        desk = Desk()
        ear, generation = desk.ask()
        desk.engine.write("on", end=None)
        generation.stop()

        assert desk.engine.stopped == 1
        assert (ear.heard, ear.end) == (["on"], None)
        assert desk.ask()[0].end is None
        assert len(desk.engine.listeners) == 2

    async def test_who_brings_a_deadline_asks_alone(self) -> None:
        desk = Desk()
        desk.ask(asker=Asker(deadline=asyncio.get_running_loop().time() + 1))
        desk.ask(asker=Asker(deadline=asyncio.get_running_loop().time() + 2))

        assert len(desk.engine.listeners) == 2


class TestRoutes:
    """A route says who answers."""

    def test_a_kept_answer_of_a_route_names_its_model_and_that_it_was_kept(self) -> None:
        desk = Desk(Route())
        desk.ask()
        desk.engine.listeners[-1].noted(Routed(kind="model", name="gpt-4", reason="it is the first choice"))
        attempts = (Attempt(model="gpt-4", outcome="ANSWERED"),)
        desk.engine.write("one", end=msgspec.structs.replace(DONE, model="gpt-4", attempts=attempts))

        ear, _ = desk.ask()

        assert ear.heard == [Routed(kind="model", name="gpt-4", reason=KEPT), "one"]
        assert ear.end == msgspec.structs.replace(DONE, model="gpt-4", cached=True, queue=0.0)

    def test_who_joins_late_hears_who_answers_and_only_the_text_that_stands(self) -> None:
        desk = Desk(Route())
        first, _ = desk.ask()
        to = desk.engine.listeners[-1]
        a, b = (Routed(kind="model", name=name, reason="") for name in ("a", "b"))
        switch = Notice(code="MODEL_FALLBACK", origin="a", target="b", reason="cut")
        to.noted(a)
        to.wrote("wro", 1)
        to.noted(switch)
        to.noted(Reset(text="", reason="cut"))
        to.noted(b)
        to.wrote("right", 1)
        late, _ = desk.ask()
        desk.engine.write(" so")

        assert late.heard == [a, switch, b, "right", " so"]
        assert (first.text, late.text) == ("right so", "right so")
