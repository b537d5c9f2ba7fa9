"""HTTP/2 by hand, so that a test can say what no client would: frames as bytes on a socket."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Iterable

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, CONTINUATION = 0, 1, 3, 4, 6, 7, 9
END_STREAM, END_HEADERS = 1, 4


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return a frame."""
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def header(name: bytes, value: bytes) -> bytes:
    """Return a header as HPACK's literal that is not indexed."""
    return b"\x00" + _text(name) + _text(value)


def _text(value: bytes) -> bytes:
    if len(value) < 127:
        return bytes((len(value),)) + value
    rest, size = len(value) - 127, b"\x7f"
    while rest >= 128:
        size += bytes((rest % 128 + 128,))
        rest //= 128
    return size + bytes((rest,)) + value


def call_headers(
    method: str, *, content_type: bytes = b"application/grpc", more: Iterable[tuple[bytes, bytes]] = ()
) -> bytes:
    """Return the headers of a gRPC call."""
    fields = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", method.encode()),
        (b":authority", b"127.0.0.1"),
        (b"te", b"trailers"),
        (b"content-type", content_type),
        *more,
    ]
    return b"".join(header(name, value) for name, value in fields)


def message(body: bytes, *, length: int | None = None, compressed: int = 0) -> bytes:
    """Return a gRPC message; `length` is what its prefix says."""
    return bytes((compressed,)) + struct.pack(">I", len(body) if length is None else length) + body


async def exchange(address: str, sent: bytes | list[bytes], *, wait: float = 0.5) -> bytes:
    """Send bytes on a new connection and return what comes back until it is closed or silent for a while."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    answer = b""
    try:
        for piece in [sent] if isinstance(sent, bytes) else sent:
            writer.write(piece)
            await writer.drain()
        while True:
            try:
                got = await asyncio.wait_for(reader.read(1 << 16), wait)
            except TimeoutError:
                return answer
            if not got:
                return answer
            answer += got
    except ConnectionError:
        return answer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):  # the core may have closed it first
            await writer.wait_closed()
