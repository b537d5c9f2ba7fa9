"""The values that walk through the core: principals, turns, messages, events.

They are `msgspec` structs: cheap to make, and the store writes and reads them without code of ours.
Times are Unix seconds, durations are seconds, ids are the last segment of a resource name.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec


class Value(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A value: immutable, compared by content, made with named fields only.

    Values hold values, never a cycle, so the garbage collector need not look at the many that a core keeps.
    """


class Role(StrEnum):
    """Who speaks in a message."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


class Principal(Value, frozen=True, kw_only=True):
    """Who calls: the workspace (tenant) that a credential opens, the credential's id, and its role."""

    workspace: str
    key_id: str
    role: str


class SessionKey(Value, frozen=True, kw_only=True):
    """A session's full name: no session is ever reached without its workspace."""

    workspace: str
    session: str


class TurnKey(Value, frozen=True, kw_only=True):
    """A turn's full name. `ordinal` counts the turns of a session from 1 and is the turn's resource id."""

    session: SessionKey
    ordinal: int


# --- content -----------------------------------------------------------------------------------------------------


class TextPart(Value, frozen=True, kw_only=True, tag="text"):
    """Plain text or Markdown."""

    text: str


class MediaPart(Value, frozen=True, kw_only=True, tag="media"):
    """Bytes of a media type, by value (`data`) or by reference (`uri`); `kind` is image, audio or file."""

    kind: str
    media_type: str = ""
    data: bytes = b""
    uri: str = ""
    filename: str = ""
    alt_text: str = ""


class ToolCallPart(Value, frozen=True, kw_only=True, tag="tool_call"):
    """An assistant's request to call a tool; the arguments are one JSON object."""

    call_id: str
    tool: str
    arguments_json: str = "{}"


class ToolResultPart(Value, frozen=True, kw_only=True, tag="tool_result"):
    """What a called tool answered."""

    call_id: str
    tool: str
    output: str
    is_error: bool = False


Part = TextPart | MediaPart | ToolCallPart | ToolResultPart


class Message(Value, frozen=True, kw_only=True):
    """One entry of a conversation. `id` is `{ordinal}.{index}` for stored messages and empty for brought ones.

    `finish_reason` is why an answer ended, as far as that is known.
    """

    role: Role
    parts: tuple[Part, ...]
    id: str = ""
    turn: int = 0
    model: str = ""
    create_time: float = 0.0
    finish_reason: FinishReason | None = None

    @property
    def text(self) -> str:
        """The text parts of the message, joined."""
        parts = self.parts
        if len(parts) == 1 and isinstance(parts[0], TextPart):
            return parts[0].text
        return "".join(part.text for part in parts if isinstance(part, TextPart))


class Tool(Value, frozen=True, kw_only=True):
    """A tool that a model may ask to be called; `parameters_json` is a JSON Schema of its arguments, or empty.

    `strict` asks the provider to hold the model to the schema; one that has no such thing is not told.
    """

    name: str
    description: str = ""
    parameters_json: str = ""
    strict: bool = False


class ToolMode(StrEnum):
    """How free a model is to ask for tools."""

    AUTO = "auto"
    NONE = "none"
    REQUIRED = "required"


class ToolChoice(Value, frozen=True, kw_only=True):
    """Whether and which tool a model is to ask for; a named `tool` is the one that it has to ask for."""

    mode: ToolMode = ToolMode.AUTO
    tool: str = ""


class GenerationOptions(Value, frozen=True, kw_only=True, omit_defaults=True):
    """How an answer is to be written; None leaves the choice to the model. Units as in the contract."""

    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: tuple[str, ...] = ()
    repetition_penalty: float | None = None
    seed: int | None = None
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice | None = None


class Usage(Value, frozen=True, kw_only=True, array_like=True):
    """Tokens read, written, and served from a cache."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_input_tokens: int = 0


class Place(Value, frozen=True, kw_only=True, array_like=True):
    """A place on a platform: the channel whose adapters deliver there, and an address that only they understand."""

    channel: str
    address: str


class WhenBusy(StrEnum):
    """What becomes of a turn whose session is busy: it waits, cancels those before it, or is answered with others."""

    QUEUE = "queue"
    INTERRUPT = "interrupt"
    JOIN = "join"


class TurnInput(Value, frozen=True, kw_only=True, omit_defaults=True):
    """What a turn is started with. `session` empty: a new one. `transcript` not None: a closed conversation.

    `flush_interval` is how long text may wait to be sent together: None is the core's default, 0 sends every delta.
    `reply_to` is where the answer is delivered, None for nowhere; `when_busy` None is the core's default.
    """

    parts: tuple[Part, ...]
    session: str = ""
    request_id: str = ""
    model: str = ""
    options: GenerationOptions = GenerationOptions()
    system_prompt: str = ""
    transcript: tuple[Message, ...] | None = None
    user: str = ""
    channel: str = ""
    cancel_on_disconnect: bool = False
    flush_interval: float | None = None
    reply_to: Place | None = None
    when_busy: WhenBusy | None = None


class FinishReason(StrEnum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"
    STOP_TEXT = "stop_text"
    CANCELLED = "cancelled"
    CONTENT_FILTER = "content_filter"
    TOOL_CALLS = "tool_calls"
    JOINED = "joined"
    UPSTREAM_ERROR = "upstream_error"


class TurnState(StrEnum):
    """Where a turn stands."""

    RUNNING = "running"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    FAILED = "failed"


class Attempt(Value, frozen=True, kw_only=True, array_like=True):
    """One time that a model was asked for an answer, or passed over. Times are in seconds.

    `outcome` is `ANSWERED`, `SKIPPED`, `CANCELLED`, or the reason of an error; `start` counts from the first attempt,
    `first_token` and `total` from this one's start; None for no token.
    """

    model: str
    outcome: str
    reason: str = ""
    start: float = 0.0
    first_token: float | None = None
    total: float = 0.0


class Timings(Value, frozen=True, kw_only=True, array_like=True):
    """Where a turn's time went, in seconds, and what its history was cut to, in messages.

    `accept` is 0 when the answer was complete before the message was stored: both were stored together. The
    `attempt_log` is empty when one model was asked once and answered.
    """

    accept: float = 0.0
    queue: float = 0.0
    first_token: float = 0.0
    generation: float = 0.0
    total: float = 0.0
    trimmed_messages: int = 0
    history_messages: int = 0
    attempts: int = 0
    attempt_log: tuple[Attempt, ...] = ()


# --- events: one class for each kind of the contract. They are stored as arrays: fields are only added, at the end. --


class Accepted(Value, frozen=True, kw_only=True, array_like=True, tag="accepted"):
    """The turn exists and its message is stored."""

    session: str
    ordinal: int
    request_id: str


class Queued(Value, frozen=True, kw_only=True, array_like=True, tag="queued"):
    """The turn waits; `position` turns are ahead."""

    position: int


class Routed(Value, frozen=True, kw_only=True, array_like=True, tag="routed"):
    """Who answers (`kind` is model, plugin, skill or command) and why."""

    kind: str
    name: str
    reason: str


class TextDelta(Value, frozen=True, kw_only=True, array_like=True, tag="text_delta"):
    """More text: whole characters."""

    text: str


class ReasoningDelta(Value, frozen=True, kw_only=True, array_like=True, tag="reasoning_delta"):
    """More of what the model thinks before it answers; no part of the answer."""

    text: str


class Reset(Value, frozen=True, kw_only=True, array_like=True, tag="reset"):
    """Replace what was shown by `text`."""

    text: str
    reason: str


class Attachment(Value, frozen=True, kw_only=True, array_like=True, tag="attachment"):
    """A picture, sound or file of the answer."""

    part: Part


class ToolStarted(Value, frozen=True, kw_only=True, array_like=True, tag="tool_started"):
    """A tool was called."""

    call: ToolCallPart


class ToolFinished(Value, frozen=True, kw_only=True, array_like=True, tag="tool_finished"):
    """A called tool answered after `duration` seconds."""

    result: ToolResultPart
    duration: float


class Notice(Value, frozen=True, kw_only=True, array_like=True, tag="notice"):
    """Something worth telling that changes nothing of the text."""

    code: str
    origin: str
    target: str
    reason: str


class Completed(Value, frozen=True, kw_only=True, array_like=True, tag="completed"):
    """The turn ended well; `text` is the whole answer. `cached`: it was kept from before, and no model was asked.

    `answered_by` is the number of the turn that answers this one too; 0 for none.
    """

    text: str
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    model: str = ""
    message: str = ""
    attachments: tuple[Part, ...] = ()
    reasoning: str = ""
    cached: bool = False
    answered_by: int = 0


class Failed(Value, frozen=True, kw_only=True, array_like=True, tag="failed"):
    """The turn ended badly. `status` is the canonical code; `retry_after` is in seconds.

    `field` is the path of the request's field that is to blame, if one is.
    """

    status: int
    reason: str
    message: str
    retryable: bool
    retry_after: float | None = None
    timings: Timings = Timings()
    field: str = ""


Kind = (
    Accepted
    | Queued
    | Routed
    | TextDelta
    | Reset
    | Attachment
    | ToolStarted
    | ToolFinished
    | Notice
    | Completed
    | Failed
    | ReasoningDelta
)


class Event(Value, frozen=True, kw_only=True, array_like=True):
    """One thing that happened in a turn: its place, its time, what happened."""

    sequence: int
    at: float
    kind: Kind


class Session(Value, frozen=True, kw_only=True):
    """A conversation as it is listed."""

    key: SessionKey
    title: str
    user: str
    channel: str
    create_time: float
    update_time: float
    message_count: int = 0


_encoder = msgspec.msgpack.Encoder()


def encode(value: Any) -> bytes:
    """Return a value, or a tuple of values, in the form in which the store keeps it (MessagePack)."""
    return _encoder.encode(value)
