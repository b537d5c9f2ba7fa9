"""Whatever the bytes and the values of a request are, the answer is a status that blames the caller, never the core."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.message import Message
from grpc import aio
from moltbot_server.logs import is_telling
from moltbot_server.testing import RunningServer
from raw_http2 import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    call_headers,
    exchange,
    frame,
    message,
)
from rpc_calls import Api, turn

ROUNDS = 20
AT_ONCE = 20
OURS_TO_BLAME = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS}
DEEPEST = 6

# What a caller would send in fields of these names, so that most requests get beyond the first check.
USUAL: dict[str, tuple[Any, ...]] = {
    "session": ("sessions/s", "sessions/t", ""),
    "parent": ("sessions/s",),
    "name": ("sessions/s", "sessions/s/turns/1", "models/scripted", "plugins/echo"),
    "model": ("models/scripted", ""),
    "text": ("hello", "#3", "\x00", "\ufffe", "\U0010ffff", "<|im_end|>"),
    "request_id": ("", "one", "two"),
    "page_size": (0, 1, 2**31 - 1),
    "page_token": ("",),
    "after_sequence": (0, 1, 2**62),
    "role": (1, 2, 3),
    "seconds": (0, 1),
    "nanos": (0, 5),
    "max_output_tokens": (1, 5),
    "temperature": (0.5,),
    "media_type": ("image/png",),
}
TEXTS = ("", "x" * 3000, "\x00", "\u202e", "é你", "-1", "0", "AAAA", "WzFd", "moltbot.v1.TurnInput", "sessions/-")
NAMES = ("sessions/s/turns/99999999999999999999", "sessions/s/turns/9223372036854775808", "sessions/s/turns/\uff11")
SHAPES = {"turn", "parts", "text", "name", "parent", "prompt", "messages", "role", "session"}
LIMITS = {
    Field.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    Field.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    Field.CPPTYPE_UINT32: (0, 2**32 - 1),
    Field.CPPTYPE_UINT64: (0, 2**64 - 1),
}


class Fuzz:
    """Makes requests by chance; the same seed makes the same ones."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)

    def bytes(self) -> bytes:
        """Return bytes of any kind, among them fields that are well formed."""
        if self.chance.random() < 0.5:
            return self.chance.randbytes(self.chance.randrange(60))
        return b"".join(self._field(0) for _ in range(self.chance.randrange(1, 4)))

    def _field(self, depth: int) -> bytes:
        number, wire = self.chance.randrange(1, 16), self.chance.choice((0, 1, 2, 2, 2, 3, 4, 5))
        tag = bytes((number << 3 | wire,))
        if wire == 0:
            return tag + self.chance.choice((b"\x00", b"\x7f", b"\xff" * 9 + b"\x01", b"\x80\x80\x80\x80\x08"))
        if wire in (1, 5):
            return tag + self.chance.randbytes(8 if wire == 1 else 4)
        if wire in (3, 4):
            return tag
        inner = self._field(depth + 1) if depth < 4 and self.chance.random() < 0.5 else self.chance.randbytes(4)
        return tag + bytes((len(inner) % 128,)) + inner

    def fill(self, into: Any, depth: int = 0) -> Any:
        """Set fields of a message to values that are usual, and now and then to ones that are not."""
        for field in into.DESCRIPTOR.fields:
            if self.chance.random() < (0.15 if field.name in SHAPES else 0.7) or depth > DEEPEST:
                continue
            if field.type == Field.TYPE_MESSAGE:
                self._fill_inner(into, field, depth)
            elif _repeated(field):
                getattr(into, field.name).extend(self.value(field) for _ in range(self.chance.randrange(3)))
            else:
                setattr(into, field.name, self.value(field))
        return into

    def _fill_inner(self, into: Any, field: Field, depth: int) -> None:
        inner = getattr(into, field.name)
        if field.message_type.GetOptions().map_entry:
            return
        if not _repeated(field):
            inner.SetInParent()
            self.fill(inner, depth + 1)
            return
        for _ in range(self.chance.randrange(1, 3)):
            self.fill(inner.add(), depth + 1)

    def value(self, field: Field) -> Any:
        """Return a value for a field that is no message."""
        if field.name in USUAL and self.chance.random() < 0.85:
            return self.chance.choice(USUAL[field.name])
        if field.type == Field.TYPE_STRING:
            return self.chance.choice(TEXTS + NAMES)
        if field.type == Field.TYPE_BYTES:
            return self.chance.randbytes(9)
        if field.type == Field.TYPE_BOOL:
            return self.chance.random() < 0.5
        if field.type == Field.TYPE_ENUM:
            return self.chance.choice((0, 1, 2, 99, -1, 2**31 - 1))
        if field.type in (Field.TYPE_DOUBLE, Field.TYPE_FLOAT):
            return self.chance.choice((0.0, 1.0, -1.0, float("nan"), float("inf"), 1e38, 1e-40))
        lowest, highest = LIMITS[field.cpp_type]
        return self.chance.choice((lowest, highest, 0, 1, 50))


def _repeated(field: Field) -> bool:
    return bool(field.is_repeated) if hasattr(field, "is_repeated") else field.label == Field.LABEL_REPEATED


@pytest.fixture
async def methods(api: Api, core: RunningServer) -> AsyncIterator[list[str]]:
    """All methods that end by themselves; the core must serve afterwards as before."""
    await api.run(turn("hello", session="sessions/s"))
    yield [method for method in core.core.server.methods if not method.endswith("/Watch")]
    assert (await api.run(turn("still there?"))).completed.text == "You said: still there?"


@pytest.fixture(autouse=True)
def no_incident(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing of all this is an error of the core's."""
    yield
    records = [record for phase in ("setup", "call") for record in caplog.get_records(phase)]
    assert [(record.message, record.exc_text) for record in records if is_telling(record)] == []


async def answers(api: Api, method: str, bodies: list[bytes]) -> None:
    """Send requests to a method of any kind; the answer may be anything that does not blame the core."""
    call = api.channel.stream_stream(method)(iter(bodies), metadata=api.metadata, timeout=5)
    try:
        while await call.read() is not aio.EOF:
            pass
    except aio.AioRpcError as error:
        assert error.code() not in OURS_TO_BLAME, (method, bodies, error.details())  # noqa: PT017


async def test_bytes_of_any_kind_are_the_fault_of_whoever_sends_them(api: Api, methods: list[str]) -> None:
    fuzz = Fuzz(17)
    for method in methods:
        for _ in range(ROUNDS):
            await asyncio.gather(*(answers(api, method, [fuzz.bytes()]) for _ in range(AT_ONCE // 4)))


async def test_values_of_any_kind_are_the_fault_of_whoever_sends_them(api: Api, methods: list[str]) -> None:
    fuzz, pool = Fuzz(19), descriptor_pool.Default()
    for method in methods:
        service, _, name = method[1:].rpartition("/")
        kind: type[Message] = message_factory.GetMessageClass(
            pool.FindServiceByName(service).methods_by_name[name].input_type
        )
        for _ in range(ROUNDS):
            made = [fuzz.fill(kind()).SerializeToString() for _ in range(AT_ONCE)]
            await asyncio.gather(*(answers(api, method, [body]) for body in made))


async def test_calls_that_are_broken_off_anywhere_leave_no_error_behind(
    api: Api, core: RunningServer, methods: list[str]
) -> None:
    fuzz = Fuzz(23)
    chance = fuzz.chance
    key = (b"authorization", api.metadata[0][1].encode())

    def one(method: str) -> bytes:
        sent = PREFACE + frame(SETTINGS, 0, 0)
        for stream in range(1, 9, 2):
            limit = [(b"grpc-timeout", chance.choice((b"1m", b"5m", b"1n")))] if chance.random() < 0.4 else []
            sent += frame(HEADERS, END_HEADERS, stream, call_headers(method, more=[key, *limit]))
            for _ in range(chance.choice((0, 1, 1, 2))):
                sent += frame(DATA, 0, stream, message(fuzz.bytes()))
            if (end := chance.random()) < 0.6:
                sent += frame(DATA, END_STREAM, stream, b"")
            elif end < 0.9:
                sent += frame(RST_STREAM, 0, stream, b"\x00\x00\x00\x08")
        return sent

    for method in methods:
        for _ in range(ROUNDS // 4):
            calls = [one(method) for _ in range(AT_ONCE)]
            await asyncio.gather(*(exchange(core.address, call, wait=chance.choice((0, 0.05))) for call in calls))
