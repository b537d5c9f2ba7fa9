"""Counts the tokens of answers that overlap a window of time, opened once the load is steady."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """One answer, or one batch of them: when it was asked for, when its first token was there, when it was whole.

    Times are those of `time.perf_counter`, in seconds.
    """

    asked: float
    first: float
    ended: float
    tokens: int


class Window:
    """The time that counts, for a fixed number of workers that each have one answer after another written.

    It opens when every worker has had an answer and the load has run for `warm` seconds, or at once where that is None,
    is open for `seconds`, and is over when every worker's answer that reached beyond it is whole: until then the load
    stays what it was. May be used by several threads.
    """

    def __init__(
        self, workers: int, *, seconds: float, warm: float | None = 0.0, over: Callable[[], None] | None = None
    ) -> None:
        self._seconds, self._warm = seconds, warm or 0.0
        self._latest = [0.0] * workers
        self._answers: list[Answer] = []
        self._began = time.perf_counter()
        self._lock = threading.Lock()
        self._tell = over
        self.begin = self.end = float("inf")
        self.over = False
        if warm is None:
            self.begin, self.end = self._began, self._began + seconds

    def ended(self, worker: int, answer: Answer) -> None:
        """Take a worker's answer in."""
        with self._lock:
            self._answers.append(answer)
            latest = self._latest
            latest[worker] = answer.ended
            if min(latest) >= self.end and not self.over:
                self.over = True
                if self._tell is not None:
                    self._tell()
            elif self.begin > answer.ended and all(latest) and answer.ended >= self._began + self._warm:
                self.begin, self.end = answer.ended, answer.ended + self._seconds

    def counted(self) -> dict[str, Any]:
        """Return what was counted in the window."""
        return counted(self._answers, self.begin, self.end)


def counted(answers: list[Answer], begin: float, end: float) -> dict[str, Any]:
    """Return tokens a second within a window, and the times of the answers that were asked for in it.

    Where none was, because they take longer than the window, those under way in it stand for them.

    An answer that reaches beyond the window counts with the share of its time that lies within, as if its tokens came
    evenly. So where a fixed number is always under way, the figure does not depend on where the window happens to cut
    the batches. Every answer that overlaps the window must be there, whole.
    """
    tokens, under_way = 0.0, []
    for answer in answers:
        within = min(answer.ended, end) - max(answer.asked, begin)
        if within > 0:
            tokens += answer.tokens * within / (answer.ended - answer.asked)
            under_way.append(answer)
    asked = [answer for answer in under_way if answer.asked >= begin] or under_way
    return {
        "tokens_per_second": round(tokens / (end - begin), 1),
        "answers": len(asked),
        "first_token_ms": spread([answer.first - answer.asked for answer in asked]),
        "whole_ms": spread([answer.ended - answer.asked for answer in asked]),
    }


def spread(seconds: list[float]) -> dict[str, float]:
    """Return the median and the 99th percentile of times in milliseconds; nothing of none."""
    if not seconds:
        return {}
    ordered = sorted(seconds)

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1000, 2)

    return {"p50": at(0.5), "p99": at(0.99)}
