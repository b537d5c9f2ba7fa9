"""One answer on its way from tokens to text, on the event loop."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Protocol

from moltbot_server.errors import DeadlineExceeded, ModelUnavailable
from moltbot_server.models.detokenizer import Detokenizer
from moltbot_server.models.engine import Finished, Listener
from moltbot_server.models.engines.local.rows import EXPIRED, FULL, GONE, STOPPED, Row, unread, untold
from moltbot_server.models.stops import StopTexts
from moltbot_server.turns import FinishReason, Usage

_REASONS = {STOPPED: FinishReason.STOP, FULL: FinishReason.LENGTH}


class Home(Protocol):
    """Where a row belongs."""

    @property
    def trouble(self) -> str:
        """What is wrong with the model; empty for nothing."""

    def let_go(self, row: Row) -> None:
        """Forget a row that nobody reads any more."""


class Writing:
    """Reads a row and tells the listener; the `Generation` that the engine hands out."""

    __slots__ = ("_begun", "_home", "_listener", "_over", "_row", "_silent", "_stops", "_text", "_used", "_watchful")

    def __init__(
        self, home: Home, row: Row, text: Detokenizer, stops: Sequence[str], listener: Listener, *, begun: int = 0
    ) -> None:
        """`begun`: how many tokens at the end of the row's prompt are the answer's own."""
        self._home = home
        self._row = row
        self._text = text
        self._stops = StopTexts(stops)
        self._watchful = bool(stops)
        self._listener = listener
        self._used = self._silent = 0
        self._begun = begun
        self._over = False
        row.read = self._read
        row.told = listener.queued

    def stop(self) -> None:
        """Let the row go; the listener hears no more."""
        if not self._over:
            self._over = True
            self._row.read, self._row.told = unread, untold  # no cycle is left behind for the garbage collector
            self._home.let_go(self._row)

    def _read(self, tokens: list[int]) -> None:
        """Take what the model wrote since the last time: token ids, then perhaps what ended the row."""
        if self._over:
            return
        try:
            reason = self._reason(tokens.pop()) if tokens[-1] < 0 else None
            fresh = self._fresh(tokens, last=reason is not None)
        except Exception as problem:
            self.stop()
            self._listener.ended(problem)
            return
        if self._stops.stopped:
            reason = FinishReason.STOP_TEXT
        if fresh:
            silent, self._silent = self._silent, 0
            self._listener.wrote(fresh, silent)
        if reason is not None and not self._over:
            self.stop()
            self._listener.ended(self._finished(reason))

    def _fresh(self, tokens: list[int], *, last: bool) -> str:
        """Return the text that may be shown now: not what could still become a character or a stop text."""
        stops = self._stops
        fresh = ""
        # Several steps are read at once; what was written after a stop text was met is no part of the answer.
        for part in ([token] for token in tokens) if self._watchful else (tokens,):
            self._used += len(part)
            self._silent += len(part)
            fresh += stops.feed(self._text.feed(part))
            if stops.stopped:
                break
        if last and not stops.stopped:
            fresh += stops.feed(self._text.flush())
            if not stops.stopped:
                fresh += stops.flush()
        return fresh

    def _reason(self, end: int) -> FinishReason:
        if end == GONE:
            raise ModelUnavailable(
                self._home.trouble or "The model failed while it wrote this answer; the log says why."
            )
        if end == EXPIRED:
            raise DeadlineExceeded("the deadline passed before the model could begin")
        return _REASONS[end]

    def _finished(self, reason: FinishReason) -> Finished:
        row = self._row
        first = row.first or perf_counter()
        return Finished(
            finish_reason=reason,
            usage=Usage(
                input_tokens=row.asked - self._begun,
                output_tokens=self._used + self._begun,
                cached_input_tokens=row.cached,
            ),
            queue=row.began - row.arrived,
            first_token=first - row.began,
            generation=max(row.last - first, 0.0),
        )
