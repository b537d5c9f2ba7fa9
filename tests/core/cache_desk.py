"""What tests of kept answers share: a listener that remembers, an engine that the test writes with, ways to ask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moltbot_server.models.caching.answers import AnswerCache
from moltbot_server.models.caching.backend import MemoryBackend
from moltbot_server.models.engine import NOBODY, Asker, Finished, Generation, Listener
from moltbot_server.models.engines.scripted import ScriptedEngine
from moltbot_server.turns import (
    FinishReason,
    GenerationOptions,
    Message,
    Notice,
    Reset,
    Role,
    Routed,
    TextPart,
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
    is_free = False


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
