"""An answer of the OpenAI dialect read off a line by line: cheap enough to load others, strict enough to catch lies.

A client of its own, because the official one takes more of a processor for a stream than what it is to measure.
"""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any

import msgspec

_CONTENT = re.compile(rb'"content":\s*"[^"]')
_END = b"\r\n0\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    model: str = ""
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


class Answer(msgspec.Struct):
    """What a stream said: `problem` is empty for a whole answer, `first` when its first word was there."""

    text: str = ""
    model: str = ""
    first: float = 0.0
    chunks: int = 0
    problem: str = ""


class Line(asyncio.Protocol):
    """One connection that is used for one request after the other."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._data = b""
        self._first = 0.0
        self._done: asyncio.Future[Answer] | None = None

    @classmethod
    async def to(cls, host: str, port: int) -> Line:
        """Return a new connection."""
        _, line = await asyncio.get_running_loop().create_connection(cls, host, port)
        return line

    @property
    def closed(self) -> bool:
        """Whether it cannot be used any more."""
        return self._transport is None

    async def ask(self, request: bytes) -> Answer:
        """Send a request and return what became of it."""
        self._data, self._first = b"", 0.0
        self._done = asyncio.get_running_loop().create_future()
        if self._transport is None:
            return Answer(problem="the connection was closed")
        self._transport.write(request)
        return await self._done

    def close(self) -> None:
        """Close it."""
        if self._transport is not None:
            self._transport.close()

    # --- called by the event loop ------------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        """Begin."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Take note of the first word, and of the end."""
        self._data += data
        if not self._first and _CONTENT.search(self._data):
            self._first = time.perf_counter()
        if self._data.endswith(_END) or self._is_whole():
            self._conclude(read(self._data, self._first))

    def connection_lost(self, problem: Exception | None) -> None:
        """Tell who waits."""
        self._transport = None
        self._conclude(Answer(problem="the connection broke", first=self._first))

    def _is_whole(self) -> bool:
        """Tell whether a body of a told length is all there."""
        head, found, body = self._data.partition(b"\r\n\r\n")
        length = _LENGTH.search(head) if found else None
        return length is not None and len(body) >= int(length[1])

    def _conclude(self, answer: Answer) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(answer)


def read(data: bytes, first: float) -> Answer:
    """Return what a whole response says."""
    head, _, body = data.partition(b"\r\n\r\n")
    status = head[9:12].decode("latin-1")
    if status != "200":
        return Answer(problem=f"HTTP {status} {body[:160].decode('utf-8', 'replace')}")
    if data.endswith(_END):
        body = _joined(body)
    answer = Answer(first=first)
    texts, finished, done = [], "", False
    for event in body.replace(b"\r\n", b"\n").split(b"\n\n"):
        if not event.startswith(b"data:"):
            continue
        payload = event[5:].strip()
        if payload == b"[DONE]":
            done = True
            continue
        chunk = _decode(payload)
        if chunk.error is not None:
            answer.problem = f"an error in the stream: {str(chunk.error)[:160]}"
        answer.model = chunk.model or answer.model
        for choice in chunk.choices:
            if choice.delta is not None and choice.delta.content:
                texts.append(choice.delta.content)
            finished = choice.finish_reason or finished
    answer.text, answer.chunks = "".join(texts), len(texts)
    if not answer.problem and (not done or finished != "stop"):
        answer.problem = f"the stream ended without {'a reason' if done else '[DONE]'}"
    return answer


def _joined(body: bytes) -> bytes:
    """Return a chunked body in one piece."""
    pieces: list[bytes] = []
    at = 0
    while True:
        end = body.index(b"\r\n", at)
        size = int(body[at:end].partition(b";")[0], 16)
        if not size:
            return b"".join(pieces)
        pieces.append(body[end + 2 : end + 2 + size])
        at = end + 4 + size
