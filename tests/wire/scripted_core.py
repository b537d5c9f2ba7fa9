"""A core that plays scripts: the contract's services on a real port, without models, pipeline or storage."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from moltbot.v1 import (
    chat_pb2,
    chat_pb2_grpc,
    message_pb2,
    model_pb2,
    model_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
)

KEY = "mb_test_key"


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A status that a call ends with. Without a reason it looks like the transport's own."""

    code: grpc.StatusCode
    reason: str = ""
    message: str = "refused by the script"
    retry_s: float | None = None
    field: str = ""

    def trailers(self) -> tuple[tuple[str, bytes], ...]:
        """Returns the details as trailing metadata."""
        if not self.reason:
            return ()
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        status.details.add().Pack(error_details_pb2.ErrorInfo(reason=self.reason, domain="moltbot"))
        if self.retry_s is not None:
            delay = Duration()
            delay.FromMilliseconds(int(self.retry_s * 1000))
            status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        if self.field:
            violation = error_details_pb2.BadRequest.FieldViolation(field=self.field, description=self.message)
            status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
        return (("grpc-status-details-bin", status.SerializeToString()),)


@dataclass(kw_only=True)
class Script:
    """How turns go: what is said, what goes wrong, and what waits for the test."""

    pieces: tuple[str, ...] = ("Hello", ", ", "world", "!")
    refusals: list[Refusal] = field(default_factory=list)
    """Each ends one call that starts a turn, before the next ones are heard."""
    cut_after: set[int] = field(default_factory=set)
    """Sequence numbers after which a stream breaks, once each."""
    cut_with: Refusal = field(default_factory=lambda: Refusal(code=grpc.StatusCode.UNAVAILABLE))
    resume_refusals: list[Refusal] = field(default_factory=list)
    failed: chat_pb2.Failed | None = None
    reset: chat_pb2.Reset | None = None
    """Comes after the pieces."""
    thoughts: tuple[str, ...] = ()
    """Come before the pieces."""
    switch: str = ""
    """Another model that takes over after the first piece, as `models/{model}`."""
    completion: chat_pb2.Completed = field(default_factory=chat_pb2.Completed)
    """What the last event says besides."""
    finish: "message_pb2.FinishReason.ValueType" = message_pb2.FINISH_REASON_STOP
    gate: asyncio.Event | None = None
    """The turn waits for it after its first piece."""
    silent: bool = False
    """The turn waits for the gate before its first piece."""
    endless: bool = False
    """The pieces are said over and over, as fast as the reader takes them."""


class ScriptedTurn:
    """A turn that runs by itself; streams follow what it recorded."""

    def __init__(self, turn: chat_pb2.TurnInput, number: int, script: Script) -> None:
        session = turn.session or f"sessions/s{number}"
        self.input = turn
        self.name = f"{session}/turns/t{number}"
        self.session = session
        self.events: list[chat_pb2.Event] = []
        self.news = asyncio.Condition()
        self.ended = False
        self.cancelled = asyncio.Event()
        self._script = script

    async def tell(self, **kind: object) -> None:
        """Records one event."""
        async with self.news:
            event = chat_pb2.Event(sequence=len(self.events) + 1, **kind)  # type: ignore[arg-type]
            self.events.append(event)
            self.ended = event.HasField("completed") or event.HasField("failed")
            self.news.notify_all()

    async def play(self) -> None:
        """Plays the script."""
        script = self._script
        text = ""
        await self.tell(
            accepted=chat_pb2.Accepted(
                turn=self.name,
                session=self.session,
                message=f"{self.session}/messages/m1",
                request_id=self.input.request_id,
            )
        )
        await self.tell(routed=chat_pb2.Routed(model=self.input.model or "models/demo", reason="default"))
        if script.silent and script.gate is not None:
            await self._wait(script.gate)
        for thought in script.thoughts:
            await self.tell(reasoning_delta=chat_pb2.ReasoningDelta(text=thought))
        for index, piece in enumerate(script.pieces):
            text += piece
            await self.tell(text_delta=chat_pb2.TextDelta(text=piece))
            if index == 0 and script.switch:
                await self.tell(routed=chat_pb2.Routed(model=script.switch, reason="the other one broke"))
            if index == 0 and script.gate is not None:
                await self._wait(script.gate)
            if self.cancelled.is_set():
                break
        while script.endless and not self.cancelled.is_set():
            await self.tell(text_delta=chat_pb2.TextDelta(text="x" * 10_000))
            await asyncio.sleep(0.001)
        if script.reset is not None:
            text = script.reset.text
            await self.tell(reset=script.reset)
        if script.failed is not None:
            await self.tell(failed=script.failed)
            return
        finish = message_pb2.FINISH_REASON_CANCELLED if self.cancelled.is_set() else script.finish
        await self.tell(completed=_completed(text, finish, self, script.completion))

    async def _wait(self, gate: asyncio.Event) -> None:
        waits = [asyncio.create_task(gate.wait()), asyncio.create_task(self.cancelled.wait())]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    async def follow(self, after: int) -> AsyncIterator[chat_pb2.Event]:
        """Yields the events after a sequence number."""
        while True:
            async with self.news:
                while not self.ended and len(self.events) <= after:
                    await self.news.wait()
                fresh = self.events[after:]
            for event in fresh:
                yield event
            after = max(after, len(self.events) if not fresh else fresh[-1].sequence)
            if self.ended and after >= len(self.events):
                return


def _completed(
    text: str, finish: "message_pb2.FinishReason.ValueType", turn: ScriptedTurn, besides: chat_pb2.Completed
) -> chat_pb2.Completed:
    completed = chat_pb2.Completed(
        text=text,
        finish_reason=finish,
        usage=message_pb2.Usage(input_tokens=7, output_tokens=4, cached_input_tokens=2),
        timings=chat_pb2.Timings(total=Duration(nanos=12_500_000), attempts=1, history_messages=3),
        model=turn.input.model or "models/demo",
        message=f"{turn.session}/messages/m2",
    )
    completed.MergeFrom(besides)
    return completed


class ScriptedCore(
    chat_pb2_grpc.ChatServiceServicer, session_pb2_grpc.SessionServiceServicer, model_pb2_grpc.ModelServiceServicer
):
    """Serves the contract on 127.0.0.1. Set `script` before a turn starts; look at `turns` and `calls` afterwards."""

    def __init__(self) -> None:
        self.script = Script()
        self.turns: list[ScriptedTurn] = []
        self.begun = asyncio.Event()
        """Set when a turn has begun."""
        self.calls: list[tuple[str, dict[str, str]]] = []
        self.deadlines: list[float | None] = []
        self.sessions: list[session_pb2.Session] = [_session()]
        self.key = KEY
        self.port = 0
        self._playing: set[asyncio.Task[None]] = set()
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()

    async def start(self) -> None:
        """Serves, on the same port as before when it served before."""
        server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        chat_pb2_grpc.add_ChatServiceServicer_to_server(self, server)
        session_pb2_grpc.add_SessionServiceServicer_to_server(self, server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(self, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        self.port = server.add_insecure_port(f"127.0.0.1:{self.port}")
        await server.start()
        self._server = server

    async def stop(self) -> None:
        """Stops at once; connections are cut."""
        for task in self._playing:
            task.cancel()
        await asyncio.gather(*self._playing, return_exceptions=True)
        if self._server is not None:
            await self._server.stop(None)

    async def leave_serving(self) -> None:
        """Says NOT_SERVING from now on."""
        await self._health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)

    async def tell_store(self, *, away: bool) -> None:
        """Says of its store that it is away, or there."""
        known = health_pb2.HealthCheckResponse
        await self._health.set("moltbot.store", known.NOT_SERVING if away else known.SERVING)

    def names(self) -> list[str]:
        """Returns the methods that were called, in order."""
        return [name for name, _ in self.calls]

    async def _heard(self, name: str, context: grpc.aio.ServicerContext[object, object]) -> None:
        metadata = {str(key): str(value) for key, value in context.invocation_metadata() or ()}
        self.calls.append((name, metadata))
        self.deadlines.append(context.time_remaining())
        if metadata.get("authorization") != f"Bearer {self.key}":
            await _refuse(
                context,
                Refusal(code=grpc.StatusCode.UNAUTHENTICATED, reason="UNAUTHENTICATED", message="no such key"),
            )

    def _begin(self, turn: chat_pb2.TurnInput) -> ScriptedTurn:
        for known in self.turns:
            if known.input.request_id == turn.request_id:
                return known
        begun = ScriptedTurn(turn, len(self.turns) + 1, self.script)
        self.turns.append(begun)
        self.begun.set()
        task = asyncio.create_task(begun.play())
        self._playing.add(task)
        task.add_done_callback(self._playing.discard)
        return begun

    def _find(self, name: str) -> ScriptedTurn | None:
        return next((turn for turn in self.turns if turn.name == name), None)

    async def StreamTurn(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        """Plays a turn, or refuses it as the script says."""
        await self._heard("StreamTurn", context)
        if self.script.refusals:
            await _refuse(context, self.script.refusals.pop(0))
        await self._stream(self._begin(request.turn), 0, chat_pb2.StreamTurnResponse, context)

    async def ResumeTurn(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        """Follows a turn that was played."""
        await self._heard("ResumeTurn", context)
        if self.script.resume_refusals:
            await _refuse(context, self.script.resume_refusals.pop(0))
        turn = self._find(request.name)
        if turn is None:
            await _refuse(context, Refusal(code=grpc.StatusCode.NOT_FOUND, reason="TURN_NOT_FOUND"))
        await self._stream(turn, request.after_sequence, chat_pb2.ResumeTurnResponse, context)

    async def _stream(self, turn, after, response, context):  # type: ignore[no-untyped-def]
        try:
            async for event in turn.follow(after):
                await context.write(response(event=event))
                if event.sequence in self.script.cut_after:
                    self.script.cut_after.discard(event.sequence)
                    await _refuse(context, self.script.cut_with)
        except (asyncio.CancelledError, grpc.aio.InternalError):  # the second is what a write that waits gets
            if turn.input.cancel_on_disconnect:
                turn.cancelled.set()
            raise

    async def RunTurn(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        """Plays a turn and answers its end."""
        await self._heard("RunTurn", context)
        if self.script.refusals:
            await _refuse(context, self.script.refusals.pop(0))
        turn = self._begin(request.turn)
        try:
            async for event in turn.follow(0):
                last = event
        except asyncio.CancelledError:
            if turn.input.cancel_on_disconnect:
                turn.cancelled.set()
            raise
        return chat_pb2.RunTurnResponse(turn=turn.name, completed=last.completed, last_sequence=last.sequence)

    async def CancelTurn(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        """Cancels a turn that is played."""
        await self._heard("CancelTurn", context)
        turn = self._find(request.name)
        if turn is None:
            await _refuse(context, Refusal(code=grpc.StatusCode.NOT_FOUND, reason="TURN_NOT_FOUND"))
        running = not turn.ended
        turn.cancelled.set()
        return chat_pb2.CancelTurnResponse(cancelled=running)

    async def ListSessions(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        """Lists one session for each page."""
        await self._heard("ListSessions", context)
        if request.page_token not in ("", "page-2"):
            await _refuse(context, Refusal(code=grpc.StatusCode.INVALID_ARGUMENT, reason="INVALID_PAGE_TOKEN"))
        found = [s for s in self.sessions if s.user == request.user and s.channel == request.channel]
        page = found[1:] if request.page_token else found[:1]
        token = "page-2" if not request.page_token and len(found) > 1 else ""
        return session_pb2.ListSessionsResponse(sessions=page, next_page_token=token)

    async def ListMessages(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        """Lists a question, an answer and a system message of every known session."""
        await self._heard("ListMessages", context)
        if request.parent not in {session.name for session in self.sessions}:
            await _refuse(context, Refusal(code=grpc.StatusCode.NOT_FOUND, reason="SESSION_NOT_FOUND"))
        roles = (message_pb2.ROLE_SYSTEM, message_pb2.ROLE_USER, message_pb2.ROLE_ASSISTANT)
        return session_pb2.ListMessagesResponse(
            messages=[
                message_pb2.Message(
                    name=f"{request.parent}/messages/m{number}",
                    role=role,
                    parts=[message_pb2.Part(text=f"text {number}")],
                    create_time=Timestamp(seconds=1_700_000_000),
                    turn=f"{request.parent}/turns/t1",
                    model="models/demo" if role == message_pb2.ROLE_ASSISTANT else "",
                    finish_reason=message_pb2.FINISH_REASON_LENGTH if role == message_pb2.ROLE_ASSISTANT else None,
                )
                for number, role in enumerate(roles)
            ]
        )

    async def DeleteSession(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        """Deletes a known session."""
        await self._heard("DeleteSession", context)
        known = [session for session in self.sessions if session.name == request.name]
        if not known:
            await _refuse(context, Refusal(code=grpc.StatusCode.NOT_FOUND, reason="SESSION_NOT_FOUND"))
        self.sessions.remove(known[0])
        return session_pb2.DeleteSessionResponse()

    async def GetModel(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        """Answers the one model that there is."""
        await self._heard("GetModel", context)
        if request.name != "models/demo":
            await _refuse(
                context,
                Refusal(code=grpc.StatusCode.NOT_FOUND, reason="MODEL_NOT_FOUND", message="no such model"),
            )
        return model_pb2.GetModelResponse(model=_model())

    async def ListModels(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        """Lists the one model that there is, and one that cannot answer."""
        await self._heard("ListModels", context)
        broken = model_pb2.Model(name="models/broken", state=model_pb2.MODEL_STATE_FAILED)
        return model_pb2.ListModelsResponse(models=[_model(), broken])


def _model() -> model_pb2.Model:
    return model_pb2.Model(
        name="models/demo",
        display_name="MoltBot demo",
        state=model_pb2.MODEL_STATE_READY,
        is_default=True,
        load_time=Timestamp(seconds=1_700_000_000),
    )


def _session() -> session_pb2.Session:
    return session_pb2.Session(
        name="sessions/first",
        title="A first chat",
        user="owner",
        channel="web",
        update_time=Timestamp(seconds=1_700_000_000),
        message_count=2,
        active_turn=chat_pb2.Turn(name="sessions/first/turns/t9", last_sequence=5),
    )


async def _refuse(context: "grpc.aio.ServicerContext[object, object]", refusal: Refusal) -> None:
    await context.abort(refusal.code, refusal.message, trailing_metadata=refusal.trailers())
