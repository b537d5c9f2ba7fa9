"""ChatService: turns started, followed, resumed, cancelled; each stream is a follower of a recorded turn."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any

from grpc import aio
from moltbot.v1 import chat_pb2, chat_pb2_grpc

from moltbot_server.errors import (
    InternalError,
    InvalidField,
    MoltBotError,
    NotServing,
    QueueFull,
    Status,
    TurnFailed,
)
from moltbot_server.journal import Journal
from moltbot_server.live_turn import LiveTurn
from moltbot_server.pipeline import TurnPipeline
from moltbot_server.rpc import convert, names
from moltbot_server.rpc.interceptors import Call, PassedOn
from moltbot_server.rpc.peers import Peers
from moltbot_server.rpc.remote_errors import error_of
from moltbot_server.rpc.slow_readers import Reader, SlowReaders
from moltbot_server.store import StoredTurn
from moltbot_server.turns import Failed, TextDelta, TurnKey

log = logging.getLogger(__name__)

_LONGEST_REF = 128
_COMMANDS_AT_ONCE = 64
_COMMANDS_WAITING = 1024


class ChatService(chat_pb2_grpc.ChatServiceServicer):
    """Serves turns."""

    def __init__(self, pipeline: TurnPipeline, journal: Journal, reader: convert.Reader, peers: Peers) -> None:
        self._pipeline = pipeline
        self._journal = journal
        self._peers = peers
        self._reader = reader
        self._readers = SlowReaders()
        self._hearing: set[asyncio.Task[None]] = set()
        self._leaving = False

    def _start(self, spec: chat_pb2.TurnInput, call: Call) -> Coroutine[Any, Any, LiveTurn | StoredTurn]:
        turn = self._reader.turn(spec)
        return self._pipeline.start(call.principal, turn, deadline=call.deadline(), arrived=call.arrived)

    async def StreamTurn(self, request: chat_pb2.StreamTurnRequest, call: Call) -> None:  # type: ignore[override]
        """Start a turn, or follow the one of the same request_id, and stream its events."""
        try:
            turn = await self._start(request.turn, call)
            await self._write_events(turn, 0, chat_pb2.StreamTurnResponse, call)
        except NotServing as elsewhere:
            await self._pass_through("StreamTurn", request, call, elsewhere)

    async def RunTurn(self, request: chat_pb2.RunTurnRequest, call: Call) -> chat_pb2.RunTurnResponse:  # type: ignore[override]
        """Start a turn, or attach to the one of the same request_id, and answer when it has ended."""
        try:
            turn = await self._start(request.turn, call)
            key, last_sequence, ending = await self._journal.outcome(turn)
        except NotServing as elsewhere:
            answer: chat_pb2.RunTurnResponse = await self._peers.unary("RunTurn", request, call, elsewhere)
            return answer
        if isinstance(ending, Failed):
            status, after = Status(ending.status), ending.retry_after
            raise TurnFailed(status, ending.reason, ending.message, ending.retryable, after, ending.field)
        name = names.turn_name(key.session.session, key.ordinal)
        response = chat_pb2.RunTurnResponse(turn=name, last_sequence=last_sequence)
        convert.fill_completed(response.completed, key, ending)
        return response

    async def ResumeTurn(self, request: chat_pb2.ResumeTurnRequest, call: Call) -> None:  # type: ignore[override]
        """Stream the events of a turn that come after a sequence number."""
        key, after = self._resumed(request, call)
        try:
            await self._write_events(await self._journal.find(key), after, chat_pb2.ResumeTurnResponse, call)
        except NotServing as elsewhere:
            await self._pass_through("ResumeTurn", request, call, elsewhere)

    async def CancelTurn(self, request: chat_pb2.CancelTurnRequest, call: Call) -> chat_pb2.CancelTurnResponse:  # type: ignore[override]
        """End a running turn and keep its text."""
        return await self._cancel(request, "name", call)

    async def Converse(self, requests: AsyncIterator[chat_pb2.ConverseRequest], call: Call) -> None:  # type: ignore[override]
        """Carry out commands as they come; the stream ends when the caller has no more and all turns are delivered."""
        with self._readers.new() as reader:
            conversation = _Conversation(self, call, reader)
            try:
                async with asyncio.TaskGroup() as group:
                    hearing = group.create_task(conversation.hear(requests, group))
                    self._hearing.add(hearing)
                    hearing.add_done_callback(self._hearing.discard)
                    if self._leaving:
                        hearing.cancel()
            except ExceptionGroup as failed:
                # What breaks the stream itself, such as a request that is no message; commands fail in-band.
                raise failed.exceptions[0] from None
            if hearing.cancelled():
                raise NotServing("the core is leaving; converse with another one", retry_after=1.0)

    def leave(self) -> None:
        """Hear no more commands: conversations end when what they have begun has."""
        self._leaving = True
        for hearing in self._hearing:
            hearing.cancel()

    async def _write_events(
        self,
        turn: LiveTurn | StoredTurn,
        after: int,
        make: type[chat_pb2.StreamTurnResponse] | type[chat_pb2.ResumeTurnResponse],
        call: Call,
    ) -> None:
        """Write a turn's events after a sequence number. All text goes out in one message: `write` copies it."""
        said = make()
        event, delta = said.event, said.event.text_delta
        write = call.context.write
        with self._readers.new() as reader, self._journal.follow(turn, after) as batches:
            async for batch in batches:
                for recorded in batch:
                    kind = recorded.kind
                    reader.steps += 1
                    if isinstance(kind, TextDelta):
                        event.sequence = recorded.sequence
                        delta.text = kind.text
                        await write(said)
                    else:
                        response = make()
                        convert.fill_event(response.event, _key(turn), recorded)
                        await write(response)
                    reader.steps += 1

    async def _pass_through(self, method: str, request: Any, call: Call, elsewhere: NotServing) -> None:
        """Write what another node streams."""
        with self._readers.new() as reader:
            async with aclosing(self._peers.stream(method, request, call, elsewhere)) as responses:
                async for response in responses:
                    reader.steps += 1
                    await call.context.write(response)
                    reader.steps += 1

    def _resumed(self, request: chat_pb2.ResumeTurnRequest, call: Call) -> tuple[TurnKey, int]:
        if request.after_sequence < 0:
            raise InvalidField("after_sequence", "use 0 or the last sequence number that you saw")
        return names.read_turn(call.principal.workspace, request.name, "name"), request.after_sequence

    async def _cancel(self, request: chat_pb2.CancelTurnRequest, field: str, call: Call) -> chat_pb2.CancelTurnResponse:
        key = names.read_turn(call.principal.workspace, request.name, field)
        try:
            turn = await self._journal.find(key)
        except NotServing as elsewhere:
            answer: chat_pb2.CancelTurnResponse = await self._peers.unary("CancelTurn", request, call, elsewhere)
            return answer
        if not isinstance(turn, LiveTurn):
            return chat_pb2.CancelTurnResponse(cancelled=False)
        cancelled = turn.cancel()
        await turn.outcome()
        return chat_pb2.CancelTurnResponse(cancelled=cancelled)


class _Conversation:
    """One `Converse` stream: its commands run side by side, its answers are written one at a time."""

    def __init__(self, service: ChatService, call: Call, reader: Reader) -> None:
        self._service = service
        self._call = call
        self._reader = reader
        self._writing = asyncio.Lock()
        self._free = asyncio.Semaphore(_COMMANDS_AT_ONCE)
        self._cancels = asyncio.Semaphore(_COMMANDS_AT_ONCE)
        self._commands = 0

    async def hear(self, requests: AsyncIterator[chat_pb2.ConverseRequest], group: asyncio.TaskGroup) -> None:
        """Begin the commands as they come."""
        async for request in requests:
            await self.take(request, group)

    async def take(self, request: chat_pb2.ConverseRequest, group: asyncio.TaskGroup) -> None:
        """Begin a command. It waits for its turn by itself: waiting here would keep the cancels behind it unread."""
        if self._commands >= _COMMANDS_WAITING:
            busy = QueueFull(f"{_COMMANDS_WAITING} commands are under way on this stream already", retry_after=1.0)
            await self._write(request, "", error=_in_band(busy))
            return
        self._commands += 1
        # To cancel is what makes room, so it never waits for the turns.
        room = self._cancels if request.WhichOneof("command") == "cancel" else self._free
        group.create_task(self._carry_out(request, room))

    async def _carry_out(self, request: chat_pb2.ConverseRequest, room: asyncio.Semaphore) -> None:
        await room.acquire()
        try:
            await self._answer(request)
        except MoltBotError as error:
            await self._write(request, "", error=_in_band(error))
        except PassedOn as refused:
            await self._write(request, "", error=_in_band(error_of(refused.problem, "the other core")))
        except aio.InternalError:
            raise  # the peer left while a write was under way
        except Exception:
            incident = secrets.token_hex(4)
            log.exception("a command failed", extra={"incident": incident})
            unforeseen = InternalError(f"something went wrong (incident {incident})")
            await self._write(request, "", error=_in_band(unforeseen))
        finally:
            room.release()
            self._commands -= 1

    async def _answer(self, request: chat_pb2.ConverseRequest) -> None:
        service, call = self._service, self._call
        if len(request.ref) > _LONGEST_REF:
            raise InvalidField("ref", f"use at most {_LONGEST_REF} characters")
        command = request.WhichOneof("command")
        if command == "start":
            try:
                turn = await service._start(request.start, call)
                await self._follow(request, turn, _key(turn), 0)
            except NotServing as elsewhere:
                started = chat_pb2.StreamTurnRequest(turn=request.start)
                await self._pass_through("StreamTurn", started, request.ref, "", elsewhere)
        elif command == "resume":
            key, after = service._resumed(request.resume, call)
            try:
                await self._follow(request, await service._journal.find(key), key, after)
            except NotServing as elsewhere:
                await self._pass_through("ResumeTurn", request.resume, request.ref, request.resume.name, elsewhere)
        elif command == "cancel":
            answer = await service._cancel(request.cancel, "cancel.name", call)
            await self._write(request, request.cancel.name, cancelled=answer)
        else:
            raise InvalidField("command", "set one of start, resume, cancel")

    async def _follow(
        self, request: chat_pb2.ConverseRequest, turn: LiveTurn | StoredTurn, key: TurnKey, after: int
    ) -> None:
        with self._service._journal.follow(turn, after) as batches:
            async for batch in batches:
                key = _key(turn)
                name = names.turn_name(key.session.session, key.ordinal)
                for recorded in batch:
                    response = chat_pb2.ConverseResponse(ref=request.ref, turn=name)
                    convert.fill_event(response.event, key, recorded)
                    await self._send(response)

    async def _pass_through(self, method: str, request: Any, ref: str, turn: str, elsewhere: NotServing) -> None:
        """Write what another node streams of a turn; the first event of one that was started names it."""
        peers = self._service._peers
        async with aclosing(peers.stream(method, request, self._call, elsewhere)) as responses:
            async for response in responses:
                turn = response.event.accepted.turn or turn
                await self._send(chat_pb2.ConverseResponse(ref=ref, turn=turn, event=response.event))

    async def _write(self, request: chat_pb2.ConverseRequest, turn: str, **answer: Any) -> None:
        await self._send(chat_pb2.ConverseResponse(ref=request.ref, turn=turn, **answer))

    async def _send(self, response: chat_pb2.ConverseResponse) -> None:
        async with self._writing:
            self._reader.steps += 1
            await self._call.context.write(response)
            self._reader.steps += 1


def _key(turn: LiveTurn | StoredTurn) -> TurnKey:
    """Return the name under which a turn is told: that of the turn in whose place it stands, if it does."""
    if isinstance(turn, LiveTurn):
        turn = turn.latest
        if turn.duplicate_of is not None:
            return turn.duplicate_of.key
    return turn.key


def _in_band(error: MoltBotError) -> chat_pb2.ConverseError:
    return chat_pb2.ConverseError(
        code=int(error.status),
        reason=error.reason,
        message=error.message,
        retryable=error.retryable,
        retry_delay=None if error.retry_after is None else convert.duration(error.retry_after),
    )
