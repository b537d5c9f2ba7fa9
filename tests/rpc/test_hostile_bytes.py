"""Bytes that no client sends: the core answers clearly or hangs up, stays up, and does not grow."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from core_process import CoreProcess, core_process
from raw_http2 import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    call_headers,
    exchange,
    frame,
    header,
    message,
)
from rpc_calls import turn

RUN = "/moltbot.v1.ChatService/RunTurn"
OPENED = PREFACE + frame(SETTINGS, 0, 0)


@pytest.fixture
async def hostile(tmp_path: Path) -> AsyncIterator[CoreProcess]:
    """A core in a process; at the end it must still serve, within its memory, and with nothing told of its inside."""
    async with core_process(tmp_path) as core:
        api = (await core.serving()).api()
        for _ in range(50):
            await api.run(turn())
        before = core.memory
        yield core
        assert core.process.returncode is None
        assert (await api.run(turn("still there?"), timeout=5)).completed.text == "You said: still there?"
        assert core.memory <= 1.2 * before, (core.memory, before)
        await api.channel.close()
    assert "Traceback" not in "\n".join(core.log)


def call(stream: int, headers: bytes, *bodies: bytes) -> bytes:
    """Return the frames of one call."""
    frames = frame(HEADERS, END_HEADERS, stream, headers)
    for body in bodies[:-1]:
        frames += frame(DATA, 0, stream, body)
    return frames + frame(DATA, END_STREAM, stream, bodies[-1] if bodies else b"")


async def all_of(core: CoreProcess, sent: list[bytes | list[bytes]]) -> bytes:
    """Send each on a connection of its own, some at a time, and return all that came back."""
    gate = asyncio.Semaphore(32)

    async def one(content: bytes | list[bytes]) -> bytes:
        async with gate:
            return await exchange(core.address, content, wait=0.2)

    return b"".join(await asyncio.gather(*(one(content) for content in sent)))


async def test_random_bytes(hostile: CoreProcess) -> None:
    chance = random.Random(7)
    noise: list[bytes | list[bytes]] = [chance.randbytes(chance.randrange(1, 4000)) for _ in range(100)]
    noise += [PREFACE + chance.randbytes(chance.randrange(1, 4000)) for _ in range(100)]
    noise += [OPENED + call(1, call_headers(RUN), message(chance.randbytes(200))) for _ in range(100)]

    answer = await all_of(hostile, noise)
    assert b"Traceback" not in answer
    assert b"Unexpected" not in answer


async def test_frames_cut_at_every_place(hostile: CoreProcess) -> None:
    whole = OPENED + call(1, call_headers(RUN), message(b"\x0a\x00"))

    assert b"Traceback" not in await all_of(hostile, [whole[:end] for end in range(0, len(whole), 3)])


async def test_frames_and_messages_that_lie_about_their_length(hostile: CoreProcess) -> None:
    headers = call_headers(RUN)
    lies: list[bytes | list[bytes]] = [
        OPENED + call(1, headers, message(b"abc", length=100)),
        OPENED + call(1, headers, message(b"abc" * 50, length=3)),
        OPENED + call(1, headers, message(b"", length=0xFFFFFFFF)),
        OPENED + call(1, headers, message(b"abc", length=0x7FFFFFFF)),
        OPENED + call(1, headers, message(b"abc", compressed=1)),
        OPENED + call(1, headers, message(b"abc", compressed=255)),
        OPENED + call(1, headers, b"\x00"),
        OPENED + call(1, headers),
        OPENED + call(1, headers, message(b""), message(b""), message(b"")),
        OPENED + b"\xff\xff\xff" + bytes((DATA, 0)) + b"\x00\x00\x00\x01" + b"x" * 1000,
        OPENED + frame(99, 255, 1, b"x" * 100) + call(1, headers, message(b"")),
        OPENED + frame(DATA, 0, 1, b"no headers before"),
        OPENED + frame(HEADERS, END_HEADERS, 2, headers),
        OPENED + frame(HEADERS, END_HEADERS, 0, headers),
        OPENED + frame(SETTINGS, 0, 0, b"\x00\x04\xff\xff\xff\xff"),
        OPENED + frame(RST_STREAM, 0, 1, b"\x00" * 4),
        PREFACE + call(1, headers, message(b"")),
        call(1, headers, message(b"")),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /moltbot.v1.ChatService/RunTurn HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200,
    ]
    answer = await all_of(hostile, lies)

    assert b"Traceback" not in answer


async def test_calls_that_never_say_anything_end_at_their_deadline_and_hold_nobody_up(hostile: CoreProcess) -> None:
    # What such a call waits for is gRPC's own; without a deadline it stays until its connection ends.
    silent = {
        "half-closed": (b"application/grpc", END_STREAM, None),
        "half-closed by empty data": (b"application/grpc", 0, END_STREAM),
        "left open": (b"application/grpc", 0, None),
        "text/plain": (b"text/plain", 0, END_STREAM),
        "text/plain, half-closed": (b"text/plain", END_STREAM, None),
    }
    for kind, (content_type, ends, data) in silent.items():
        for deadline in ([(b"grpc-timeout", b"300m")], []):
            headers = call_headers(RUN, content_type=content_type, more=deadline)
            frames = frame(HEADERS, END_HEADERS | ends, 1, headers)
            frames += b"" if data is None else frame(DATA, data, 1)
            refused = call(3, call_headers(RUN), message(b""))  # another call behind it, which has no key
            answer = await exchange(hostile.address, OPENED + frames + refused, wait=1.0)
            assert b"MISSING_CREDENTIAL" in answer or b"grpc-status\x0216" in answer, kind
            if deadline:
                assert frame(RST_STREAM, 0, 1, bytes(4)) in answer or b"Deadline Exceeded" in answer, kind
    many = frame(HEADERS, END_HEADERS | END_STREAM, 1, call_headers(RUN))
    assert b"Traceback" not in await all_of(hostile, [OPENED + many] * 300)


async def test_headers_that_are_wrong_or_endless(hostile: CoreProcess) -> None:
    many = b"".join(header(b"x-%d" % number, b"v" * 20) for number in range(10_000))
    wrong: list[bytes | list[bytes]] = [
        OPENED + call(1, call_headers(RUN, content_type=b"application/json"), message(b"")),
        OPENED + call(1, call_headers(RUN, content_type=b""), message(b"")),
        OPENED + call(1, call_headers(RUN, content_type=b"application/grpc+json"), message(b"")),
        OPENED + call(1, call_headers("/no.Such/Method"), message(b"")),
        OPENED + call(1, call_headers("no slash"), message(b"")),
        OPENED + call(1, call_headers("/" + "x" * 5000), message(b"")),
        OPENED + call(1, call_headers("/moltbot.v1.ChatService/RunTurn\x00"), message(b"")),
        OPENED + call(1, call_headers(RUN, more=[(b"authorization", b"Bearer \xff\xfe")]), message(b"")),
        OPENED + call(1, call_headers(RUN, more=[(b"authorization", b"Bearer x\r\nx: y")]), message(b"")),
        OPENED + call(1, call_headers(RUN, more=[(b"grpc-timeout", b"99999999999H")]), message(b"")),
        OPENED + call(1, call_headers(RUN, more=[(b"grpc-timeout", b"-1S")]), message(b"")),
        OPENED + call(1, call_headers(RUN, more=[(b"grpc-encoding", b"nonsense")]), message(b"", compressed=1)),
        OPENED + call(1, call_headers(RUN, more=[(b"x-bin", b"!!! not base64")]), message(b"")),
        OPENED + call(1, b"\x80\xff\xff\xff\xff\xff\xff", message(b"")),
        OPENED + frame(HEADERS, END_STREAM, 1, call_headers(RUN)) + frame(CONTINUATION, END_HEADERS, 1, many[:16000]),
        [
            OPENED + frame(HEADERS, END_STREAM, 1, call_headers(RUN)),
            *(frame(CONTINUATION, 0, 1, many[at : at + 16000]) for at in range(0, len(many), 16000)),
            *[frame(CONTINUATION, 0, 1, b"")] * 2000,
        ],
    ]

    assert b"Traceback" not in await all_of(hostile, wrong)


async def test_streams_opened_and_reset_at_once_take_room_that_has_an_end(tmp_path: Path) -> None:
    headers = call_headers(RUN)
    flood = [OPENED]
    flood += [
        frame(HEADERS, END_HEADERS, stream, headers) + frame(RST_STREAM, 0, stream, b"\x00\x00\x00\x08")
        for stream in range(1, 10_001, 2)
    ]
    async with core_process(tmp_path) as core:
        api = (await core.serving()).api()
        await api.run(turn())
        sizes = [core.memory]
        for _ in range(6):
            await all_of(core, [flood] * 4)
            assert (await api.run(turn(), timeout=5)).turn
            sizes.append(core.memory)
        await api.channel.close()

    # Thousands of calls at once take their room; it is used again, so that more floods take little more of it.
    assert max(sizes) <= 2.5 * sizes[0], sizes


async def test_pings_and_settings_without_end(hostile: CoreProcess) -> None:
    pings = [OPENED, *[frame(PING, 0, 0, b"12345678")] * 10_000]
    settings = [OPENED, *[frame(SETTINGS, 0, 0)] * 10_000]

    await all_of(hostile, [pings, settings])


async def test_connections_that_say_nothing(hostile: CoreProcess) -> None:
    host, _, port = hostile.address.rpartition(":")
    silent = [await asyncio.open_connection(host, int(port)) for _ in range(200)]

    api = hostile.api()
    assert (await api.run(turn(), timeout=5)).turn
    await api.channel.close()
    for _, writer in silent:
        writer.close()
