"""What an engine is: messages in, text out to a listener as it is written, or as a stream of chunks."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from moltbot_server.errors import MoltBotError, Unimplemented
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
    Value,
)


class Capabilities(Value, frozen=True, kw_only=True):
    """What a model can do; never more than was tried. `context_length` counts prompt and answer tokens together.

    `continuation`: it goes on with an answer that is begun. The conversation then ends with what there is of it, in the
    assistant's role; that counts as the answer's in `max_output_tokens` and in the usage, and is not told again.
    """

    context_length: int
    streaming: bool = True
    sampling: bool = False
    stop: bool = False
    seed: bool = False
    repetition_penalty: bool = False
    image_input: bool = False
    audio_input: bool = False
    tools: bool = False
    token_counts: bool = False
    cancellation: bool = False
    generation: bool = True
    embeddings: bool = False
    continuation: bool = False


class Chunk(Value, frozen=True, kw_only=True):
    """A piece of an answer: whole characters, and the tokens that it stands for."""

    text: str
    tokens: int = 1


class Finished(Value, frozen=True, kw_only=True):
    """The end of an answer; always the last item of a stream. Times are in seconds.

    An engine that leaves `usage.input_tokens` at 0 has not counted the prompt; the caller knows what it sent.
    `queue` is the wait for a free worker, `first_token` counts from there, `generation` from the first token to the
    last. `trimmed_messages` are those of the history that an engine left out although the caller did not.
    `attachments` are parts of the answer that are not text, such as tools to be called. `model` is the id of the model
    that answered, where that is not the engine's own; `attempts` are the models that were asked for it, where that is
    worth telling. `cached`: the answer was kept from before.
    """

    finish_reason: FinishReason
    usage: Usage
    queue: float = 0.0
    first_token: float = 0.0
    generation: float = 0.0
    trimmed_messages: int = 0
    attachments: tuple[Part, ...] = ()
    model: str = ""
    attempts: tuple[Attempt, ...] = ()
    cached: bool = False


class Embedded(NamedTuple):
    """The vectors of texts, of length 1 each; the tokens read of all texts; which of them were cut."""

    vectors: Sequence[Sequence[float]]
    tokens: int
    truncated: Sequence[bool]


class Asker(Value, frozen=True, kw_only=True):
    """Who an answer is for, and until when it is of use: what a queue is fair between, and what it need not start.

    `deadline` is on the event loop's clock, None for no hurry. `wanted_by` is when whoever asks hopes to have it: an
    answer that is not begun in good time before is better asked for elsewhere, but is of use later too. To who wants
    the `whole` conversation read, an answer to a part of it is of none.
    """

    workspace: str = ""
    session: str = ""
    deadline: float | None = None
    wanted_by: float | None = None
    whole: bool = False


NOBODY = Asker()


class Listener(Protocol):
    """Who hears an answer as it is written, on the event loop's thread. No method may raise."""

    def queued(self, position: int) -> None:
        """Hear of the place in the queue, 1 for the next to be served, when the answer cannot begin at once."""

    def wrote(self, text: str, tokens: int) -> None:
        """Hear of another piece: whole characters, and the tokens that they stand for."""

    def thought(self, text: str) -> None:
        """Hear more of what the model thinks before it answers; no part of the answer."""

    def noted(self, what: Routed | Notice | Reset) -> None:
        """Hear who answers now, of a switch, or that what was written so far is void."""

    def ended(self, end: Finished | Exception) -> None:
        """Hear of the end, once: a good one, or what broke the answer."""


class Generation(Protocol):
    """An answer being written."""

    def stop(self) -> None:
        """Free the engine within one step; the listener hears no more. Does nothing after the end."""


@runtime_checkable
class NeedsKeys(Protocol):
    """An engine that keys of a provider let in."""

    @property
    def locked_out(self) -> MoltBotError | None:
        """Why it answers nobody although it has keys: each of them is refused. Any thread may ask."""


class Engine(Protocol):
    """One model that answers. All methods belong to the event loop's thread."""

    @property
    def id(self) -> str:
        """The model's resource id, such as `moltbot-demo`."""

    @property
    def display_name(self) -> str:
        """A name for people."""

    @property
    def type(self) -> str:
        """The family or provider."""

    @property
    def capabilities(self) -> Capabilities:
        """What the model can do."""

    @property
    def overhead(self) -> int:
        """How many tokens a prompt takes beside its messages, such as a template's own rules; 0 when that is few."""

    @property
    def memory_bytes(self) -> int:
        """What its weights take in memory, in bytes; 0 when that is not known."""

    @property
    def parallel(self) -> int:
        """How many answers it writes at the same time before more have to wait; 0 when that is not known."""

    @property
    def healthy(self) -> bool:
        """Whether the model can answer: started, not closed, nothing broken for good."""

    @property
    def is_route(self) -> bool:
        """Whether it leaves the answer to one of several models and tells its listener which: `Listener.noted`."""

    @property
    def is_free(self) -> bool:
        """Whether an answer costs nobody money, so that one may be begun that is perhaps not wanted."""

    @property
    def rest(self) -> float:
        """Seconds until it is worth asking again, because whoever serves it said so; 0 for now."""

    async def start(self) -> None:
        """Load the model and prove it with a real generation.

        Raises:
            ModelUnavailable: the model cannot be loaded; the text says what was found and what was expected.
        """

    async def close(self) -> None:
        """Stop what runs and free the model."""

    def check(self, options: GenerationOptions) -> None:
        """Refuse options that the model would not honour.

        Raises:
            UnsupportedOption: the model cannot honour an option.
            InvalidField: an option is out of its range.
        """

    def count(self, message: Message) -> int:
        """Return how many tokens a message takes in a prompt, its role markers included.

        An engine that cannot count here returns the least that it can be, and cuts what is too long by itself.
        """

    async def tokens(self, content: str | Sequence[Message]) -> int:
        """Return how many tokens a text takes by itself, or a conversation with its markers; counted, not guessed."""

    async def embed(self, texts: Sequence[str]) -> Embedded:
        """Turn texts into vectors; what is longer than the model reads loses its end.

        Raises:
            Unimplemented: the model writes answers and does not embed.
            InvalidField: a text has nothing that the model reads.
            QueueFull: too many texts wait already.
            ModelUnavailable: the model cannot answer now.
        """

    @property
    def numbers(self) -> Mapping[str, float]:
        """What the engine counts of itself, for metrics: a name such as `waiting`, and how many now."""

    def admit(self, asker: Asker) -> None:
        """Refuse what could not begin before its deadline, before anything is kept of it. Costs next to nothing.

        Raises:
            QueueFull: too much waits already; `retry_after` says when there is room again.
            ModelUnavailable: the model cannot answer now.
        """

    def begin(
        self, messages: Sequence[Message], options: GenerationOptions, listener: Listener, asker: Asker = NOBODY
    ) -> Generation:
        """Begin the answer to a conversation that fits the context, or go on with the one that it ends with.

        The listener may hear of it, to its end even, before this returns.

        Raises:
            InvalidField: an answer that is begun leaves nothing to add.
            QueueFull: too many generations wait already.
            ModelUnavailable: the model cannot answer now.
        """


def no_embeddings(engine: Engine) -> Unimplemented:
    """Return the refusal of `Engine.embed` by a model that only writes."""
    return Unimplemented(f"The model {engine.id} writes answers and does not embed; load an encoder for that.")


def counted(engine: Engine, content: str | Sequence[Message]) -> int:
    """Return what `Engine.tokens` does, by `Engine.count`, for engines that count here."""
    return counted_by(engine.count, content)


def counted_by(count: Callable[[Message], int], content: str | Sequence[Message]) -> int:
    """Return how many tokens a text or a conversation takes, by what counts a message with its markers."""
    if not isinstance(content, str):
        return sum(map(count, content))
    said, silent = (Message(role=Role.USER, parts=(TextPart(text=text),)) for text in (content, ""))
    return count(said) - count(silent)


async def stream(
    engine: Engine, messages: Sequence[Message], options: GenerationOptions, asker: Asker = NOBODY
) -> AsyncGenerator[Chunk | Finished, None]:
    """Yield an answer in chunks, then its end. Closing the stream stops the answer.

    Raises:
        MoltBotError: as `Engine.begin` does, or because the answer broke.
    """
    inbox = _Inbox()
    generation = engine.begin(messages, options, inbox, asker)
    try:
        while True:
            item = await inbox.take()
            if isinstance(item, Exception):
                raise item
            yield item
            if isinstance(item, Finished):
                return
    finally:
        generation.stop()


class _Inbox:
    """A listener that keeps what it hears until it is asked."""

    def __init__(self) -> None:
        self._heard: deque[Chunk | Finished | Exception] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def queued(self, position: int) -> None:
        pass  # a stream of chunks says nothing of the wait

    def thought(self, text: str) -> None:
        pass  # nor of thoughts

    def noted(self, what: Routed | Notice | Reset) -> None:
        pass  # nor of who answers

    def wrote(self, text: str, tokens: int) -> None:
        self._put(Chunk(text=text, tokens=tokens))

    def ended(self, end: Finished | Exception) -> None:
        self._put(end)

    def _put(self, item: Chunk | Finished | Exception) -> None:
        self._heard.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> Chunk | Finished | Exception:
        while not self._heard:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._heard.popleft()
