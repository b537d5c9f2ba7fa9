"""Calls that are well-formed gRPC and still wrong: each is refused with a status that says what to do."""

from __future__ import annotations

import random
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2
from grpc import aio
from moltbot.v1 import chat_pb2, inference_pb2, message_pb2, session_pb2
from moltbot_server.testing import RunningServer
from rpc_calls import Api, details_of, fields_of, reason_of, refused, turn

RUN = "/moltbot.v1.ChatService/RunTurn"
SPEC = chat_pb2.RunTurnRequest(turn=turn("hello", session="sessions/s")).SerializeToString()


def unary(api: Api, body: bytes, method: str = RUN, **options: Any) -> Any:
    return api.channel.unary_unary(method)(body, metadata=api.metadata, **options)


def clear(error: aio.AioRpcError) -> tuple[str, str]:
    """Return status and reason of an error, having looked that its text is for callers."""
    told = (error.details() or "") + str(details_of(error))
    assert not any(word in told for word in ("Traceback", "Unexpected", "object at 0x", ".py", "<class"))
    return error.code().name, reason_of(error)


@pytest.mark.parametrize(
    "body",
    [
        b"\xff",
        b"\x00",
        b"\x0a\xff\xff\xff\xff\x0f",
        SPEC[:-1],
        SPEC[:5],
        SPEC.replace(b"hello", b"\xff\xfe\xfd\xfc\xfb"),
        SPEC.replace(b"hello", b"\xed\xa0\x80xx"),
        b"\x0b" * 200,
        b"\x0b" * 100_000,
        b"\x0a\x02" * 10_000,
    ],
    ids=["one byte", "field 0", "length beyond", "cut", "cut early", "no UTF-8", "surrogate", "groups", "deep", "odd"],
)
async def test_bytes_that_are_no_message_are_an_invalid_argument(api: Api, body: bytes) -> None:
    assert clear(await refused(unary(api, body))) == ("INVALID_ARGUMENT", "INVALID_FIELD")


async def test_random_bytes_to_every_method_are_never_unknown(api: Api, core: RunningServer) -> None:
    chance = random.Random(11)
    kinds = {}
    for method in core.core.server.methods:
        if method.startswith("/grpc.") or method.endswith("/Converse"):
            continue
        for _ in range(30):
            call = api.channel.unary_stream(method)(chance.randbytes(chance.randrange(1, 60)), metadata=api.metadata)
            try:
                while await call.read() is not aio.EOF:
                    pass
            except aio.AioRpcError as error:
                kinds[clear(error)] = method
    assert {code for code, _ in kinds} <= {"INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED"}, kinds


async def test_a_struct_nested_deeper_than_any_reader_goes_is_refused(api: Api) -> None:
    value, struct = b"\x1a\x01x", b""
    for _ in range(400):
        entry = b"\x0a\x01k\x12" + _length(len(value)) + value
        struct = b"\x0a" + _length(len(entry)) + entry
        value = b"\x2a" + _length(len(struct)) + struct
    request = b"\x0a\x09plugins/x\x1a" + _length(len(struct)) + struct

    error = await refused(unary(api, request, "/moltbot.v1.PluginService/CallPlugin"))
    assert clear(error) == ("INVALID_ARGUMENT", "INVALID_FIELD")


def _length(number: int) -> bytes:
    made = b""
    while number >= 128:
        made += bytes((number % 128 + 128,))
        number //= 128
    return made + bytes((number,))


async def test_fields_and_numbers_of_tomorrow_are_no_error(api: Api) -> None:
    unknown = b"\xfa\x3e\x05later\xf8\x3f\x2a"
    answer = await unary(api, SPEC + unknown)
    assert chat_pb2.RunTurnResponse.FromString(answer).completed.text == "You said: hello"

    odd_role = chat_pb2.Transcript(messages=[message_pb2.Message(role=99, parts=[message_pb2.Part(text="x")])])  # type: ignore[arg-type]
    error = await refused(api.run(turn(transcript=odd_role)))
    assert clear(error) == ("INVALID_ARGUMENT", "INVALID_FIELD")
    odd_part = message_pb2.Part.FromString(b"\xfa\x3e\x05later")
    error = await refused(api.run(chat_pb2.TurnInput(parts=[odd_part])))
    assert clear(error) == ("INVALID_ARGUMENT", "INVALID_FIELD")


@pytest.mark.parametrize(
    "spec",
    [
        chat_pb2.TurnInput(),
        turn(""),
        turn("   \n\t\r "),
        turn("\u3000\u2003\u00a0"),
        turn("\u200b\u200d\u2060\ufeff"),
        turn("\x00\x07\x1b\x7f\x85"),
        turn("\u00ad \u2800\u3164\ufe0f\U000e0041\n"),
        turn("\u202e\u2066\u2069" * 100_000),
        chat_pb2.TurnInput(parts=[message_pb2.Part(text=" ")] * 5),
    ],
)
async def test_a_message_that_says_nothing_is_refused(api: Api, spec: chat_pb2.TurnInput) -> None:
    error = await refused(api.run(spec))

    assert clear(error) == ("INVALID_ARGUMENT", "EMPTY_MESSAGE")


@pytest.mark.parametrize(
    "text",
    [
        "\x00",
        "a\x00b",
        "\x1b[2J",
        "\u202eevil",
        "\ufeffx",
        "\U0010ffff",
        "\ud7ff\ue000",
        "e\u0301" * 500,
        "\r\n.\r\n",
        "'; DROP TABLE turns;--",
    ],
)
async def test_strange_text_is_text(api: Api, text: str) -> None:
    spoken = f"say {text}"
    answer = await api.run(turn(spoken, session="sessions/odd", user=spoken[:256]))

    assert answer.completed.text.split() == f"You said: {spoken}".split()
    assert (await api.said("sessions/odd"))[0] == spoken
    assert (await api.session("sessions/odd")).user == spoken[:256]


@pytest.mark.parametrize(
    "fields",
    [
        {"session": "sessions/" + "x" * 1_000_000},
        {"request_id": "x" * 129},
        {"request_id": "a\x1f7"},
        {"request_id": "a\x00"},
        {"user": "x" * 257},
        {"channel": "X"},
        {"channel": "x" * 33},
        {"channel": "a b"},
        {"model": "models/"},
        {"model": "x" * 1_000_000},
        {"model": "models/" + "x" * 129},
    ],
    ids=lambda fields: "-".join(f"{name} {len(value)}" for name, value in fields.items()),
)
async def test_a_field_out_of_bounds_is_refused_and_named(api: Api, fields: dict[str, str]) -> None:
    error = await refused(api.run(turn(**fields)))

    assert clear(error) == ("INVALID_ARGUMENT", "INVALID_FIELD")
    assert f"turn.{next(iter(fields))}" in str(details_of(error))
    assert len(error.details() or "") < 500


@pytest.mark.parametrize("name", [".", "..", "...", "." * 128])
async def test_a_session_named_by_dots_alone_is_refused_wherever_it_is_named(api: Api, name: str) -> None:
    session = f"sessions/{name}"
    for call, field in (
        (api.run(turn("hello", session=session)), "turn.session"),
        (api.session(session), "name"),
        (api.cancel(f"{session}/turns/1"), "name"),
    ):
        error = await refused(call)
        assert (clear(error), fields_of(error)) == (("INVALID_ARGUMENT", "INVALID_FIELD"), [field])


@pytest.mark.parametrize("name", ["..a", "a..", ".-.", "~"])
async def test_a_session_named_by_more_than_dots_is_taken(api: Api, name: str) -> None:
    await api.run(turn("hello", session=f"sessions/{name}"))

    assert await api.said(f"sessions/{name}") == ["hello", "You said: hello"]


@pytest.mark.parametrize("text", ["?", "\U0001f44b", "\u200b\u4f60", "\u3164x", "\u202e!", "\x00 0", "\u0301"])
async def test_a_message_of_which_anything_can_be_seen_is_answered(api: Api, text: str) -> None:
    assert (await api.run(turn(text))).completed.text.startswith("You said:")


@pytest.mark.parametrize(
    ("seconds", "nanos"), [(0, 10**9), (1, -1), (-1, 10**9 - 1), (0, -1), (10, 1), (-(2**63), 0), (2**63 - 1, 0)]
)
async def test_a_duration_that_is_none_or_too_long_is_refused_and_named(api: Api, seconds: int, nanos: int) -> None:
    interval = duration_pb2.Duration(seconds=seconds, nanos=nanos)
    error = await refused(api.run(turn(flush_interval=interval)))
    assert (clear(error), fields_of(error)) == (("INVALID_ARGUMENT", "INVALID_FIELD"), ["turn.flush_interval"])
    request = inference_pb2.GenerateRequest(
        prompt=inference_pb2.Prompt(
            messages=[message_pb2.Message(role=message_pb2.ROLE_USER, parts=[message_pb2.Part(text="hi")])]
        ),
        flush_interval=interval,
    )
    error = await refused(api.inference.Generate(request, metadata=api.metadata))
    assert (clear(error), fields_of(error)) == (("INVALID_ARGUMENT", "INVALID_FIELD"), ["flush_interval"])


async def test_a_message_over_the_limit_is_resource_exhausted(api: Api) -> None:
    error = await refused(unary(api, b"x" * (5 << 20)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    call = api.channel.stream_stream("/moltbot.v1.ChatService/Converse")(metadata=api.metadata)
    await call.write(b"x" * (5 << 20))
    assert (await refused(call)).code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_message_just_below_the_limit_is_judged_by_what_it_says(api: Api) -> None:
    error = await refused(api.run(turn("x" * (4_100_000)), timeout=20))
    assert clear(error) == ("INVALID_ARGUMENT", "CONTEXT_LENGTH_EXCEEDED")
    big = message_pb2.Media(data=b"x" * ((1 << 20) + 1), media_type="image/png")
    error = await refused(api.run(chat_pb2.TurnInput(parts=[message_pb2.Part(image=big)])))
    assert clear(error) == ("INVALID_ARGUMENT", "CONTENT_TOO_LARGE")
    picture = message_pb2.Media(data=b"x", media_type="image/png")
    error = await refused(api.run(chat_pb2.TurnInput(parts=[message_pb2.Part(image=picture)])))
    assert clear(error) == ("INVALID_ARGUMENT", "UNSUPPORTED_CONTENT")


@pytest.mark.parametrize(
    "method",
    [
        "/moltbot.v1.ChatService/Nothing",
        "/moltbot.v2.ChatService/RunTurn",
        "/x",
        "/moltbot.v1.PluginRuntimeService/Describe",
    ],
)
async def test_a_method_that_there_is_not_is_unimplemented(api: Api, method: str) -> None:
    assert (await refused(unary(api, b"", method))).code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    "metadata",
    [
        [(f"x-{number}", "v") for number in range(10_000)],
        [("x-big", "v" * 1_000_000)],
        [("x-big-bin", b"v" * 100_000)],
    ],
    ids=["ten thousand keys", "a megabyte", "many bytes"],
)
async def test_metadata_beyond_measure_is_resource_exhausted(api: Api, metadata: list[tuple[str, str]]) -> None:
    call = api.channel.unary_unary(RUN)(SPEC, metadata=[*api.metadata, *metadata], timeout=10)

    assert (await refused(call)).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await api.run(turn())).turn


async def test_a_unary_method_called_as_a_stream_is_answered_or_refused_clearly(api: Api) -> None:
    call = api.channel.stream_stream(RUN)(iter([SPEC, SPEC]), metadata=api.metadata)
    try:
        while await call.read() is not aio.EOF:
            pass
    except aio.AioRpcError as error:
        assert error.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED)  # noqa: PT017
    assert (await api.run(turn())).turn


async def test_two_thousand_calls_that_are_dropped_at_once_leave_the_core_as_it_was(
    api: Api, core: RunningServer
) -> None:
    for _ in range(20):
        calls = [api.stream(turn("#5 pace=0.01", cancel_on_disconnect=True)) for _ in range(100)]
        for call in calls:
            call.cancel()

    assert (await api.run(turn(), timeout=10)).turn
    listed = await api.sessions.ListSessions(session_pb2.ListSessionsRequest(), metadata=api.metadata)
    assert listed.sessions
