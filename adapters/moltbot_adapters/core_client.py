"""The way to the core: a small pool of gRPC channels and the calls that adapters make, through the contract alone."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from moltbot import MoltBotClientError
from moltbot.calls import Calls, Method
from moltbot.channel import Ways
from moltbot.v1 import chat_pb2, model_pb2, session_pb2

Answer = TypeVar("Answer")

UNARY_LIMIT_S = 10.0
PATIENCE_S = 10.0
"""How long a turn waits for a core, or its store, that is away: a core that was killed is back in two seconds.

Then the page tells why and goes on trying, and so do the clients of the OpenAI API.
"""
_LEAVE_S = 10.0
_CHANNELS = 2
_MESSAGE_LIMIT = 16 * 1024 * 1024
_CHANNEL_OPTIONS: tuple[tuple[str, int | str], ...] = (
    # Channels with equal options would otherwise share one connection and its limit of concurrent streams.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_send_message_length", _MESSAGE_LIMIT),
    ("grpc.enable_http_proxy", 0),
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


class CoreClient:
    """Calls the core. Every call raises `MoltBotClientError` and nothing else when the core or the way to it fails.

    What breaks on the way, or a core that is started again, is mended unseen where that is safe.
    """

    def __init__(self, target: str, *, on_retry: Callable[[str], None] | None = None) -> None:
        """Makes the channels; they connect with the first call. `on_retry` hears `call`, `start` or `resume`.

        `target` may be several addresses, as of the workers of one machine: calls are spread over those that serve.
        """
        self._ways = Ways(target, None, copies=_CHANNELS, options=_CHANNEL_OPTIONS, spread=True)
        self._calls = Calls(self._ways, patience=PATIENCE_S, on_repeat=on_retry)
        self._leaving: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Ends the turns that were left, then closes the channels; calls under way are cancelled."""
        if self._leaving:
            await asyncio.wait(self._leaving, timeout=2.0)
        for task in self._leaving:
            task.cancel()
        await asyncio.gather(*self._leaving, return_exceptions=True)
        await self._ways.close()

    # --- turns ---------------------------------------------------------------------------------------------------

    async def run_turn(self, turn: chat_pb2.TurnInput, caller: Caller, limit_s: float) -> chat_pb2.RunTurnResponse:
        """Runs a turn to its end. `turn.request_id` must be set: a broken connection is answered by the same call."""
        request = chat_pb2.RunTurnRequest(turn=turn)
        return await self._call(lambda link: link.chat.RunTurn, request, caller, limit_s=limit_s, kind="start")

    def stream_turn(
        self, turn: chat_pb2.TurnInput, caller: Caller, limit_s: float
    ) -> AsyncGenerator[chat_pb2.Event, None]:
        """Starts a turn and yields its events; `turn.request_id` must be set. Broken streams are resumed unseen."""
        return self._calls.follow(turn, "", 0, caller.metadata, within=limit_s)

    def resume_turn(
        self, name: str, after: int, caller: Caller, limit_s: float
    ) -> AsyncGenerator[chat_pb2.Event, None]:
        """Yields the events of the turn `name` with a sequence number above `after`."""
        return self._calls.follow(None, name, after, caller.metadata, within=limit_s)

    async def accepted(self, turn: chat_pb2.TurnInput, caller: Caller, limit_s: float) -> str:
        """Starts a turn, or finds the one that the same request id started; returns its name."""
        async with aclosing(self.stream_turn(turn, caller, limit_s)) as events:
            async for event in events:
                return event.accepted.turn  # an accepted turn says its name at once
        raise MoltBotClientError(grpc.StatusCode.INTERNAL, "")  # the contract knows no stream without an event

    async def cancel_turn(self, name: str, caller: Caller) -> bool:
        """Cancels a turn; returns whether this call ended it."""
        request = chat_pb2.CancelTurnRequest(name=name)
        return (await self._call(lambda link: link.chat.CancelTurn, request, caller)).cancelled

    def leave(self, turn: chat_pb2.TurnInput, name: str, caller: Caller) -> None:
        """Has a turn cancelled whose reader is gone, without waiting for it. `name` is empty where it is not known.

        The core could do so by itself (`cancel_on_disconnect`), but it cannot tell a reader that left from a connection
        that broke, and a turn that ends with its connection does not outlive the core.
        """
        task = asyncio.create_task(self._leave(turn, name, caller))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _leave(self, turn: chat_pb2.TurnInput, name: str, caller: Caller) -> None:
        try:
            async with asyncio.timeout(_LEAVE_S):
                if not name:
                    name = await self.accepted(turn, caller, _LEAVE_S)
                await self.cancel_turn(name, caller)
        except (MoltBotClientError, TimeoutError):
            return  # it was never accepted, or runs to its end unheard

    # --- sessions and models -------------------------------------------------------------------------------------

    async def list_sessions(
        self, user: str, channel: str, page_token: str, caller: Caller
    ) -> session_pb2.ListSessionsResponse:
        """Returns a page of sessions, the last used first."""
        request = session_pb2.ListSessionsRequest(user=user, channel=channel, page_token=page_token)
        return await self._call(lambda link: link.sessions.ListSessions, request, caller)

    async def list_messages(self, parent: str, page_token: str, caller: Caller) -> session_pb2.ListMessagesResponse:
        """Returns a page of a session's messages, oldest first."""
        request = session_pb2.ListMessagesRequest(parent=parent, page_token=page_token)
        return await self._call(lambda link: link.sessions.ListMessages, request, caller)

    async def delete_session(self, name: str, caller: Caller) -> None:
        """Deletes a session."""
        request = session_pb2.DeleteSessionRequest(name=name)
        await self._call(lambda link: link.sessions.DeleteSession, request, caller, safe=False)

    async def list_models(self, caller: Caller) -> list[model_pb2.Model]:
        """Returns all models, the default one first."""
        models: list[model_pb2.Model] = []
        token = ""
        while True:
            request = model_pb2.ListModelsRequest(page_size=200, page_token=token)
            page = await self._call(lambda link: link.models.ListModels, request, caller)
            models.extend(page.models)
            token = page.next_page_token
            if not token:
                return models

    async def get_model(self, name: str, caller: Caller) -> model_pb2.Model:
        """Returns one model."""
        request = model_pb2.GetModelRequest(name=name)
        return (await self._call(lambda link: link.models.GetModel, request, caller)).model

    async def health(self, service: str = "") -> str:
        """Returns what the core's health service says of itself or a service, such as `SERVING`, or `UNREACHABLE`."""
        stub = health_pb2_grpc.HealthStub(self._ways.pick().channel)
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=2.0)
        except grpc.aio.AioRpcError as error:
            return "SERVICE_UNKNOWN" if error.code() is grpc.StatusCode.NOT_FOUND else "UNREACHABLE"
        status: str = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        return status

    async def _call(
        self,
        method: Method[Answer],
        request: Any,
        caller: Caller,
        *,
        limit_s: float = UNARY_LIMIT_S,
        safe: bool = True,
        kind: str = "call",
    ) -> Answer:
        return await self._calls.unary(method, request, caller.metadata, within=limit_s, safe=safe, kind=kind)
