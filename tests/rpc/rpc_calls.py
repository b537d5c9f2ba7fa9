"""Short ways to call a core and to read what it answers, for the tests of this folder."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc import aio
from moltbot.v1 import (
    chat_pb2,
    chat_pb2_grpc,
    inference_pb2_grpc,
    message_pb2,
    model_pb2,
    model_pb2_grpc,
    plugin_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
)
from moltbot_server.config import Settings
from moltbot_server.models.engine import NOBODY, Asker, Finished, Generation, Listener
from moltbot_server.testing import RunningServer, ScriptedEngine
from moltbot_server.turns import GenerationOptions, Message

LOOPBACK_NAME = "subjectAltName=IP:127.0.0.1"


class Api:
    """All services of a core on one channel; every call carries the key."""

    def __init__(self, channel: aio.Channel, metadata: tuple[tuple[str, str], ...]) -> None:
        self.channel = channel
        self.metadata = metadata
        self.chat = chat_pb2_grpc.ChatServiceStub(channel)
        self.sessions = session_pb2_grpc.SessionServiceStub(channel)
        self.models = model_pb2_grpc.ModelServiceStub(channel)
        self.inference = inference_pb2_grpc.InferenceServiceStub(channel)
        self.plugins = plugin_pb2_grpc.PluginServiceStub(channel)

    @classmethod
    def of(cls, server: RunningServer) -> Api:
        """Return the services of a running server."""
        return cls(server.channel(), server.metadata)

    def stream(self, turn: chat_pb2.TurnInput, **options: Any) -> Any:
        """Return the open call of a turn."""
        return self.chat.StreamTurn(chat_pb2.StreamTurnRequest(turn=turn), metadata=self.metadata, **options)

    async def events(self, turn: chat_pb2.TurnInput, **options: Any) -> list[chat_pb2.Event]:
        """Return all events of a turn."""
        return await drained(self.stream(turn, **options))

    async def run(self, turn: chat_pb2.TurnInput, **options: Any) -> chat_pb2.RunTurnResponse:
        """Return the outcome of a turn."""
        request = chat_pb2.RunTurnRequest(turn=turn)
        answer: chat_pb2.RunTurnResponse = await self.chat.RunTurn(request, metadata=self.metadata, **options)
        return answer

    async def resumed(self, name: str, after: int = 0) -> list[chat_pb2.Event]:
        """Return the events of a turn after a sequence number."""
        request = chat_pb2.ResumeTurnRequest(name=name, after_sequence=after)
        return await drained(self.chat.ResumeTurn(request, metadata=self.metadata))

    async def cancel(self, name: str) -> bool:
        """Cancel a turn and return whether this call ended it."""
        answer = await self.chat.CancelTurn(chat_pb2.CancelTurnRequest(name=name), metadata=self.metadata)
        return bool(answer.cancelled)

    async def messages(self, session: str) -> list[message_pb2.Message]:
        """Return a session's messages."""
        request = session_pb2.ListMessagesRequest(parent=session)
        return list((await self.sessions.ListMessages(request, metadata=self.metadata)).messages)

    async def said(self, session: str) -> list[str]:
        """Return the texts of a session's messages."""
        return ["".join(part.text for part in message.parts) for message in await self.messages(session)]

    async def session(self, name: str) -> session_pb2.Session:
        """Return a session."""
        request = session_pb2.GetSessionRequest(name=name)
        found: session_pb2.Session = (await self.sessions.GetSession(request, metadata=self.metadata)).session
        return found


class WatchedEngine(ScriptedEngine):
    """The scripted engine, which tells how many answers are being written and when the last one was let go."""

    running = 0
    let_go_at = 0.0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.read: list[list[str]] = []
        self.began = asyncio.Event()
        self.idle = asyncio.Event()

    def begin(
        self, messages: Sequence[Message], options: GenerationOptions, listener: Listener, asker: Asker = NOBODY
    ) -> Generation:
        """Answer from the script."""
        self.running += 1
        self.read.append([message.text for message in messages])
        self.idle.clear()
        self.began.set()
        watched = _Watched(self, listener)
        try:
            watched.generation = super().begin(messages, options, watched, asker)
        except BaseException:
            watched.let_go()
            raise
        return watched


class _Watched:
    """Stands between an engine and whoever listens to it, and notes when the answer is let go."""

    generation: Generation | None = None
    over = False

    def __init__(self, engine: WatchedEngine, listener: Listener) -> None:
        self.engine = engine
        self.listener = listener

    def queued(self, position: int) -> None:
        self.listener.queued(position)

    def wrote(self, text: str, tokens: int) -> None:
        self.listener.wrote(text, tokens)

    def ended(self, end: Finished | Exception) -> None:
        self.let_go()
        self.listener.ended(end)

    def stop(self) -> None:
        if self.generation is not None:
            self.generation.stop()
        self.let_go()

    def let_go(self) -> None:
        if self.over:
            return
        self.over = True
        self.engine.running -= 1
        self.engine.let_go_at = time.monotonic()
        if not self.engine.running:
            self.engine.idle.set()


def turn(text: str = "hello", **fields: Any) -> chat_pb2.TurnInput:
    """Return the input of a turn that says a text."""
    return chat_pb2.TurnInput(parts=[message_pb2.Part(text=text)], **fields)


async def drained(call: Any) -> list[chat_pb2.Event]:
    """Return the events of an open stream that were not read yet, to its end."""
    events = []
    while (response := await call.read()) is not aio.EOF:
        events.append(response.event)
    return events


def kinds(events: list[chat_pb2.Event]) -> list[str]:
    """Return what happened, in order."""
    return [str(event.WhichOneof("kind")) for event in events]


def text_of(events: list[chat_pb2.Event]) -> str:
    """Return the text of the deltas."""
    return "".join(event.text_delta.text for event in events)


def reason_of(error: aio.AioRpcError) -> str:
    """Return the reason of an error status, proving that it carries ErrorInfo of our domain."""
    return str(info_of(error).reason)


def info_of(error: aio.AioRpcError) -> Any:
    """Return the ErrorInfo of an error status."""
    for detail in details_of(error):
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            assert info.domain == "moltbot"
            return info
    raise AssertionError(f"{error.code()} {error.details()!r} has no ErrorInfo")


def fields_of(error: aio.AioRpcError) -> list[str]:
    """Return the request's fields that an error status blames."""
    violations = error_details_pb2.BadRequest()
    for detail in details_of(error):
        detail.Unpack(violations)
    return [violation.field for violation in violations.field_violations]


def details_of(error: aio.AioRpcError) -> list[Any]:
    """Return the packed details of an error status."""
    status = status_pb2.Status()
    trailers = dict(error.trailing_metadata() or ())
    status.ParseFromString(trailers["grpc-status-details-bin"])
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    return list(status.details)


async def refused(call: Any) -> aio.AioRpcError:
    """Return the error with which a call, unary or stream, ends."""
    try:
        if hasattr(call, "read"):
            while await call.read() is not aio.EOF:
                pass
        else:
            await call
    except aio.AioRpcError as error:
        return error
    raise AssertionError("the call was answered")


async def until(condition: Callable[[], object], within: float = 5.0) -> None:
    """Wait until something holds that nobody announces."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "it did not come to hold"
        await asyncio.sleep(0.005)


def settings(folder: Path, **more: object) -> Settings:
    """Return the settings of a core or an engine on ports that the system chooses."""
    return Settings(workspace=folder, grpc_port=0, metrics_port=0, port=0, **more)  # type: ignore[arg-type]


async def loaded(api: Api, request: model_pb2.LoadModelRequest) -> list[model_pb2.LoadModelResponse]:
    """Load a model and return all that is told of it."""
    return [step async for step in api.models.LoadModel(request, metadata=api.metadata)]


async def until_it_streams(call: Any, sign: str = "text_delta") -> None:
    """Read a stream up to an event of a kind."""
    while not (await call.read()).event.HasField(sign):
        pass


def certificate(folder: Path, name: str, holds: str = LOOPBACK_NAME) -> dict[str, Path]:
    """Return the settings of a certificate that vouches for itself."""
    folder.mkdir(exist_ok=True)
    cert, key = folder / f"{name}.crt", folder / f"{name}.key"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"]
    command += ["-addext", holds, "-keyout", str(key), "-out", str(cert)]
    try:
        subprocess.run(command, capture_output=True, check=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed, so no certificate can be made")
    return {"tls_cert": cert, "tls_key": key}
