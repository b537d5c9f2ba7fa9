"""What an engine is: messages in, chunks of text out, stopped by closing the stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from moltbot_server.turns import FinishReason, GenerationOptions, Message, Usage, Value


class Capabilities(Value, frozen=True, kw_only=True):
    """What a model can do; never more than was tried. `context_length` counts prompt and answer tokens together."""

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


class Chunk(Value, frozen=True, kw_only=True):
    """A piece of an answer: whole characters, and the tokens that it stands for."""

    text: str
    tokens: int = 1


class Finished(Value, frozen=True, kw_only=True):
    """The end of an answer; always the last item of a stream. Times are in seconds.

    An engine that leaves `usage.input_tokens` at 0 has not counted the prompt; the caller knows what it sent.
    `queue` is the wait for a free worker, `first_token` counts from there, `generation` from the first token to the
    last.
    """

    finish_reason: FinishReason
    usage: Usage
    queue: float = 0.0
    first_token: float = 0.0
    generation: float = 0.0


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
    def healthy(self) -> bool:
        """Whether the model can answer: started, not closed, nothing broken for good."""

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
        """Return how many tokens a message takes in a prompt, its role markers included."""

    def generate(
        self, messages: Sequence[Message], options: GenerationOptions
    ) -> AsyncGenerator[Chunk | Finished, None]:
        """Stream the answer to a conversation that fits the context. Closing the stream frees the engine in one step.

        Raises:
            QueueFull: too many generations wait already.
            ModelUnavailable: the model cannot answer now.
        """
