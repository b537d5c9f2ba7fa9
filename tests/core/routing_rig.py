"""What routes are tested with: a clock that tests move, models that do as they are told, a listener that keeps all."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from moltbot_server.config_models import ModelRoute
from moltbot_server.errors import ModelNotFound, ModelUnavailable, MoltBotError
from moltbot_server.models.catalog import CatalogEntry
from moltbot_server.models.engine import NOBODY, Asker, Capabilities, Embedded, Finished, Listener
from moltbot_server.models.limits import check_options
from moltbot_server.models.routing import Breakers, RouteEngine
from moltbot_server.turns import (
    Attempt,
    FinishReason,
    GenerationOptions,
    Message,
    Notice,
    Part,
    Reset,
    Role,
    Routed,
    TextPart,
    Usage,
)

EVERYTHING = Capabilities(
    context_length=8192,
    sampling=True,
    stop=True,
    seed=True,
    repetition_penalty=True,
    image_input=True,
    tools=True,
    token_counts=True,
)


NOTHING_ASKED = GenerationOptions()


class FakeTimer:
    """A callback that is due."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Have it not happen."""
        self.callback = None


class FakeClock:
    """Virtual time: nothing happens until a test lets it pass, and then all of it in order."""

    def __init__(self, now: float = 1000.0) -> None:
        self._now = now
        self._due: list[tuple[float, int, FakeTimer]] = []
        self._order = itertools.count()

    def time(self) -> float:
        """Return the time now."""
        return self._now

    def call_later(self, delay: float, callback: Callable[[], None]) -> FakeTimer:
        """Call back once, when `delay` seconds have passed."""
        timer = FakeTimer(callback)
        heapq.heappush(self._due, (self._now + delay, next(self._order), timer))
        return timer

    def pass_by(self, seconds: float) -> None:
        """Let time pass."""
        end = self._now + seconds
        while self._due and self._due[0][0] <= end:
            self._now, _, timer = heapq.heappop(self._due)
            if timer.callback is not None:
                timer.callback()
        self._now = end

    @property
    def waiting(self) -> int:
        """How many callbacks are still to come."""
        return sum(timer.callback is not None for _, _, timer in self._due)


@dataclass(frozen=True, kw_only=True)
class Does:
    """What a model does when it is asked: it thinks and says `pieces`, from `first` on and then each `pace` seconds.

    Then it ends well, or with `error`, or (`hangs`) not at all. `raises`: it refuses at once.
    """

    pieces: tuple[str, ...] = ("Hello", " there")
    thoughts: tuple[str, ...] = ()
    first: float = 0.05
    pace: float = 0.01
    error: Exception | None = None
    hangs: bool = False
    raises: Exception | None = None
    finish_reason: FinishReason = FinishReason.STOP
    attachments: tuple[Part, ...] = ()
    queue_position: int = 0


def fails(error: Exception | None = None, *, first: float = 0.05, after: int = 0) -> Does:
    """Return a behaviour: breaks `after` so many pieces."""
    pieces = ("Hello", " there")[:after]
    return Does(pieces=pieces, first=first, error=error or ModelUnavailable("The provider answered 500."))


HANGS = Does(pieces=(), hangs=True)
ANSWERS = Does()


@dataclass
class Call:
    """One time that a model was asked."""

    at: float
    messages: Sequence[Message]
    options: GenerationOptions
    asker: Asker
    stopped_at: float | None = None


class Model:
    """An engine that does as it is told: `does` for all calls, or what `draws` returns for each."""

    type = "scripted"
    memory_bytes = 0
    is_route = False
    is_free = True
    overhead = 0
    numbers: ClassVar[Mapping[str, float]] = {}

    def __init__(
        self,
        id: str,
        clock: FakeClock,
        does: Does = ANSWERS,
        *,
        capabilities: Capabilities = EVERYTHING,
        draws: Callable[[], Does] | None = None,
    ) -> None:
        self.id = self.display_name = id
        self.does = does
        self.draws = draws
        self.capabilities = capabilities
        self.healthy = True
        self.parallel = 4
        self.rest = 0.0
        self.refusal: MoltBotError | None = None
        self.calls: list[Call] = []
        self.asked = 0
        self.keeps_calls = True
        self._clock = clock

    async def start(self) -> None:
        """Do nothing."""

    async def close(self) -> None:
        """Do nothing."""

    def check(self, options: GenerationOptions) -> None:
        """Refuse what the capabilities leave out."""
        check_options(options, self.capabilities)

    def count(self, message: Message) -> int:
        """Count a token for each character."""
        return len(message.text)

    async def tokens(self, content: str | Sequence[Message]) -> int:
        """Count a token for each character."""
        return len(content) if isinstance(content, str) else sum(map(self.count, content))

    async def embed(self, texts: Sequence[str]) -> Embedded:
        """Refuse."""
        raise NotImplementedError

    def admit(self, asker: Asker) -> None:
        """Refuse when told to."""
        if self.refusal is not None:
            raise self.refusal

    def begin(
        self, messages: Sequence[Message], options: GenerationOptions, listener: Listener, asker: Asker = NOBODY
    ) -> Playing:
        """Do what was told."""
        self.asked += 1
        call = Call(self._clock.time(), messages, options, asker)
        if self.keeps_calls:
            self.calls.append(call)
        does = self.does if self.draws is None else self.draws()
        if does.raises is not None:
            raise does.raises
        return Playing(does, listener, self._clock, call)


class Playing:
    """A behaviour on its way. With a `first` of 0 all of it happens before `begin` returns."""

    def __init__(self, does: Does, listener: Listener, clock: FakeClock, call: Call) -> None:
        self._does = does
        self._listener = listener
        self._clock = clock
        self._call = call
        self._steps = iter([*(("thought", text) for text in does.thoughts), *(("text", text) for text in does.pieces)])
        self._stopped = False
        if does.queue_position:
            listener.queued(does.queue_position)
        if does.first:
            clock.call_later(does.first, self._step)
        else:
            self._step()

    def stop(self) -> None:
        """Fall silent."""
        if not self._stopped:
            self._stopped = True
            self._call.stopped_at = self._clock.time()

    def _step(self) -> None:
        while not self._stopped:
            step = next(self._steps, None)
            if step is None:
                self._end()
                return
            kind, text = step
            if kind == "thought":
                self._listener.thought(text)
            else:
                self._listener.wrote(text, 1)
            if self._does.first:
                self._clock.call_later(self._does.pace, self._step)
                return

    def _end(self) -> None:
        does = self._does
        if does.hangs:
            return
        self._stopped = True
        if does.error is not None:
            self._listener.ended(does.error)
            return
        usage = Usage(input_tokens=7, output_tokens=len(does.pieces))
        end = Finished(finish_reason=does.finish_reason, usage=usage, attachments=does.attachments)
        self._listener.ended(end)


Heard = str | Routed | Notice | Reset | Finished | Exception


@dataclass
class Ear:
    """A listener that keeps what it hears; thoughts and places in the queue are marked by a first character."""

    heard: list[Heard] = field(default_factory=list)
    text: str = ""
    first_text_at: float | None = None
    clock: FakeClock | None = None

    def queued(self, position: int) -> None:
        """Keep `#position`."""
        self.heard.append(f"#{position}")

    def wrote(self, text: str, tokens: int) -> None:
        """Keep the text."""
        self.heard.append(text)
        self.text += text
        if self.first_text_at is None and self.clock is not None:
            self.first_text_at = self.clock.time()

    def thought(self, text: str) -> None:
        """Keep `?thought`."""
        self.heard.append(f"?{text}")

    def noted(self, what: Routed | Notice | Reset) -> None:
        """Keep the note."""
        self.heard.append(what)
        if isinstance(what, Reset):
            self.text = what.text

    def ended(self, end: Finished | Exception) -> None:
        """Keep the end."""
        assert not self.is_over, "an answer ends once"
        self.heard.append(end)

    @property
    def is_over(self) -> bool:
        """Whether it has heard an end."""
        return bool(self.heard) and isinstance(self.heard[-1], Finished | Exception)

    @property
    def end(self) -> Finished:
        """The good end."""
        assert isinstance(self.heard[-1], Finished), self.heard
        return self.heard[-1]

    @property
    def error(self) -> MoltBotError:
        """The bad end."""
        assert isinstance(self.heard[-1], MoltBotError), self.heard
        return self.heard[-1]

    @property
    def attempts(self) -> list[tuple[str, str]]:
        """Model and outcome of each attempt that was told with the end."""
        told = self.heard[-1]
        assert isinstance(told, Finished | MoltBotError)
        attempts: tuple[Attempt, ...] = told.attempts
        return [(attempt.model, attempt.outcome) for attempt in attempts]


class Rig:
    """A route `default` over models a, b, c ... and a clock."""

    def __init__(self, *behaviours: Does, breakers: Breakers | None = None, **spec: object) -> None:
        self.clock = FakeClock()
        names = "abcdefgh"[: len(behaviours)]
        self.models = {name: Model(name, self.clock, does) for name, does in zip(names, behaviours, strict=True)}
        self.entries = {name: CatalogEntry(model) for name, model in self.models.items()}
        for entry in self.entries.values():
            entry.loaded()
        self.breakers = Breakers(draw=lambda: 0.5) if breakers is None else breakers
        self.spec = ModelRoute(primary=names[0], fallback=tuple(names[1:]), **spec)  # type: ignore[arg-type]
        self.route = RouteEngine(self.spec, self.find, self.breakers, clock=self.clock)

    def find(self, name: str) -> CatalogEntry:
        """Return the model of that name."""
        if name not in self.entries:
            raise ModelNotFound(f"There is no model {name!r}.")
        return self.entries[name]

    def __getattr__(self, name: str) -> Model:
        try:
            return self.__dict__["models"][name]  # type: ignore[no-any-return]
        except KeyError:
            raise AttributeError(name) from None

    def begin(
        self,
        text: str = "Hi",
        options: GenerationOptions = NOTHING_ASKED,
        *,
        messages: Sequence[Message] | None = None,
        asker: Asker = NOBODY,
    ) -> Ear:
        """Begin a turn, and return who hears of it."""
        ear = Ear(clock=self.clock)
        asked = messages or (said(text),)
        self.generation = self.route.begin(asked, options, ear, asker)
        return ear

    def ask(self, text: str = "Hi", **more: object) -> Ear:
        """Carry a turn out to its end, and let 0.1 s pass after it."""
        ear = self.begin(text, **more)  # type: ignore[arg-type]
        while not ear.is_over:
            assert self.clock.waiting, "nothing will happen any more"
            self.clock.pass_by(0.01)
        self.clock.pass_by(0.1)
        return ear


def said(text: str, role: Role = Role.USER) -> Message:
    """Return a message."""
    return Message(role=role, parts=(TextPart(text=text),))
