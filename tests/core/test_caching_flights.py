"""Shared answers: whoever asks what others are asking now joins them."""

from __future__ import annotations

import msgspec
import pytest
from cache_desk import DONE, Desk, Ear
from moltbot_server.errors import ModelUnavailable, QueueFull
from moltbot_server.models.engine import Finished, Generation
from moltbot_server.turns import Attempt


def test_a_thousand_identical_questions_at_once_are_one_call() -> None:
    desk = Desk()
    asked = [desk.ask()[0] for _ in range(500)]
    desk.engine.write("He", end=None)
    asked += [desk.ask()[0] for _ in range(500)]
    desk.engine.write("llo")

    assert len(desk.engine.listeners) == 1
    assert {ear.text for ear in asked} == {"Hello"}
    assert desk.counts == (0, 1, 999)
    assert desk.cache.under_way == 0


def test_one_of_them_pays_and_the_others_are_told_that_nothing_was_asked() -> None:
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


def test_who_joins_late_hears_at_once_what_was_written() -> None:
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


def test_who_stops_leaves_the_others_alone_and_the_last_one_stops_the_engine() -> None:
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


def test_the_answer_goes_on_when_the_one_who_asked_first_leaves() -> None:
    desk = Desk()
    _, first = desk.ask()
    second, _ = desk.ask()
    first.stop()
    desk.engine.write("one")

    assert second.text == "one"
    assert isinstance(second.end, Finished)
    assert not second.end.cached
    assert desk.ask()[0].text == "one"


def test_a_failure_is_told_to_all_and_the_next_one_asks_anew() -> None:
    desk = Desk()
    asked = [desk.ask()[0] for _ in range(3)]
    problem = ModelUnavailable("gone")
    desk.engine.write("par", end=problem)

    assert [ear.end for ear in asked] == [problem] * 3
    desk.ask()
    assert len(desk.engine.listeners) == 2


def test_a_refusal_is_raised_and_nobody_waits_for_it() -> None:
    desk = Desk()
    desk.engine.refusal = QueueFull("full")
    with pytest.raises(QueueFull):
        desk.ask()

    desk.engine.refusal = None
    desk.ask()
    assert len(desk.engine.listeners) == 1
    assert desk.cache.under_way == 1


def test_a_listener_that_stops_another_one_silences_it_in_that_moment() -> None:
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


def test_who_asks_again_while_hearing_the_end_is_answered_from_what_is_kept() -> None:
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
