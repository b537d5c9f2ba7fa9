"""Between the contract's messages and the core's values: what comes in is checked here for its shape and size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from google.protobuf import duration_pb2, timestamp_pb2
from moltbot.v1 import chat_pb2, message_pb2, session_pb2

from moltbot_server.errors import ContentTooLarge, InvalidField
from moltbot_server.rpc import names
from moltbot_server.rpc.options import read_options
from moltbot_server.turns import (
    Accepted,
    Attachment,
    Attempt,
    Completed,
    Event,
    Failed,
    FinishReason,
    GenerationOptions,
    Kind,
    MediaPart,
    Message,
    Notice,
    Part,
    Place,
    Queued,
    ReasoningDelta,
    Reset,
    Role,
    Routed,
    Session,
    TextDelta,
    TextPart,
    Timings,
    ToolCallPart,
    ToolFinished,
    ToolResultPart,
    ToolStarted,
    TurnInput,
    TurnKey,
    TurnState,
    Usage,
    WhenBusy,
)

_ROLES_IN = {
    message_pb2.ROLE_SYSTEM: Role.SYSTEM,
    message_pb2.ROLE_USER: Role.USER,
    message_pb2.ROLE_ASSISTANT: Role.ASSISTANT,
    message_pb2.ROLE_TOOL: Role.TOOL,
}
_ROLES_OUT = {role: number for number, role in _ROLES_IN.items()}
_FINISH = {
    reason.value: message_pb2.FinishReason.Value(f"FINISH_REASON_{reason.value.upper()}") for reason in FinishReason
}
_WHEN_BUSY = {chat_pb2.WhenBusy.Value(f"WHEN_BUSY_{what.value.upper()}"): what for what in WhenBusy}
_STATES = {state: chat_pb2.TurnState.Value(f"TURN_STATE_{state.value.upper()}") for state in TurnState}

LONGEST_FLUSH = 10
"""Seconds that pieces of an answer may wait for each other."""

_MOST_PARTS = 32
_MOST_MESSAGES = 2000


# --- in ----------------------------------------------------------------------------------------------------------


class Reader:
    """Reads what callers send, within the core's limits."""

    def __init__(self, *, max_inline_bytes: int) -> None:
        self._max_inline_bytes = max_inline_bytes

    def turn(self, spec: chat_pb2.TurnInput) -> TurnInput:
        """Return what a turn is started with.

        Raises:
            InvalidField: a field is missing or wrong.
        """
        return TurnInput(
            session=names.read_segment("sessions/", spec.session, "turn.session"),
            parts=self.parts(spec.parts, "turn.parts"),
            request_id=spec.request_id,
            model=names.read_model(spec.model, "turn.model") if spec.model else "",
            options=self.options(spec.options, "turn.options") if spec.HasField("options") else _NO_OPTIONS,
            system_prompt=spec.system_prompt,
            transcript=self.messages(spec.transcript.messages, "turn.transcript.messages")
            if spec.HasField("transcript")
            else None,
            user=spec.user,
            channel=spec.channel,
            cancel_on_disconnect=spec.cancel_on_disconnect,
            flush_interval=seconds(spec.flush_interval, "turn.flush_interval", most=LONGEST_FLUSH)
            if spec.HasField("flush_interval")
            else None,
            reply_to=Place(channel=spec.reply_to.channel, address=spec.reply_to.address)
            if spec.HasField("reply_to")
            else None,
            when_busy=_when_busy(spec.when_busy),
        )

    def messages(self, entries: Iterable[message_pb2.Message], field: str) -> tuple[Message, ...]:
        """Return brought messages.

        Raises:
            InvalidField: a message has no role or no content, or there are too many.
        """
        read = []
        for index, entry in enumerate(entries):
            if index == _MOST_MESSAGES:
                raise ContentTooLarge(field, f"bring at most {_MOST_MESSAGES} messages")
            role = _ROLES_IN.get(entry.role)
            if role is None:
                raise InvalidField(f"{field}[{index}].role", "set one of system, user, assistant, tool")
            if not entry.parts:
                raise InvalidField(f"{field}[{index}].parts", "the message says nothing")
            read.append(Message(role=role, parts=self.parts(entry.parts, f"{field}[{index}].parts")))
        return tuple(read)

    def parts(self, entries: Iterable[message_pb2.Part], field: str) -> tuple[Part, ...]:
        """Return the parts of a message.

        Raises:
            InvalidField: a part is empty or malformed.
            ContentTooLarge: a part, or their number, is over its limit.
        """
        read: list[Part] = []
        for index, entry in enumerate(entries):
            if index == _MOST_PARTS:
                raise ContentTooLarge(field, f"send at most {_MOST_PARTS} parts")
            kind = entry.WhichOneof("content")
            if kind == "text":
                read.append(TextPart(text=entry.text))
            elif kind in ("image", "audio", "file"):
                read.append(self._media(kind, getattr(entry, kind), f"{field}[{index}].{kind}"))
            elif kind == "tool_call":
                call = entry.tool_call
                read.append(
                    ToolCallPart(call_id=call.call_id, tool=call.tool, arguments_json=call.arguments_json or "{}")
                )
            elif kind == "tool_result":
                result = entry.tool_result
                read.append(
                    ToolResultPart(
                        call_id=result.call_id, tool=result.tool, output=result.output, is_error=result.is_error
                    )
                )
            else:
                raise InvalidField(f"{field}[{index}].content", "set one kind of content that this core knows")
        return tuple(read)

    def options(self, spec: message_pb2.GenerationOptions, field: str) -> GenerationOptions:
        """Return how an answer is to be written; an engine checks what it can honour.

        Raises:
            InvalidField: an option is out of its range.
        """
        return read_options(spec, field)

    def _media(self, kind: str, media: message_pb2.Media, field: str) -> MediaPart:
        source = media.WhichOneof("source")
        if source is None or not getattr(media, source):
            raise InvalidField(f"{field}.source", "set `data` or `uri`")
        if source == "data":
            if len(media.data) > self._max_inline_bytes:
                raise ContentTooLarge(f"{field}.data", f"send at most {self._max_inline_bytes} bytes by value")
            if "/" not in media.media_type:
                raise InvalidField(f"{field}.media_type", "name the media type, such as image/png")
        elif not media.uri.startswith("https://"):
            raise InvalidField(f"{field}.uri", "only https: addresses can be fetched")
        if any(mark in media.filename for mark in ("/", "\\", "\0")):
            raise InvalidField(f"{field}.filename", "give a name without a path")
        return MediaPart(
            kind=kind,
            media_type=media.media_type,
            data=media.data,
            uri=media.uri,
            filename=media.filename,
            alt_text=media.alt_text,
        )


_NO_OPTIONS = GenerationOptions()


def _when_busy(value: chat_pb2.WhenBusy.ValueType) -> WhenBusy | None:
    if value and value not in _WHEN_BUSY:
        raise InvalidField("turn.when_busy", f"{value} is not known to this core")
    return _WHEN_BUSY.get(value)


def seconds(value: duration_pb2.Duration, field: str, *, most: int) -> float:
    """Return a span of time in seconds.

    Raises:
        InvalidField: it is not 0 to `most` seconds, or no Duration: nanos are below 10^9, with the sign of the seconds.
    """
    length = value.seconds + value.nanos / 1e9
    if not 0 <= length <= most or not 0 <= value.nanos < 1_000_000_000:
        raise InvalidField(field, f"use 0 to {most} seconds")
    return length


# --- out ---------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> duration_pb2.Duration:
    """Return seconds as a Duration, to the nanosecond."""
    made = duration_pb2.Duration()
    _set(made, seconds)
    return made


def _set(into: duration_pb2.Duration, seconds: float) -> None:
    if seconds >= 1:
        into.seconds = whole = int(seconds)
        seconds -= whole
    into.nanos = int(seconds * 1e9)


def timestamp(at: float) -> timestamp_pb2.Timestamp:
    """Return a Unix time as a Timestamp, to the microsecond."""
    made = timestamp_pb2.Timestamp()
    _stamp(made, at)
    return made


def _stamp(into: timestamp_pb2.Timestamp, at: float) -> None:
    whole = int(at)
    into.seconds = whole
    into.nanos = int((at - whole) * 1e6) * 1000


def fill_event(into: chat_pb2.Event, key: TurnKey, recorded: Event) -> None:
    """Fill in the contract's event from a recorded one, in place: half the cost of making it and copying it in."""
    kind = recorded.kind
    into.sequence = recorded.sequence
    if isinstance(kind, TextDelta):
        into.text_delta.text = kind.text
        return
    _stamp(into.create_time, recorded.at)
    field, fill = _KINDS[type(kind)]
    fill(getattr(into, field), key, kind)


def part(value: Part) -> message_pb2.Part:
    """Return a part as the contract's."""
    if isinstance(value, TextPart):
        return message_pb2.Part(text=value.text)
    if isinstance(value, ToolCallPart):
        return message_pb2.Part(tool_call=tool_call(value))
    if isinstance(value, ToolResultPart):
        return message_pb2.Part(tool_result=_tool_result(value))
    media = message_pb2.Media(
        media_type=value.media_type,
        filename=value.filename,
        alt_text=value.alt_text,
        size_bytes=len(value.data),
    )
    if value.uri:
        media.uri = value.uri
    else:
        media.data = value.data
    made = message_pb2.Part()
    getattr(made, value.kind).CopyFrom(media)
    return made


def message(session: str, value: Message) -> message_pb2.Message:
    """Return a stored message as the contract's."""
    return message_pb2.Message(
        name=names.message_name(session, value.id),
        role=_ROLES_OUT[value.role],
        parts=[part(entry) for entry in value.parts],
        create_time=timestamp(value.create_time),
        turn=names.turn_name(session, value.turn),
        model=f"models/{value.model}" if value.model else "",
        finish_reason=_FINISH[value.finish_reason] if value.finish_reason else message_pb2.FINISH_REASON_UNSPECIFIED,
    )


def session(value: Session, active: chat_pb2.Turn | None) -> session_pb2.Session:
    """Return a session as the contract's, with the turn that runs in it."""
    return session_pb2.Session(
        name=names.session_name(value.key.session),
        title=value.title,
        user=value.user,
        channel=value.channel,
        create_time=timestamp(value.create_time),
        update_time=timestamp(value.update_time),
        message_count=value.message_count,
        active_turn=active,
    )


def turn(key: TurnKey, *, state: TurnState, request_id: str, create_time: float, last_sequence: int) -> chat_pb2.Turn:
    """Return a turn as the contract's."""
    return chat_pb2.Turn(
        name=names.turn_name(key.session.session, key.ordinal),
        state=_STATES[state],
        request_id=request_id,
        create_time=timestamp(create_time),
        last_sequence=last_sequence,
    )


def finish_reason(name: str) -> message_pb2.FinishReason.ValueType:
    """Return a finish reason's number."""
    return _FINISH[name]


def usage(value: Usage) -> message_pb2.Usage:
    """Return counted tokens as the contract's."""
    return message_pb2.Usage(
        input_tokens=value.input_tokens,
        output_tokens=value.output_tokens,
        cached_input_tokens=value.cached_input_tokens,
    )


def fill_completed(into: chat_pb2.Completed, key: TurnKey, kind: Completed) -> None:
    """Fill in the good end of a turn, in place."""
    into.text = kind.text
    into.finish_reason = _FINISH[kind.finish_reason]
    if kind.model:
        into.model = f"models/{kind.model}"
    if kind.message:
        into.message = names.message_name(key.session.session, kind.message)
    used, counted = into.usage, kind.usage
    used.input_tokens = counted.input_tokens
    used.output_tokens = counted.output_tokens
    if counted.cached_input_tokens:
        used.cached_input_tokens = counted.cached_input_tokens
    _fill(into.timings, kind.timings)
    for entry in kind.attachments:
        into.attachments.append(part(entry))
    if kind.reasoning:
        into.reasoning = kind.reasoning
    if kind.cached:
        into.cached = True
    if kind.answered_by:
        into.answered_by = names.turn_name(key.session.session, kind.answered_by)


def _fill_accepted(into: chat_pb2.Accepted, key: TurnKey, kind: Accepted) -> None:
    into.turn = names.turn_name(kind.session, kind.ordinal)
    into.session = names.session_name(kind.session)
    into.message = names.message_name(kind.session, f"{kind.ordinal}.0")
    into.request_id = kind.request_id


def _fill_routed(into: chat_pb2.Routed, key: TurnKey, kind: Routed) -> None:
    into.reason = kind.reason
    setattr(into, kind.kind, f"{kind.kind}s/{kind.name}" if kind.kind != "command" else kind.name)


def fill_failed(into: chat_pb2.Failed, key: TurnKey, kind: Failed) -> None:
    """Fill in the bad end of a turn, in place."""
    into.code = kind.status
    into.reason = kind.reason
    into.message = kind.message
    into.retryable = kind.retryable
    into.field = kind.field
    if kind.retry_after is not None:
        _set(into.retry_delay, kind.retry_after)
    _fill(into.timings, kind.timings)


def _fill(into: chat_pb2.Timings, value: Timings) -> None:
    """Fill in a turn's timings in place: to make each Duration by itself and copy it in costs twice as much."""
    _set(into.accept, value.accept)
    _set(into.queue, value.queue)
    _set(into.first_token, value.first_token)
    _set(into.generation, value.generation)
    _set(into.total, value.total)
    if value.trimmed_messages:
        into.trimmed_messages = value.trimmed_messages
    if value.history_messages:
        into.history_messages = value.history_messages
    into.attempts = value.attempts
    for attempt in value.attempt_log:
        _fill_attempt(into.attempt_log.add(), attempt)


def _fill_attempt(into: chat_pb2.Attempt, value: Attempt) -> None:
    into.model = f"models/{value.model}"
    into.outcome = value.outcome
    into.reason = value.reason
    _set(into.start, value.start)
    if value.first_token is not None:
        _set(into.first_token, value.first_token)
    _set(into.total, value.total)


def tool_call(value: ToolCallPart) -> message_pb2.ToolCall:
    """Return a tool that is to be called as the contract's."""
    return message_pb2.ToolCall(call_id=value.call_id, tool=value.tool, arguments_json=value.arguments_json)


def _tool_result(value: ToolResultPart) -> message_pb2.ToolResult:
    return message_pb2.ToolResult(call_id=value.call_id, tool=value.tool, output=value.output, is_error=value.is_error)


def _fill_reset(into: chat_pb2.Reset, key: TurnKey, kind: Reset) -> None:
    into.text = kind.text
    into.reason = kind.reason


def _fill_tool_finished(into: chat_pb2.ToolFinished, key: TurnKey, kind: ToolFinished) -> None:
    into.result.CopyFrom(_tool_result(kind.result))
    _set(into.duration, kind.duration)


def _fill_notice(into: chat_pb2.Notice, key: TurnKey, kind: Notice) -> None:
    into.code = kind.code
    setattr(into, "from", kind.origin)
    into.to = kind.target
    into.reason = kind.reason


_KINDS: dict[type[Kind], tuple[str, Callable[[Any, TurnKey, Any], None]]] = {
    Accepted: ("accepted", _fill_accepted),
    Queued: ("queued", lambda into, _, kind: setattr(into, "position", kind.position)),
    Routed: ("routed", _fill_routed),
    Reset: ("reset", _fill_reset),
    Attachment: ("attachment", lambda into, _, kind: into.part.CopyFrom(part(kind.part))),
    ToolStarted: ("tool_started", lambda into, _, kind: into.call.CopyFrom(tool_call(kind.call))),
    ToolFinished: ("tool_finished", _fill_tool_finished),
    Notice: ("notice", _fill_notice),
    ReasoningDelta: ("reasoning_delta", lambda into, _, kind: setattr(into, "text", kind.text)),
    Completed: ("completed", fill_completed),
    Failed: ("failed", fill_failed),
}
