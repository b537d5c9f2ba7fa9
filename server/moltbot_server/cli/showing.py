"""An answer as text while it is written: its words for everybody, what is told about them for people at a terminal."""

from __future__ import annotations

import sys

from moltbot.v1 import chat_pb2

from moltbot_server.cli.terminal import dim, harmless


class Shown:
    """Writes an answer to the standard output as its events come.

    At a terminal thoughts, waits and switches of the model appear dimly beside it, and nothing in them can command the
    terminal. A file or a pipe gets the answer's own text, as it is.
    """

    def __init__(self) -> None:
        self._screen = sys.stdout.isatty()
        self._text = ""
        self._ends_line = True
        self._thinks = False

    def show(self, event: chat_pb2.Event) -> None:
        """Write what an event adds."""
        match event.WhichOneof("kind"):
            case "text_delta":
                self._say(event.text_delta.text)
            case "reasoning_delta":
                self._think(event.reasoning_delta.text)
            case "reset":
                self._begin_anew(event.reset)
            case "notice":
                self._remark(notice_text(event.notice))
            case "queued" if event.queued.position > 1:
                self._remark(f"{event.queued.position} are ahead")

    def end(self) -> None:
        """End the last line."""
        if not self._ends_line:
            self._write("\n")

    def _say(self, text: str) -> None:
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
        if reset.text.startswith(self._text):
            self._say(reset.text[len(self._text) :])
            return
        if not self._text.strip():  # blanks before an answer are as good as nothing
            self._text = ""
            self._say(reset.text)
            return
        self._remark("the answer begins anew")
        if not self._screen:
            self.end()
            reason = f": {reset.reason}" if reset.reason else ""
            print(f"moltbot: what was written so far is void, the answer begins anew{reason}", file=sys.stderr)
        self._text = ""
        self._say(reset.text)

    def _remark(self, text: str) -> None:
        if self._screen:
            self.end()
            self._write(dim(f"[{harmless(text)}]") + "\n")

    def _write(self, text: str, *, ends_line: bool | None = None) -> None:
        if text:
            print(text, end="", flush=True)
            self._ends_line = text.endswith("\n") if ends_line is None else ends_line


def notice_text(notice: chat_pb2.Notice) -> str:
    """Return what a notice says, for people."""
    before, after = (name.removeprefix("models/") for name in (getattr(notice, "from"), notice.to))
    if before and after:
        return f"switched from {before} to {after}" + (f": {notice.reason}" if notice.reason else "")
    return notice.reason or notice.code
