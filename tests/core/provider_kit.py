"""What tests of providers share: a listener that keeps what it hears, keys, a server that says given bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from moltbot_server.config_models import Provider, ProviderModel
from moltbot_server.models.engine import Finished
from moltbot_server.models.providers import ProviderEngine, ProviderKey
from moltbot_server.turns import GenerationOptions, Message, Notice, Part, Reset, Role, Routed, TextPart

WITHIN = 10.0


class Heard:
    """A listener that keeps what it hears."""

    def __init__(self) -> None:
        self.text = ""
        self.thoughts = ""
        self.pieces: list[str] = []
        self.end: asyncio.Future[Finished | Exception] = asyncio.get_running_loop().create_future()
        self.began = asyncio.Event()

    def queued(self, position: int) -> None:
        raise AssertionError("a remote model has no queue of ours")

    def noted(self, what: Routed | Notice | Reset) -> None:
        raise AssertionError("a remote model is no route")

    def wrote(self, text: str, tokens: int) -> None:
        assert not self.end.done(), "the end was told before"
        self.text += text
        self.pieces.append(text)
        self.began.set()

    def thought(self, text: str) -> None:
        self.thoughts += text

    def ended(self, end: Finished | Exception) -> None:
        self.end.set_result(end)

    async def finished(self) -> Finished:
        """Return a good end, or raise what broke the answer."""
        async with asyncio.timeout(WITHIN):
            end = await self.end
        if isinstance(end, Exception):
            raise end
        return end


class Ring:
    """Keys that a test may exchange."""

    def __init__(self, *keys: str) -> None:
        self.mine = [ProviderKey(id=f"key-{at}", text=text) for at, text in enumerate(keys)]
        self.asked: list[str] = []

    def keys(self, provider: str) -> Sequence[ProviderKey]:
        self.asked.append(provider)
        return self.mine


def said(*texts: str | Part, role: Role = Role.USER) -> Message:
    """A message of texts and other parts."""
    return Message(role=role, parts=tuple(TextPart(text=each) if isinstance(each, str) else each for each in texts))


HELLO = (said("Say it"),)


def provider(address: str, dialect: str = "openai", **fields: Any) -> Provider:
    """A provider at an address of this machine."""
    return Provider(name="mock", dialect=dialect, base_url=address, **fields)  # type: ignore[arg-type]


@asynccontextmanager
async def started(
    where: Provider, ring: Ring | None = None, model: ProviderModel | None = None, **given: Any
) -> AsyncGenerator[ProviderEngine, None]:
    """An engine that is started, and closed afterwards."""
    engine = ProviderEngine(where, model or ProviderModel(name="mock-model"), keys=ring or Ring("a-good-key"), **given)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


async def answered(
    engine: ProviderEngine, messages: Sequence[Message] = HELLO, options: GenerationOptions | None = None
) -> tuple[Heard, Finished]:
    """Ask and wait for a good end."""
    heard = Heard()
    engine.begin(messages, options or GenerationOptions(), heard)
    return heard, await heard.finished()


class Wire:
    """A server that answers each request with given bytes; `requests` are what it was sent, `connections` how many.

    `asked` is set with the first request, `empty` while no connection is open after one was. The list of its models is
    asked for by GET, is `listing`, and counts in `looks` alone.
    """

    def __init__(self, *answers: bytes, close: bool = False) -> None:
        """The last of the answers is given again and again; `|PAUSE|` parts what is sent. `close`: after each."""
        self.answers = list(answers)
        self.requests: list[bytes] = []
        self.looks: list[bytes] = []
        self.listing = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
        self.connections = 0
        self.asked, self.empty = asyncio.Event(), asyncio.Event()
        self._close = close
        self.address = ""
        self._writers: set[asyncio.StreamWriter] = set()

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[Wire, None]:
        """Serve on a free port."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            for writer in tuple(self._writers):
                writer.transport.abort()
            await server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        self.empty.clear()
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith(b"GET "):
                    self.looks.append(head)
                    writer.write(self.listing)
                    continue
                length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
                self.requests.append(head + await reader.readexactly(length))
                self.asked.set()
                answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                for piece in answer.split(b"|PAUSE|"):
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0.01 if b"|PAUSE|" in answer else 0)
                if self._close:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has left
        finally:
            writer.close()
            self._writers.discard(writer)
            if not self._writers:
                self.empty.set()


def stream(*events: str, head: str = "HTTP/1.1 200 OK", content_type: str = "text/event-stream") -> bytes:
    """A response in chunks with these events, each the JSON of one `data` line."""
    body = b"".join(f"data: {event}\n\n".encode() for event in events)
    return response(body, head=head, content_type=content_type)


def response(body: bytes, head: str = "HTTP/1.1 200 OK", content_type: str = "text/event-stream") -> bytes:
    """A response in one chunk."""
    chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
    return (
        f"{head}\r\nContent-Type: {content_type}\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + chunk + b"0\r\n\r\n"
    )


def word(text: str) -> str:
    """A chunk of the OpenAI dialect."""
    return f'{{"choices":[{{"index":0,"delta":{{"content":"{text}"}},"finish_reason":null}}]}}'


STOP = '{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}'
DONE = "[DONE]"
