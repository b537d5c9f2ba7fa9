"""What a measurement counts does not depend on where its window cuts the answers."""

from __future__ import annotations

import threading

import pytest
from moltbot_server.models.meter import Answer, Window, counted, spread


@pytest.mark.parametrize("begin", [0.0, 0.1, 0.4, 0.75, 0.99])
@pytest.mark.parametrize("length", [1.0, 2.3, 7.0])
def test_a_steady_load_counts_the_same_wherever_the_window_lies(begin: float, length: float) -> None:
    # Two streams of answers of 10 tokens, one a second, half a second apart.
    answers = [Answer(at / 2, at / 2 + 0.2, at / 2 + 1, 10) for at in range(-4, 40)]

    assert counted(answers, begin, begin + length)["tokens_per_second"] == 20.0


def test_the_times_are_those_of_the_answers_asked_for_in_the_window() -> None:
    answers = [Answer(0.0, 0.9, 1.0, 1), Answer(1.0, 1.1, 1.4, 1), Answer(1.4, 1.6, 2.4, 1), Answer(9.0, 9.9, 10.0, 1)]

    result = counted(answers, 1.0, 2.0)

    assert result["answers"] == 2
    assert result["first_token_ms"] == {"p50": 200.0, "p99": 200.0}
    assert result["whole_ms"] == {"p50": 1000.0, "p99": 1000.0}


def test_answers_that_take_longer_than_the_window_stand_for_those_asked_for_in_it() -> None:
    result = counted([Answer(0.0, 1.0, 10.0, 100)], 2.0, 3.0)

    assert result == {
        "tokens_per_second": 10.0,
        "answers": 1,
        "first_token_ms": {"p50": 1000.0, "p99": 1000.0},
        "whole_ms": {"p50": 10000.0, "p99": 10000.0},
    }


def test_without_times_there_is_no_spread() -> None:
    assert spread([]) == {}


def test_a_window_opens_when_every_worker_has_answered_and_is_over_when_all_reach_beyond_it() -> None:
    told: list[str] = []
    window = Window(2, seconds=1.0, over=lambda: told.append("over"))
    began = window._began

    def answer(worker: int, asked: float, ended: float) -> bool:
        window.ended(worker, Answer(began + asked, began + asked, began + ended, 4))
        return window.over

    assert not answer(0, 0.0, 0.5)
    assert window.begin == float("inf")
    assert not answer(1, 0.0, 1.0)
    assert (window.begin - began, window.end - began) == (pytest.approx(1.0), pytest.approx(2.0))
    assert not answer(0, 0.5, 2.5)
    assert not answer(1, 1.0, 1.9)
    assert answer(1, 1.9, 2.9)
    assert told == ["over"]
    # 2 of 4 tokens of the first, 4 of the second, and a tenth of the last.
    assert window.counted()["tokens_per_second"] == pytest.approx(2 + 4 + 0.4, abs=0.05)


def test_a_window_does_not_open_before_the_load_is_warm() -> None:
    window = Window(1, seconds=1.0, warm=5.0)
    began = window._began

    window.ended(0, Answer(began, began, began + 1.0, 1))
    assert window.begin == float("inf")
    window.ended(0, Answer(began + 1.0, began + 1.0, began + 6.0, 1))
    assert window.begin == began + 6.0


def test_a_window_that_need_not_be_warm_is_open_at_once() -> None:
    window = Window(1, seconds=1.0, warm=None)

    window.ended(0, Answer(window.begin, window.begin, window.begin + 2.0, 8))

    assert window.over
    assert window.counted()["tokens_per_second"] == 4.0


def test_threads_may_share_a_window() -> None:
    over = threading.Event()
    window = Window(8, seconds=0.05, over=over.set)

    def work(worker: int) -> None:
        at = window._began
        while not window.over:
            window.ended(worker, Answer(at, at, at + 0.01, 1))
            at += 0.01

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)

    assert over.is_set()
    assert window.counted()["tokens_per_second"] == pytest.approx(800, rel=0.15)
