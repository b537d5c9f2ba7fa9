"""How long streams were without a word, as runs with faults tell it."""

from __future__ import annotations

import pytest
from fault_history import Closed, Entry, Fault, Opened, Told
from fault_load import pauses


def opened(at: float, stream: int, follower: str = "a") -> Opened:
    return Opened(at=at, stream=stream, follower=follower, request=follower, session=follower)


def told(at: float, stream: int) -> Told:
    return Told(at=at, stream=stream, sequence=1, kind="text_delta", text="x")


def cut(at: float, stream: int) -> Closed:
    return Closed(at=at, stream=stream, code="UNAVAILABLE")


def fault(at: float, what: str, node: str = "n1") -> Fault:
    return Fault(at=at, what=what, node=node)


def found(history: list[Entry]) -> tuple[list[float], list[float]]:
    return pauses(history, lambda what: what == "kill")


def test_a_pause_is_from_the_kill_to_the_next_word_and_one_stream_that_ends_well_has_none() -> None:
    history = [opened(0, 1), opened(0, 2, "b"), fault(1, "kill"), cut(1.1, 1), opened(1.5, 3), told(4, 3)]
    assert found([*history, Closed(at=5, stream=2)]) == ([3.0], [])


def test_it_counts_from_the_kill_of_the_core_that_was_to_go_on() -> None:
    history = [opened(0, 1), fault(1, "kill"), cut(1.1, 1), fault(3, "kill", "n2"), told(7, 1)]
    assert found(history) == ([4.0], [])


@pytest.mark.parametrize("stops_first", [True, False])
def test_one_during_which_a_core_stood_still_comes_apart(stops_first: bool) -> None:
    kill: list[Entry] = [fault(1, "kill"), cut(1.1, 1)]
    stop: list[Entry] = [fault(1, "stop", "n2")]
    both = stop + kill if stops_first else kill + stop
    history = [opened(0, 1), *both, fault(3, "go_on", "n2"), told(7, 1), cut(7.5, 1), told(8, 1)]
    assert found(history) == ([7.0], [6.0])


def test_one_that_began_when_all_went_on_again_does_not() -> None:
    history = [opened(0, 1), fault(1, "stop", "n2"), fault(2, "go_on", "n2"), fault(3, "kill"), cut(3.1, 1), told(5, 1)]
    assert found(history) == ([2.0], [])


def test_a_core_that_is_killed_while_it_stands_still_stands_still_no_more() -> None:
    history = [opened(0, 1), fault(1, "stop"), fault(2, "kill"), cut(2.1, 1), told(5, 1)]
    assert found(history) == ([3.0], [])
