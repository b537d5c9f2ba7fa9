"""An answer as text while it is written: its words for everybody, what is told about them for people at a terminal."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncGenerator, Callable

from moltbot.v1 import chat_pb2

from moltbot_server.cli.terminal import dim, harmless

_SILENT = 2.0  # seconds; a core that was killed is most often there again before anybody wonders

_ATTENTION = 3.0  # seconds without an event after which it is asked why


class Shown:
    """Writes an answer to the standard output as its events come.

    At a terminal thoughts, waits and notices, such as a switch of the model, appear dimly beside it, and nothing in
    them can command the terminal. A file or a pipe gets the answer's own text; notices go to the standard error.
    """

    def __init__(self, away: Callable[[], str] = lambda: "") -> None:
        """`away` tells, when an answer does not come, what the core cannot do with its store; empty when it can all."""
        self._away = away
        self._screen = sys.stdout.isatty()
        self._text = ""
        self._again: str | None = None  # what an answer begun anew has said, as long as that is shown already
        self._void = ""  # why it was begun anew
        self._ends_line = True
        self._thinks = False
        self._away_since: float | None = None
        self._told_away = False
        self._begun = False
        self._is_next = False

    def show(self, event: chat_pb2.Event) -> None:
        """Write what an event adds."""
        self._away_since, self._told_away, self._begun = None, False, True
        self._is_next = event.HasField("queued") and event.queued.position == 1
        match event.WhichOneof("kind"):
            case "text_delta":
                self._say(event.text_delta.text)
            case "reasoning_delta":
                self._think(event.reasoning_delta.text)
            case "reset":
                self._begin_anew(event.reset)
            case "notice":
                self._notice(notice_text(event.notice))
            case "completed" if self._again is not None:
                self._say(event.completed.text[len(self._again) :])
                if self._again is not None:
                    self._take_back(self._again)
            case "queued" if event.queued.position > 1:
                self._remark(f"{event.queued.position} are ahead")

    def waits(self, _kind: str) -> None:
        """Say that the core is away and waited for, once and not before that takes a while. Clients call this."""
        now = time.monotonic()
        self._away_since = self._away_since or now
        if now - self._away_since < _SILENT or self._told_away:
            return
        self._told_away = True
        problem = self._away()
        text = f"the core cannot {problem}" if problem else "the core does not answer"
        text += "; waiting for it …"
        self._aside(text)

    def silent(self) -> None:
        """Say, once, why no event comes, if the core's store is away or others are first. May run on another thread."""
        if self._told_away:
            return
        if problem := self._away():
            self._told_away = True
            text = (
                f"the core cannot {problem}; {'the answer goes on when it can' if self._begun else 'waiting for it'} …"
            )
            self._aside(text)
        elif self._is_next:
            self._told_away = True
            self._remark("one is ahead; waiting for its end")

    def end(self) -> None:
        """End the last line."""
        if not self._ends_line:
            self._write("\n")

    def _say(self, text: str) -> None:
        if self._again is not None:
            again = self._again + text
            if again != self._text and self._text.startswith(again):
                self._again = again
                return
            if not again.startswith(self._text):
                self._take_back(again)
                return
            text, self._again = again[len(self._text) :], None
        if self._thinks and text:
            self._thinks = False
            self.end()
        self._text += text
        self._write(harmless(text) if self._screen else text)

    def _think(self, text: str) -> None:
        if self._screen:
            self._thinks = True
            self._write(dim(harmless(text)), ends_line=text.endswith("\n"))

    def _begin_anew(self, reset: chat_pb2.Reset) -> None:
        """Go on with an answer that was begun anew; only where it says something else is anything said twice."""
        if self._text.strip():
            self._again, self._void = "", reset.reason
        else:  # blanks before an answer are as good as nothing
            self._text = ""
        self._say(reset.text)

    def _take_back(self, text: str) -> None:
        self._remark("the answer begins anew")
        if not self._screen:
            self.end()
            reason = f": {self._void}" if self._void else ""
            print(f"moltbot: what was written so far is void, the answer begins anew{reason}", file=sys.stderr)
        self._text, self._again = "", None
        self._say(text)

    def _notice(self, text: str) -> None:
        if self._screen:
            self._remark(text)
            return
        line = harmless(f"moltbot: {' '.join(text.split())}")
        print(dim(line) if sys.stderr.isatty() else line, file=sys.stderr, flush=True)

    def _aside(self, text: str) -> None:
        if self._screen:
            self._remark(text)
        else:
            print(f"moltbot: {text}", file=sys.stderr, flush=True)

    def _remark(self, text: str) -> None:
        if self._screen:
            self.end()
            self._write(dim(f"[{harmless(text)}]") + "\n")

    def _write(self, text: str, *, ends_line: bool | None = None) -> None:
        if text:
            print(text, end="", flush=True)
            self._ends_line = text.endswith("\n") if ends_line is None else ends_line


async def attended(events: AsyncGenerator[chat_pb2.Event, None], shown: Shown) -> AsyncGenerator[chat_pb2.Event, None]:
    """Yield events; where none comes for a while, what is wrong with the core's store is told meanwhile."""
    while True:
        coming = asyncio.ensure_future(anext(events, None))
        try:
            while not (await asyncio.wait((coming,), timeout=_ATTENTION))[0]:
                await asyncio.to_thread(shown.silent)
        finally:
            if not coming.done():
                coming.cancel()
                await asyncio.wait((coming,))
        if (event := coming.result()) is None:
            return
        yield event


def notice_text(notice: chat_pb2.Notice) -> str:
    """Return what a notice says, for people."""
    before, after = (name.removeprefix("models/") for name in (getattr(notice, "from"), notice.to))
    if before and after:
        return f"switched from {before} to {after}" + (f": {notice.reason}" if notice.reason else "")
    return notice.reason or notice.code
