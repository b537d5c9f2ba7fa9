"""Whose turns are refused without a look at them, with a clock of the tests."""

from __future__ import annotations

from moltbot_server.floods import Floods


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def flooded(clock: Clock, refusals: int = 150) -> Floods:
    floods = Floods(clock)
    for _ in range(refusals):
        floods.refused("loud")
    return floods


def looks(floods: Floods, workspace: str, turns: int = 160) -> int:
    """Return how many of so many turns are looked at."""
    return sum(not floods.unread(workspace) for _ in range(turns))


def test_of_a_workspace_that_floods_one_turn_in_sixteen_is_looked_at() -> None:
    floods = flooded(Clock())
    assert looks(floods, "loud") == 10
    assert looks(floods, "quiet") == 160


def test_some_refusals_are_no_flood() -> None:
    assert looks(flooded(Clock(), refusals=99), "loud") == 160


def test_a_flood_is_over_when_nothing_was_refused_for_a_while() -> None:
    clock = Clock()
    floods = flooded(clock)
    clock.now += 0.9
    assert floods.unread("loud")
    clock.now += 0.2
    assert looks(floods, "loud") == 160


def test_a_flood_that_goes_on_is_one_in_the_next_window_too() -> None:
    clock = Clock()
    floods = flooded(clock)
    clock.now += 0.6
    floods.refused("loud")
    assert floods.unread("loud")


def test_who_asks_for_another_model_too_is_looked_at_again() -> None:
    floods = flooded(Clock())
    floods.over("loud")
    floods.over("quiet")
    assert looks(floods, "loud") == 160


def test_the_memory_of_who_floods_is_bounded() -> None:
    clock = Clock()
    floods = flooded(clock)
    for index in range(5000):
        floods.refused(f"w{index}")
    assert looks(floods, "loud") == 160
