"""The way to the core: a small pool of gRPC channels and the calls that adapters make, through the contract alone."""

import asyncio
import itertools
import json
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from moltbot.v1 import chat_pb2, chat_pb2_grpc, message_pb2, model_pb2, model_pb2_grpc, session_pb2, session_pb2_grpc

from moltbot_adapters.core_errors import CoreError, decode

Answer = TypeVar("Answer")

UNARY_LIMIT_S = 10.0
START_TRIES = 6
RESUME_TRIES = 10
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0
_MESSAGE_LIMIT = 16 * 1024 * 1024

# Only calls that may be repeated without a second thought are retried by the channel itself. Turns are retried below,
# with the same request id and only when the core cannot have refused them for a reason.
_REPEATABLE = (
    ("moltbot.v1.ModelService", ("GetModel", "ListModels")),
    ("moltbot.v1.SessionService", ("GetSession", "ListSessions", "ListMessages")),
    ("moltbot.v1.ChatService", ("CancelTurn",)),
)
_SERVICE_CONFIG = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{"service": service, "method": method} for service, ms in _REPEATABLE for method in ms],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "1s",
                    "backoffMultiplier": 3,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
)
_CHANNEL_OPTIONS: tuple[tuple[str, int | str], ...] = (
    # Channels with equal options would otherwise share one connection and its limit of concurrent streams.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.max_receive_message_length", _MESSAGE_LIMIT),
    ("grpc.max_send_message_length", _MESSAGE_LIMIT),
    ("grpc.enable_http_proxy", 0),
    ("grpc.service_config", _SERVICE_CONFIG),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """On whose behalf a call is made: the key that the core judges, and the id that ties logs together."""

    key: str = field(repr=False)
    request_id: str

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The gRPC metadata of a call for this caller."""
        return (("authorization", f"Bearer {self.key}"), ("x-request-id", self.request_id))


class _Link:
    """One channel and the stubs on it."""

    def __init__(self, target: str) -> None:
        self.channel = grpc.aio.insecure_channel(target, options=_CHANNEL_OPTIONS)
        self.chat = chat_pb2_grpc.ChatServiceStub(self.channel)
        self.sessions = session_pb2_grpc.SessionServiceStub(self.channel)
        self.models = model_pb2_grpc.ModelServiceStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)


class CoreClient:
    """Calls the core. Every call raises `CoreError` and nothing else when the core or the way to it fails."""

    def __init__(self, target: str, *, channels: int = 2, on_retry: Callable[[str], None] | None = None) -> None:
        """Makes the channels; they connect with the first call. `on_retry` hears `start` or `resume` at each retry."""
        self._links = [_Link(target) for _ in range(channels)]
        self._turns = itertools.cycle(self._links)
        self._on_retry = on_retry or (lambda kind: None)

    async def close(self) -> None:
        """Closes the channels; calls under way are cancelled."""
        for link in self._links:
            await link.channel.close()

    def _link(self) -> _Link:
        return next(self._turns)

    async def run_turn(self, turn: chat_pb2.TurnInput, caller: Caller, limit_s: float) -> chat_pb2.RunTurnResponse:
        """Runs a turn to its end. `turn.request_id` must be set: a broken connection is answered by the same call."""
        ends = asyncio.get_running_loop().time() + limit_s
        request = chat_pb2.RunTurnRequest(turn=turn)
        for tried in itertools.count(1):
            try:
                answer = await _answer(
                    self._link().chat.RunTurn(request, timeout=_left(ends), metadata=caller.metadata)
                )
                if tried > 1:
                    _check_uncut(turn, answer.completed)
                return answer
            except CoreError as error:
                if not error.connection_broke or tried >= START_TRIES:
                    raise
            self._on_retry("start")
            await asyncio.sleep(_pause_s(tried))
        raise AssertionError("the loop above has no end but return and raise")

    def stream_turn(
        self, turn: chat_pb2.TurnInput, caller: Caller, limit_s: float
    ) -> AsyncGenerator[chat_pb2.Event, None]:
        """Starts a turn and yields its events; `turn.request_id` must be set. Broken streams are resumed unseen."""
        return self._follow(turn, "", 0, caller, limit_s)

    def resume_turn(
        self, name: str, after: int, caller: Caller, limit_s: float
    ) -> AsyncGenerator[chat_pb2.Event, None]:
        """Yields the events of the turn `name` with a sequence number above `after`."""
        return self._follow(None, name, after, caller, limit_s)

    async def _follow(
        self, turn: chat_pb2.TurnInput | None, name: str, after: int, caller: Caller, limit_s: float
    ) -> AsyncGenerator[chat_pb2.Event, None]:
        ends = asyncio.get_running_loop().time() + limit_s
        last, tried, under_way, broke = after, 0, False, False
        while True:
            call = self._open(turn, name, last, caller, _left(ends))
            try:
                # read() and not `async for`: one generator less for each event.
                while isinstance(
                    response := await call.read(), (chat_pb2.StreamTurnResponse, chat_pb2.ResumeTurnResponse)
                ):
                    event = response.event
                    if event.sequence <= last:
                        continue
                    last, tried, under_way = event.sequence, 0, True
                    if not name and event.HasField("accepted"):
                        name = event.accepted.turn
                    if broke and event.HasField("completed"):
                        _check_uncut(turn, event.completed)
                    yield event
                return
            except grpc.aio.AioRpcError as error:
                failure = decode(error)
            finally:
                call.cancel()
            tried += 1
            if under_way and failure.reason == "TURN_NOT_FOUND":
                raise _interrupted("The core restarted while the turn ran; start it again.")
            worth_it = failure.connection_broke if under_way else failure.never_reached
            if not worth_it or tried >= (RESUME_TRIES if under_way else START_TRIES):
                raise failure
            broke = True
            self._on_retry("resume" if under_way else "start")
            await asyncio.sleep(_pause_s(tried))

    def _open(
        self, turn: chat_pb2.TurnInput | None, name: str, last: int, caller: Caller, within: float
    ) -> "grpc.aio.UnaryStreamCall[object, chat_pb2.StreamTurnResponse | chat_pb2.ResumeTurnResponse]":
        chat = self._link().chat
        if turn is not None and not name:
            return chat.StreamTurn(  # type: ignore[return-value]  # the two calls differ in their messages alone
                chat_pb2.StreamTurnRequest(turn=turn), timeout=within, metadata=caller.metadata
            )
        return chat.ResumeTurn(  # type: ignore[return-value]
            chat_pb2.ResumeTurnRequest(name=name, after_sequence=last), timeout=within, metadata=caller.metadata
        )

    async def cancel_turn(self, name: str, caller: Caller) -> bool:
        """Cancels a turn; returns whether this call ended it."""
        request = chat_pb2.CancelTurnRequest(name=name)
        call = self._link().chat.CancelTurn(request, timeout=UNARY_LIMIT_S, metadata=caller.metadata)
        return (await _answer(call)).cancelled

    async def list_sessions(
        self, user: str, channel: str, page_token: str, caller: Caller
    ) -> session_pb2.ListSessionsResponse:
        """Returns a page of sessions, the last used first."""
        request = session_pb2.ListSessionsRequest(user=user, channel=channel, page_token=page_token)
        call = self._link().sessions.ListSessions(request, timeout=UNARY_LIMIT_S, metadata=caller.metadata)
        return await _answer(call)

    async def list_messages(self, parent: str, page_token: str, caller: Caller) -> session_pb2.ListMessagesResponse:
        """Returns a page of a session's messages, oldest first."""
        request = session_pb2.ListMessagesRequest(parent=parent, page_token=page_token)
        call = self._link().sessions.ListMessages(request, timeout=UNARY_LIMIT_S, metadata=caller.metadata)
        return await _answer(call)

    async def delete_session(self, name: str, caller: Caller) -> None:
        """Deletes a session."""
        request = session_pb2.DeleteSessionRequest(name=name)
        await _answer(self._link().sessions.DeleteSession(request, timeout=UNARY_LIMIT_S, metadata=caller.metadata))

    async def list_models(self, caller: Caller) -> list[model_pb2.Model]:
        """Returns all models, the default one first."""
        models: list[model_pb2.Model] = []
        token = ""
        while True:
            request = model_pb2.ListModelsRequest(page_size=200, page_token=token)
            call = self._link().models.ListModels(request, timeout=UNARY_LIMIT_S, metadata=caller.metadata)
            page = await _answer(call)
            models.extend(page.models)
            token = page.next_page_token
            if not token:
                return models

    async def get_model(self, name: str, caller: Caller) -> model_pb2.Model:
        """Returns one model."""
        request = model_pb2.GetModelRequest(name=name)
        call = self._link().models.GetModel(request, timeout=UNARY_LIMIT_S, metadata=caller.metadata)
        return (await _answer(call)).model

    async def health(self) -> str:
        """Returns what the core's health service says, such as `SERVING`, or `UNREACHABLE`."""
        try:
            answer = await _answer(self._link().health.Check(health_pb2.HealthCheckRequest(), timeout=2.0))
        except CoreError:
            return "UNREACHABLE"
        status: str = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        return status


def _check_uncut(turn: chat_pb2.TurnInput | None, answer: chat_pb2.Completed) -> None:
    # A turn that ends with its connection was ended by the break that was just mended, and by nobody's wish.
    cancelled = answer.finish_reason == message_pb2.FINISH_REASON_CANCELLED
    if cancelled and turn is not None and turn.cancel_on_disconnect:
        raise _interrupted("The connection to the core broke while the turn ran; start it again.")


def _interrupted(message: str) -> CoreError:
    return CoreError(grpc.StatusCode.UNAVAILABLE, reason="TURN_INTERRUPTED", message=message)


async def _answer(call: Awaitable[Answer]) -> Answer:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise decode(error) from error


def _left(ends: float) -> float:
    # A deadline that has passed is still sent, as one that passes at once: the core answers DEADLINE_EXCEEDED.
    return max(ends - asyncio.get_running_loop().time(), 0.001)


def _pause_s(tried: int) -> float:
    return float(min(_FIRST_PAUSE_S * 2 ** (tried - 1), _LONGEST_PAUSE_S) * random.uniform(0.5, 1.0))
