"""Kept answers and shared ones: what is asked again is answered again, at once, and only where that is right."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from moltbot_server.errors import ModelUnavailable, QueueFull
from moltbot_server.models.caching.answers import KEPT, AnswerCache
from moltbot_server.models.caching.backend import MemoryBackend
from moltbot_server.models.engine import NOBODY, Asker, Finished, Generation, Listener
from moltbot_server.models.engines.scripted import ScriptedEngine
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
    TurnInput,
    Usage,
)

COLD = GenerationOptions(temperature=0.0)
DONE = Finished(finish_reason=FinishReason.STOP, usage=Usage(input_tokens=7, output_tokens=2), queue=0.5)


class Ear:
    """A listener that remembers what it heard."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.end: Finished | Exception | None = None

    @property
    def text(self) -> str:
        """The text that is to be seen in the end."""
        text = ""
        for what in self.heard:
            text = what.text if isinstance(what, Reset) else text + what if isinstance(what, str) else text
        return text

    def queued(self, position: int) -> None:
        self.heard.append(position)

    def wrote(self, text: str, tokens: int) -> None:
        self.heard.append(text)

    def thought(self, text: str) -> None:
        self.heard.append(("thought", text))

    def noted(self, what: Routed | Notice | Reset) -> None:
        self.heard.append(what)

    def ended(self, end: Finished | Exception) -> None:
        assert self.end is None, "the end was told twice"
        self.end = end


class Pen(ScriptedEngine):
    """An engine whose answers the test writes, one piece after the other."""

    type = "llama"
    greedy = True
    refusal: Exception | None = None

    def __init__(self) -> None:
        super().__init__()
        self.listeners: list[Listener] = []
        self.stopped = 0

    def begin(
        self, messages: Sequence[Message], options: GenerationOptions, listener: Listener, asker: Asker = NOBODY
    ) -> Generation:
        """Take note of who listens."""
        if self.refusal is not None:
            raise self.refusal
        self.listeners.append(listener)
        return self

    def stop(self) -> None:
        """Take note of a stop."""
        self.stopped += 1

    def write(self, *pieces: str, end: Finished | Exception | None = DONE) -> None:
        """Write the answer that was asked for last."""
        for piece in pieces:
            self.listeners[-1].wrote(piece, 1)
        if end is not None:
            self.listeners[-1].ended(end)


class Route(Pen):
    """A route that the test plays."""

    type = "route"
    greedy = False
    is_route = True


class Desk:
    """A cache, an engine, and short ways to ask."""

    def __init__(self, engine: Pen | None = None, **cache: Any) -> None:
        self.now = 1000.0
        self.engine = engine or Pen()
        self.backend = MemoryBackend(ttl=60.0, max_bytes=1 << 20, clock=lambda: self.now)
        self.cache = AnswerCache(self.backend, ttl=60.0, max_bytes=1 << 20, **cache)

    def ask(
        self,
        text: str = "hello",
        *,
        ear: Ear | None = None,
        options: GenerationOptions = COLD,
        workspace: str = "w",
        messages: Sequence[Message] | None = None,
        engine: Pen | None = None,
        asker: Asker = NOBODY,
    ) -> tuple[Ear, Generation]:
        ear = ear or Ear()
        read = [said(text)] if messages is None else messages
        turn = TurnInput(parts=read[-1].parts, options=options)
        return ear, self.cache.begin(engine or self.engine, read, turn, workspace, ear, asker)

    @property
    def counts(self) -> tuple[int, int, int]:
        counts = self.cache.counts
        return counts.hits, counts.misses, counts.joined


def said(text: str, role: Role = Role.USER, **fields: Any) -> Message:
    return Message(role=role, parts=(TextPart(text=text),), **fields)


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


class TestSharedAnswers:
    """What others are asking now."""

    def test_a_thousand_identical_questions_at_once_are_one_call(self) -> None:
        desk = Desk()
        asked = [desk.ask()[0] for _ in range(500)]
        desk.engine.write("He", end=None)
        asked += [desk.ask()[0] for _ in range(500)]
        desk.engine.write("llo")

        assert len(desk.engine.listeners) == 1
        assert {ear.text for ear in asked} == {"Hello"}
        assert desk.counts == (0, 1, 999)
        assert desk.cache.under_way == 0

    def test_one_of_them_pays_and_the_others_are_told_that_nothing_was_asked(self) -> None:
        desk = Desk()
        asked = [desk.ask()[0] for _ in range(3)]
        attempts = (Attempt(model="m", outcome="ANSWERED"),)
        desk.engine.write("one", end=msgspec.structs.replace(DONE, attempts=attempts))

        ends = [ear.end for ear in asked]
        assert [isinstance(end, Finished) and (end.cached, len(end.attempts)) for end in ends] == [
            (False, 1),
            (True, 0),
            (True, 0),
        ]

    def test_who_joins_late_hears_at_once_what_was_written(self) -> None:
        desk = Desk()
        desk.ask()
        desk.engine.listeners[-1].queued(3)
        waiting, _ = desk.ask()
        desk.engine.listeners[-1].thought("h")
        desk.engine.listeners[-1].thought("m")
        thinking, _ = desk.ask()
        desk.engine.write("a", "b", end=None)
        reading, _ = desk.ask()

        assert waiting.heard == [3, ("thought", "h"), ("thought", "m"), "a", "b"]
        assert thinking.heard == [("thought", "hm"), "a", "b"]
        assert reading.heard == [("thought", "hm"), "ab"]

    def test_who_stops_leaves_the_others_alone_and_the_last_one_stops_the_engine(self) -> None:
        desk = Desk()
        asked = [desk.ask() for _ in range(3)]
        desk.engine.write("a", end=None)
        asked[0][1].stop()
        asked[0][1].stop()
        desk.engine.write("b", end=None)
        asked[2][1].stop()
        assert desk.engine.stopped == 0
        desk.engine.write("c", end=None)
        asked[1][1].stop()

        assert [ear.text for ear, _ in asked] == ["a", "abc", "ab"]
        assert [ear.end for ear, _ in asked] == [None, None, None]
        assert desk.engine.stopped == 1
        assert desk.cache.under_way == 0

    def test_the_answer_goes_on_when_the_one_who_asked_first_leaves(self) -> None:
        desk = Desk()
        _, first = desk.ask()
        second, _ = desk.ask()
        first.stop()
        desk.engine.write("one")

        assert second.text == "one"
        assert isinstance(second.end, Finished)
        assert not second.end.cached
        assert desk.ask()[0].text == "one"

    def test_a_failure_is_told_to_all_and_the_next_one_asks_anew(self) -> None:
        desk = Desk()
        asked = [desk.ask()[0] for _ in range(3)]
        problem = ModelUnavailable("gone")
        desk.engine.write("par", end=problem)

        assert [ear.end for ear in asked] == [problem] * 3
        desk.ask()
        assert len(desk.engine.listeners) == 2

    def test_a_refusal_is_raised_and_nobody_waits_for_it(self) -> None:
        desk = Desk()
        desk.engine.refusal = QueueFull("full")
        with pytest.raises(QueueFull):
            desk.ask()

        desk.engine.refusal = None
        desk.ask()
        assert len(desk.engine.listeners) == 1
        assert desk.cache.under_way == 1

    def test_a_listener_that_stops_another_one_silences_it_in_that_moment(self) -> None:
        desk = Desk()
        others: list[Generation] = []

        class Jealous(Ear):
            def wrote(self, text: str, tokens: int) -> None:
                super().wrote(text, tokens)
                others[0].stop()

        desk.ask(ear=Jealous())
        other, generation = desk.ask()
        others.append(generation)
        desk.engine.write("a")

        assert (other.heard, other.end) == ([], None)

    def test_who_asks_again_while_hearing_the_end_is_answered_from_what_is_kept(self) -> None:
        desk = Desk()
        again: list[Ear] = []

        class Eager(Ear):
            def ended(self, end: Finished | Exception) -> None:
                super().ended(end)
                again.append(desk.ask()[0])

        desk.ask(ear=Eager())
        desk.engine.write("one")

        assert [ear.text for ear in again] == ["one"]
        assert len(desk.engine.listeners) == 1
