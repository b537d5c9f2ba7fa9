"""SessionService: conversations listed, read, reset and deleted, always within the caller's workspace."""

from __future__ import annotations

import asyncio
import contextlib

from moltbot.v1 import session_pb2, session_pb2_grpc

from moltbot_server.errors import NotServing, SessionNotFound
from moltbot_server.models.context import ContextWindow
from moltbot_server.rpc import convert, names
from moltbot_server.rpc.interceptors import Call, PassedOn
from moltbot_server.rpc.peers import Peers
from moltbot_server.sessions import Sessions
from moltbot_server.store import Store
from moltbot_server.turns import Session, SessionKey, TurnState

# A client takes 4 MiB at most unless it says otherwise; one message alone may fill that.
_LARGEST_PAGE = 1 << 20
_ASKED_FOR = 2.0
"""Seconds that another node may take to tell the turn that it runs in a session."""


class SessionService(session_pb2_grpc.SessionServiceServicer):
    """Serves sessions."""

    def __init__(self, store: Store, sessions: Sessions[ContextWindow], peers: Peers) -> None:
        self._store = store
        self._sessions = sessions
        self._peers = peers

    async def GetSession(self, request: session_pb2.GetSessionRequest, call: Call) -> session_pb2.GetSessionResponse:  # type: ignore[override]
        """Answer one session, as the node tells it that runs a turn in it."""
        key = names.read_session(call.principal.workspace, request.name, "name")
        found = await self._session(key)
        if not found.HasField("active_turn") and (node := await self._runs_elsewhere(key)):
            # One that does not answer leaves its turn untold: the rest is known here as well.
            with contextlib.suppress(NotServing, PassedOn, TimeoutError):
                async with asyncio.timeout(_ASKED_FOR):
                    elsewhere = NotServing.elsewhere(node)
                    told: session_pb2.GetSessionResponse = await self._peers.unary(
                        "GetSession", request, call, elsewhere
                    )
                    return told
        return session_pb2.GetSessionResponse(session=found)

    async def ListSessions(  # type: ignore[override]
        self, request: session_pb2.ListSessionsRequest, call: Call
    ) -> session_pb2.ListSessionsResponse:
        """Answer sessions, the last used first."""
        size = names.page_size(request.page_size, default=50, most=200)
        scope = ("sessions", request.user, request.channel)
        found = await self._store.list_sessions(
            call.principal.workspace,
            user=request.user,
            channel=request.channel,
            before=names.read_time_token(scope, request.page_token),
            limit=size + 1,
        )
        page = found[:size]
        last = page[-1] if len(found) > size else None
        return session_pb2.ListSessionsResponse(
            sessions=[self._as_message(session) for session in page],
            next_page_token=names.write_token(scope, (last.update_time, last.key.session)) if last else "",
        )

    async def ListMessages(  # type: ignore[override]
        self, request: session_pb2.ListMessagesRequest, call: Call
    ) -> session_pb2.ListMessagesResponse:
        """Answer a session's messages, oldest first."""
        key = names.read_session(call.principal.workspace, request.parent, "parent")
        size = names.page_size(request.page_size, default=100, most=500)
        scope = ("messages", key.session)
        after = names.read_place_token(scope, request.page_token)
        found = await self._store.list_messages(key, after=after, limit=size + 1)
        if not found:
            await self._session(key)
        response = session_pb2.ListMessagesResponse()
        last, filled = None, 0
        for message in found[:size]:
            made = convert.message(key.session, message)
            filled += made.ByteSize()
            if last is not None and filled > _LARGEST_PAGE:
                break
            response.messages.append(made)
            last = message
        if last is not None and len(response.messages) < len(found):
            response.next_page_token = names.write_token(scope, (last.turn, int(last.id.partition(".")[2])))
        return response

    async def ResetSession(  # type: ignore[override]
        self, request: session_pb2.ResetSessionRequest, call: Call
    ) -> session_pb2.ResetSessionResponse:
        """Forget what was said in a session."""
        key = names.read_session(call.principal.workspace, request.name, "name")
        try:
            await self._sessions.reset(key)
        except NotServing as elsewhere:
            answer: session_pb2.ResetSessionResponse = await self._peers.unary("ResetSession", request, call, elsewhere)
            return answer
        return session_pb2.ResetSessionResponse(session=await self._session(key))

    async def DeleteSession(  # type: ignore[override]
        self, request: session_pb2.DeleteSessionRequest, call: Call
    ) -> session_pb2.DeleteSessionResponse:
        """Delete a session with all that is in it."""
        try:
            await self._sessions.delete(names.read_session(call.principal.workspace, request.name, "name"))
        except NotServing as elsewhere:
            answer: session_pb2.DeleteSessionResponse = await self._peers.unary(
                "DeleteSession", request, call, elsewhere
            )
            return answer
        return session_pb2.DeleteSessionResponse()

    async def _runs_elsewhere(self, key: SessionKey) -> str:
        """Return the other node that runs turns of a session, empty for none."""
        stored = await self._store.load_session(key, 0) if self._store.shared else None
        return stored.running_on if stored is not None and stored.running_on != self._store.node else ""

    async def _session(self, key: SessionKey) -> session_pb2.Session:
        session = await self._store.get_session(key)
        if session is None:
            raise SessionNotFound("there is no such session in this workspace")
        return self._as_message(session)

    def _as_message(self, session: Session) -> session_pb2.Session:
        at_hand = self._sessions.at_hand(session.key)
        live = at_hand.running if at_hand else None
        if live is None or live.ended or not live.is_stored:
            return convert.session(session, None)
        active = convert.turn(
            live.key,
            state=TurnState.RUNNING,
            request_id=live.input.request_id,
            create_time=live.events[0].at,
            last_sequence=len(live.events),
        )
        return convert.session(session, active)
