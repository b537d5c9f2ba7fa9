"""Between the contract and the core's values: every kind of event and of part, both ways."""

from __future__ import annotations

import typing

import msgspec
import pytest
from google.protobuf import duration_pb2
from moltbot.v1 import chat_pb2, message_pb2
from moltbot_server import turns
from moltbot_server.errors import ContentTooLarge, InvalidField, MoltBotError
from moltbot_server.rpc import convert, remote_convert
from moltbot_server.rpc.options import read_options
from moltbot_server.turns import Event, SessionKey, TurnKey

KEY = TurnKey(session=SessionKey(workspace="w", session="s"), ordinal=7)
TIMINGS = turns.Timings(
    accept=0.25,
    queue=1.5,
    first_token=0.125,
    generation=2.0,
    total=3.75,
    trimmed_messages=4,
    history_messages=5,
    attempts=6,
)
PARTS: list[turns.Part] = [
    turns.TextPart(text="hi \N{GRINNING FACE}"),
    turns.MediaPart(kind="image", media_type="image/png", data=b"\x89PNG", filename="a.png", alt_text="a dot"),
    turns.MediaPart(kind="audio", uri="https://example.com/a.ogg"),
    turns.MediaPart(kind="file", media_type="text/plain", data=b"x"),
    turns.ToolCallPart(call_id="c1", tool="weather", arguments_json='{"city": "Wien"}'),
    turns.ToolResultPart(call_id="c1", tool="weather", output="rain", is_error=True),
]
KINDS: dict[turns.Kind, chat_pb2.Event] = {
    turns.Accepted(session="s", ordinal=7, request_id="r"): chat_pb2.Event(
        accepted=chat_pb2.Accepted(
            turn="sessions/s/turns/7", session="sessions/s", message="sessions/s/messages/7.0", request_id="r"
        )
    ),
    turns.Queued(position=3): chat_pb2.Event(queued=chat_pb2.Queued(position=3)),
    turns.Routed(kind="model", name="m", reason="why"): chat_pb2.Event(
        routed=chat_pb2.Routed(model="models/m", reason="why")
    ),
    turns.Routed(kind="command", name="help", reason="why"): chat_pb2.Event(
        routed=chat_pb2.Routed(command="help", reason="why")
    ),
    turns.Routed(kind="plugin", name="p", reason=""): chat_pb2.Event(routed=chat_pb2.Routed(plugin="plugins/p")),
    turns.Routed(kind="skill", name="k", reason=""): chat_pb2.Event(routed=chat_pb2.Routed(skill="skills/k")),
    turns.TextDelta(text="你好"): chat_pb2.Event(text_delta=chat_pb2.TextDelta(text="你好")),
    turns.Reset(text="", reason="again"): chat_pb2.Event(reset=chat_pb2.Reset(reason="again")),
    turns.Attachment(part=PARTS[1]): chat_pb2.Event(attachment=chat_pb2.Attachment(part=convert.part(PARTS[1]))),
    turns.ToolStarted(call=PARTS[4]): chat_pb2.Event(  # type: ignore[arg-type]
        tool_started=chat_pb2.ToolStarted(
            call=message_pb2.ToolCall(call_id="c1", tool="weather", arguments_json='{"city": "Wien"}')
        )
    ),
    turns.ToolFinished(result=PARTS[5], duration=1.5): chat_pb2.Event(  # type: ignore[arg-type]
        tool_finished=chat_pb2.ToolFinished(
            result=message_pb2.ToolResult(call_id="c1", tool="weather", output="rain", is_error=True),
            duration=duration_pb2.Duration(seconds=1, nanos=500_000_000),
        )
    ),
    turns.ReasoningDelta(text="hm"): chat_pb2.Event(reasoning_delta=chat_pb2.ReasoningDelta(text="hm")),
    turns.Notice(code="FAILOVER", origin="models/a", target="models/b", reason="slow"): chat_pb2.Event(
        notice=chat_pb2.Notice(code="FAILOVER", to="models/b", reason="slow", **{"from": "models/a"})
    ),
    turns.Completed(
        text="done",
        finish_reason=turns.FinishReason.STOP_TEXT,
        usage=turns.Usage(input_tokens=1, output_tokens=2, cached_input_tokens=3),
        timings=TIMINGS,
        model="m",
        message="7.1",
        attachments=(PARTS[3],),
    ): chat_pb2.Event(
        completed=chat_pb2.Completed(
            text="done",
            finish_reason=message_pb2.FINISH_REASON_STOP_TEXT,
            usage=message_pb2.Usage(input_tokens=1, output_tokens=2, cached_input_tokens=3),
            model="models/m",
            message="sessions/s/messages/7.1",
            attachments=[convert.part(PARTS[3])],
        )
    ),
    turns.Failed(
        status=8, reason="QUEUE_FULL", message="later", retryable=True, retry_after=2.5, timings=TIMINGS
    ): chat_pb2.Event(
        failed=chat_pb2.Failed(
            code=8,
            reason="QUEUE_FULL",
            message="later",
            retryable=True,
            retry_delay=duration_pb2.Duration(seconds=2, nanos=500_000_000),
        )
    ),
}


def told(kind: turns.Kind) -> chat_pb2.Event:
    event = chat_pb2.Event()
    convert.fill_event(event, KEY, Event(sequence=9, at=1_700_000_000.25, kind=kind))
    return event


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)
def test_each_kind_of_event_is_told_whole(kind: turns.Kind) -> None:
    event, expected = told(kind), chat_pb2.Event()
    expected.CopyFrom(KINDS[kind])
    expected.sequence = 9
    if not isinstance(kind, turns.TextDelta):
        expected.create_time.FromNanoseconds(1_700_000_000_250_000_000)
    for field in ("completed", "failed"):
        if event.HasField(field):  # type: ignore[arg-type]
            timings = getattr(event, field).timings
            assert timings.total.ToTimedelta().total_seconds() == 3.75
            assert timings.first_token.ToTimedelta().total_seconds() == 0.125
            assert (timings.trimmed_messages, timings.history_messages, timings.attempts) == (4, 5, 6)
            getattr(event, field).ClearField("timings")

    assert event == expected


def test_every_kind_of_the_core_is_a_kind_of_the_contract_and_the_other_way_round() -> None:
    core = {type(kind) for kind in KINDS}
    contract = {event.WhichOneof("kind") for event in KINDS.values()}

    assert core == set(typing.get_args(turns.Kind))
    assert contract == {field.name for field in chat_pb2.Event.DESCRIPTOR.oneofs_by_name["kind"].fields}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)
def test_each_kind_of_event_survives_the_store(kind: turns.Kind) -> None:
    event = Event(sequence=9, at=1.5, kind=kind)

    assert msgspec.msgpack.decode(turns.encode((event,)), type=tuple[Event, ...]) == (event,)


def test_a_client_skips_a_kind_of_event_that_it_does_not_know() -> None:
    of_tomorrow = told(turns.TextDelta(text="x")).SerializeToString().replace(b"\x6a\x03", b"\xa2\x06\x03")
    event = chat_pb2.Event.FromString(of_tomorrow)

    assert event.sequence == 9
    assert event.WhichOneof("kind") is None


READER = convert.Reader(max_inline_bytes=10)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: getattr(part, "kind", type(part).__name__))
def test_each_kind_of_part_is_read_as_it_is_told(part: turns.Part) -> None:
    assert READER.parts([convert.part(part)], "parts") == (part,)


@pytest.mark.parametrize("role", list(turns.Role))
def test_each_role_is_read_as_it_is_told(role: turns.Role) -> None:
    message = turns.Message(role=role, parts=(turns.TextPart(text="x"),))
    read = READER.messages([convert.message("s", message)], "messages")

    assert read == (message,)


MEDIA = message_pb2.Media


@pytest.mark.parametrize(
    ("parts", "error", "field"),
    [
        ([message_pb2.Part()], InvalidField, "parts[0].content"),
        ([message_pb2.Part(text="x")] * 33, ContentTooLarge, "parts"),
        ([message_pb2.Part(image=MEDIA())], InvalidField, "parts[0].image.source"),
        ([message_pb2.Part(image=MEDIA(data=b""))], InvalidField, "parts[0].image.source"),
        ([message_pb2.Part(image=MEDIA(data=b"x"))], InvalidField, "parts[0].image.media_type"),
        ([message_pb2.Part(file=MEDIA(data=b"x" * 11, media_type="a/b"))], ContentTooLarge, "parts[0].file.data"),
        (
            [message_pb2.Part(text="x"), message_pb2.Part(audio=MEDIA(uri="http://x"))],
            InvalidField,
            "parts[1].audio.uri",
        ),
        ([message_pb2.Part(image=MEDIA(uri="file:///etc/passwd"))], InvalidField, "parts[0].image.uri"),
        ([message_pb2.Part(file=MEDIA(uri="https://x", filename="../x"))], InvalidField, "parts[0].file.filename"),
        ([message_pb2.Part(file=MEDIA(uri="https://x", filename="a\\b"))], InvalidField, "parts[0].file.filename"),
        ([message_pb2.Part(file=MEDIA(uri="https://x", filename="a\0b"))], InvalidField, "parts[0].file.filename"),
    ],
)
def test_a_part_that_is_none_is_refused_by_name(
    parts: list[message_pb2.Part], error: type[MoltBotError], field: str
) -> None:
    with pytest.raises(error) as caught:
        READER.parts(parts, "parts")

    assert list(caught.value.fields) == [field]


def test_a_rule_for_busy_sessions_that_this_core_does_not_know_is_refused_by_name() -> None:
    said = chat_pb2.TurnInput(session="sessions/s", parts=[message_pb2.Part(text="x")])
    assert READER.turn(said).when_busy is None
    said.when_busy = chat_pb2.WHEN_BUSY_JOIN
    assert READER.turn(said).when_busy is turns.WhenBusy.JOIN
    said.when_busy = 99  # type: ignore[assignment]  # of a later contract
    with pytest.raises(InvalidField) as caught:
        READER.turn(said)
    assert list(caught.value.fields) == ["turn.when_busy"]


def test_a_float_of_the_wire_is_the_decimal_that_was_meant() -> None:
    options = READER.options(
        message_pb2.GenerationOptions(temperature=0.7, top_p=0.9, repetition_penalty=1.1), "options"
    )

    assert (options.temperature, options.top_p, options.repetition_penalty) == (0.7, 0.9, 1.1)
    assert READER.options(message_pb2.GenerationOptions(), "options") == turns.GenerationOptions()
    assert READER.options(message_pb2.GenerationOptions(temperature=0, top_k=0, seed=0), "options") == (
        turns.GenerationOptions(temperature=0.0, top_k=0, seed=0)
    )


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": -0.1},
        {"temperature": 2.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"max_output_tokens": 0},
        {"max_output_tokens": -5},
        {"repetition_penalty": 0.0},
        {"stop": ["x" * 65]},
    ],
)
def test_an_option_out_of_its_range_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(InvalidField) as caught:
        READER.options(message_pb2.GenerationOptions(**options), "turn.options")  # type: ignore[arg-type]

    assert list(caught.value.fields) == [f"turn.options.{next(iter(options))}"]


def test_how_an_answer_is_to_be_written_is_the_same_at_an_engine_that_is_asked_over_there() -> None:
    schema = '{"type": "object", "properties": {"city": {"type": "string"}}}'
    options = turns.GenerationOptions(
        max_output_tokens=7,
        temperature=0.5,
        stop=("END",),
        seed=3,
        tools=(
            turns.Tool(name="weather", description="Tells the weather", parameters_json=schema, strict=True),
            turns.Tool(name="clock"),
        ),
        tool_choice=turns.ToolChoice(mode=turns.ToolMode.REQUIRED, tool="weather"),
    )
    assert read_options(remote_convert.options(options), "options") == options


@pytest.mark.parametrize("schema", ["[" * 5000, '{"a":' * 5000 + "1" + "}" * 5000, "{", "3"])
def test_a_schema_that_is_no_object_or_nested_too_deeply_is_refused(schema: str) -> None:
    spec = message_pb2.GenerationOptions(tools=[message_pb2.Tool(name="weather", parameters_json=schema)])
    with pytest.raises(InvalidField) as caught:
        convert.Reader(max_inline_bytes=1 << 20).options(spec, "options")
    assert caught.value.field == "options.tools[0].parameters_json"
