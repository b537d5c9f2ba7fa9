"""An asyncio client of a MoltBot core: turns that survive a broken connection, sessions and models as iterators."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import grpc

from moltbot.answer import tool_calls
from moltbot.calls import Calls, Method
from moltbot.channel import Ways
from moltbot.credentials import find_address, find_key
from moltbot.deliveries import Delivery, receive
from moltbot.errors import from_status
from moltbot.v1 import chat_pb2, message_pb2, model_pb2, session_pb2

_Answer = TypeVar("_Answer")
_BUSY = "WHEN_BUSY_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A whole answer. `completed` has what else the core told: usage, timings, model, attachments."""

    turn: str
    completed: chat_pb2.Completed

    @property
    def text(self) -> str:
        """The answer's text."""
        return self.completed.text

    @property
    def tool_calls(self) -> list[message_pb2.ToolCall]:
        """The tools that the answer asks to be called; `moltbot.tools.result` makes the parts to go on with."""
        return tool_calls(self.completed)

    @property
    def session(self) -> str:
        """The session's name, to go on with: `sessions/{session}`."""
        return self.turn.partition("/turns/")[0]


class _Page(Protocol):
    @property
    def next_page_token(self) -> str: ...


_AnyPage = TypeVar("_AnyPage", bound=_Page)


class MoltBot:
    """A connection to a core, as an asynchronous context.

    Without `address`, the variable `MOLTBOT_ADDRESS` is used, or what runs in this user's workspace, or
    127.0.0.1:50051; several addresses are separated by commas (`a:50051,b:50051`, or `dns:///name:50051`) and tried in
    turn. Without `key`, it is the variable `MOLTBOT_KEY` or the key file of that workspace. `credentials` turns on TLS,
    as in `grpc.ssl_channel_credentials()`.

    What breaks on the way, or a core that is started again, is waited for and mended unseen, up to `patience` seconds
    without any progress (60 by default, and 5 as long as no core has ever answered); `on_repeat` hears `call`, `start`,
    `resume` or `receive` each time. With `resume=False` every break is told. Every call raises `MoltBotClientError` and
    nothing else when the core or the way to it fails. `within` is the seconds that a call may take to its end; None
    waits as long as it takes.
    """

    def __init__(
        self,
        address: str | None = None,
        key: str | None = None,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        patience: float | None = None,
        resume: bool = True,
        on_repeat: Callable[[str], None] | None = None,
    ) -> None:
        self._metadata = (("authorization", f"Bearer {key or find_key()}"),)
        self._ways = Ways(address or find_address(), credentials)
        limits = {} if patience is None else {"patience": patience, "first_contact": patience}
        self._calls = Calls(self._ways, resume=resume, on_repeat=on_repeat, **limits)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection. Turns under way go on in the core and can be resumed."""
        await self._ways.close()

    # --- turns ---------------------------------------------------------------------------------------------------

    def stream_turn(
        self,
        content: str | Sequence[message_pb2.Part],
        *,
        session: str = "",
        request_id: str = "",
        within: float | None = None,
        **fields: Any,
    ) -> AsyncGenerator[chat_pb2.Event, None]:
        """Say something and yield the events of the answer; the last one is `completed` or `failed`.

        A broken connection or a killed core is mended unseen: the turn goes on in the core, or in the next one, and is
        followed from the last event on. No event is missing and none comes twice. A `reset` event takes back what was
        said before: `Answer` puts the text together. Closing the generator closes the call, and the turn goes on.
        `fields` are further fields of the contract's `TurnInput`, such as `model`, `user`, `options` or `channel`.
        """
        turn = _turn(content, session, request_id, fields)
        return self._calls.follow(turn, "", 0, self._metadata, within=within)

    async def run_turn(
        self,
        content: str | Sequence[message_pb2.Part],
        *,
        session: str = "",
        request_id: str = "",
        within: float | None = None,
        **fields: Any,
    ) -> Reply:
        """Say something and return the whole answer. Takes what `stream_turn` takes; a failed turn raises."""
        request = chat_pb2.RunTurnRequest(turn=_turn(content, session, request_id, fields))
        answer = await self._call(lambda link: link.chat.RunTurn, request, within)
        return Reply(turn=answer.turn, completed=answer.completed)

    def resume_turn(
        self, turn: str, *, after_sequence: int = 0, within: float | None = None
    ) -> AsyncGenerator[chat_pb2.Event, None]:
        """Yield the events of a turn, running or ended, that come after a sequence number."""
        return self._calls.follow(None, turn, after_sequence, self._metadata, within=within)

    async def cancel_turn(self, turn: str) -> bool:
        """Cancel a turn; its text so far is kept. Return whether this call ended it."""
        return (await self._call(lambda link: link.chat.CancelTurn, chat_pb2.CancelTurnRequest(name=turn))).cancelled

    # --- answers that go to places ---------------------------------------------------------------------------------

    def deliveries(self, channel: str, *, at_once: int = 16) -> AsyncGenerator[Delivery, None]:
        """Yield the answers that are to be posted on a channel, such as `slack`, as they come.

        Those are answers of turns with a `reply_to`. Each has to be confirmed or rejected; until then it counts among
        the `at_once` that this receiver has. What breaks on the way is mended unseen. Closing the generator closes the
        stream; what was received and not confirmed is given out again when its lease has ended.
        """
        return receive(self._calls, channel, at_once, self._metadata)

    # --- sessions and models -------------------------------------------------------------------------------------

    def sessions(self, *, user: str = "", channel: str = "") -> AsyncIterator[session_pb2.Session]:
        """Yield the sessions of the workspace, the last used first, or only those of a user or a channel."""
        request = session_pb2.ListSessionsRequest(user=user, channel=channel)
        return self._pages(lambda link: link.sessions.ListSessions, request, lambda page: page.sessions)

    def messages(self, session: str) -> AsyncIterator[message_pb2.Message]:
        """Yield the messages of a session, oldest first."""
        request = session_pb2.ListMessagesRequest(parent=_named("sessions", session))
        return self._pages(lambda link: link.sessions.ListMessages, request, lambda page: page.messages)

    def models(self) -> AsyncIterator[model_pb2.Model]:
        """Yield the models, the default one first."""
        return self._pages(lambda link: link.models.ListModels, model_pb2.ListModelsRequest(), lambda page: page.models)

    async def get_session(self, session: str) -> session_pb2.Session:
        """Return one session."""
        request = session_pb2.GetSessionRequest(name=_named("sessions", session))
        return (await self._call(lambda link: link.sessions.GetSession, request)).session

    async def reset_session(self, session: str) -> session_pb2.Session:
        """Forget what was said in a session, and return it."""
        request = session_pb2.ResetSessionRequest(name=_named("sessions", session))
        return (await self._call(lambda link: link.sessions.ResetSession, request)).session

    async def delete_session(self, session: str) -> None:
        """Delete a session with all that was said in it."""
        request = session_pb2.DeleteSessionRequest(name=_named("sessions", session))
        await self._call(lambda link: link.sessions.DeleteSession, request, safe=False)

    async def get_model(self, model: str) -> model_pb2.Model:
        """Return one model."""
        request = model_pb2.GetModelRequest(name=_named("models", model))
        return (await self._call(lambda link: link.models.GetModel, request)).model

    async def load_model(
        self, model: str, path: str, *, type: str = "", context_length: int = 0, within: float | None = None
    ) -> AsyncGenerator[model_pb2.LoadModelResponse, None]:
        """Load a model beside those that run and yield how far it got; the last response has the model.

        `path` is its folder on the core's machine. `type` is its family, empty for what the folder says, and
        `context_length` in tokens, 0 for what the folder says. A load goes on when the stream is closed.
        """
        request = model_pb2.LoadModelRequest(
            name=_named("models", model), path=path, type=type, context_length=context_length
        )
        link = self._ways.pick()
        call = link.models.LoadModel(request, timeout=within, metadata=self._metadata)
        try:
            while isinstance(response := await call.read(), model_pb2.LoadModelResponse):
                yield response
        except grpc.aio.AioRpcError as error:
            raise from_status(error, link.address) from None
        finally:
            call.cancel()

    async def switch_model(self, model: str) -> model_pb2.SwitchModelResponse:
        """Make a loaded model the one that answers by default, and return it and the one before."""
        request = model_pb2.SwitchModelRequest(name=_named("models", model))
        return await self._call(lambda link: link.models.SwitchModel, request, safe=False)

    async def unload_model(self, model: str, *, within: float | None = None) -> None:
        """Let a model end its turns and free its memory. The default model cannot be unloaded."""
        request = model_pb2.UnloadModelRequest(name=_named("models", model))
        await self._call(lambda link: link.models.UnloadModel, request, within, safe=False)

    async def _pages(
        self, method: Method[_AnyPage], request: Any, items: Callable[[_AnyPage], Sequence[_Answer]]
    ) -> AsyncGenerator[_Answer, None]:
        while True:
            page = await self._call(method, request)
            for item in items(page):
                yield item
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def _call(
        self, method: Method[_Answer], request: Any, within: float | None = None, *, safe: bool = True
    ) -> _Answer:
        return await self._calls.unary(method, request, self._metadata, within=within, safe=safe)


def _turn(
    content: str | Sequence[message_pb2.Part], session: str, request_id: str, fields: dict[str, Any]
) -> chat_pb2.TurnInput:
    parts = [message_pb2.Part(text=content)] if isinstance(content, str) else content
    if isinstance(busy := fields.get("when_busy"), str):
        fields["when_busy"] = _when_busy(busy)
    if model := fields.get("model"):
        fields["model"] = _named("models", model)
    return chat_pb2.TurnInput(
        parts=parts,
        session=_named("sessions", session) if session else "",
        request_id=request_id or str(uuid.uuid4()),
        **fields,
    )


def _when_busy(word: str) -> int:
    known = {name.removeprefix(_BUSY).lower(): value for name, value in chat_pb2.WhenBusy.items()}
    try:
        return known[word.removeprefix(_BUSY).lower()]
    except KeyError:
        words = ", ".join(sorted(known.keys() - {"unspecified"}))
        raise ValueError(f"when_busy is {word!r}, and can be {words}") from None


def _named(collection: str, name: str) -> str:
    return name if name.startswith(f"{collection}/") else f"{collection}/{name}"
