"""A scripted stand-in for the chat page's server: real HTTP, real event streams, and faults that a test chooses."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from aiohttp import web

STATIC = Path(__file__).parents[3] / "adapters" / "moltbot_adapters" / "http" / "static"
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
COOKIE = "moltbot_session"
BUILT_IN = "moltbot-demo"
NO_STORE = "The core cannot reach its store."


@dataclass(frozen=True, slots=True, kw_only=True)
class Say:
    """Streams a text in pieces of `chunk` characters, `pace` seconds apart."""

    text: str
    chunk: int = 12
    pace: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Emit:
    """Records one event of any kind."""

    kind: str
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Breaks every connection that listens to the turn; the turn itself goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """Waits until the test sets the named gate."""

    gate: str


Step = Say | Emit | Cut | Hold
Script = Callable[[str], Sequence[Step]]


@dataclass(slots=True, kw_only=True)
class ScriptedTurn:
    """One turn: its recorded events and who waits for more of them."""

    id: str
    session: str
    request_id: str
    text: str
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    answer: str = ""
    done: bool = False
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    cuts: int = 0
    task: asyncio.Task[None] | None = None

    async def record(self, kind: str, data: dict[str, Any]) -> None:
        """Appends an event under the next sequence number and wakes the listeners."""
        async with self.changed:
            self.events.append((kind, {"sequence": len(self.events) + 1, **data}))
            self.done = kind in ("completed", "failed")
            self.changed.notify_all()


@dataclass(slots=True, kw_only=True)
class ScriptedSession:
    """One chat with its messages, oldest first."""

    id: str
    title: str
    update_time: datetime
    messages: list[dict[str, Any]] = field(default_factory=list)
    turns: dict[str, ScriptedTurn] = field(default_factory=dict)


def error(status: int, message: str, code: str, headers: dict[str, str] | None = None) -> web.Response:
    """The four-key error of the browser API."""
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
    return web.json_response(body, status=status, headers=headers)


class ScriptedSite:
    """Serves the page and its API on 127.0.0.1; `script` chooses the steps of each answer."""

    def __init__(
        self, script: Script, *, key: str = "", page_size: int = 20, models: Sequence[str] = ("builtin",)
    ) -> None:
        self.script = script
        self.key = key
        self.page_size = page_size
        self.models = models
        self.sessions: dict[str, ScriptedSession] = {}
        self.by_request: dict[str, ScriptedTurn] = {}
        self.calls: list[tuple[str, str, dict[str, Any] | None]] = []
        self.user = "ada"
        self.refusals: list[web.Response | None] = []  # for the next starts of a turn; None breaks the line
        self.login_refusals: list[web.Response] = []  # for the next who sign in
        self.down = False
        self.core_away = False  # the page's server is there, the core behind it is not
        self.store_away = False  # the core is there, and refuses once its answer has begun
        self.slow_list = False  # the list of chats waits for the gate "list"
        self.slow_accept = False  # a turn says that it is accepted only when the gate "accept" is set
        self.overlap = 0  # events that a resumed stream tells again
        self.shred = 0  # bytes per write, to cut frames and characters in the middle
        self.gates: dict[str, asyncio.Event] = {}
        self.origin = ""
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> ScriptedSite:
        app = web.Application(middlewares=[self._guard])
        app.add_routes(
            [
                web.get("/", self._page),
                web.get("/login", self._link),
                web.post("/api/login", self._login),
                web.post("/api/logout", self._logout),
                web.get("/api/me", self._me),
                web.get("/api/sessions", self._list),
                web.get("/api/sessions/{sid}/messages", self._messages),
                web.delete("/api/sessions/{sid}", self._delete),
                web.post("/api/turns", self._start),
                web.get("/api/sessions/{sid}/turns/{tid}/events", self._events),
                web.post("/api/sessions/{sid}/turns/{tid}/cancel", self._cancel),
                web.static("/static", STATIC),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.origin = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *exc: object) -> None:
        for turn in self.by_request.values():
            if turn.task is not None:
                turn.task.cancel()
                await asyncio.wait([turn.task])
        if self._runner is not None:
            await self._runner.cleanup()

    def gate(self, name: str) -> asyncio.Event:
        """The event that a `Hold` step of this name waits for."""
        return self.gates.setdefault(name, asyncio.Event())

    def add_chat(self, title: str, exchanges: Sequence[tuple[str, str]], *, age: timedelta = timedelta()) -> str:
        """Puts a chat of the past in place; answers its id."""
        sid = f"s{len(self.sessions) + 1}"
        chat = ScriptedSession(id=sid, title=title, update_time=datetime.now(UTC) - age)
        for question, answer in exchanges:
            self._message(chat, "user", question, f"old{len(chat.messages)}")
            self._message(chat, "assistant", answer, f"old{len(chat.messages) - 1}")
        self.sessions[sid] = chat
        return sid

    def started(self) -> list[dict[str, Any]]:
        """The bodies of every request that asked to start a turn, in order."""
        return [body for method, path, body in self.calls if method == "POST" and path == "/api/turns" and body]

    def _message(self, chat: ScriptedSession, role: str, text: str, turn: str) -> None:
        number = len(chat.messages)
        model = self.models[0] if role == "assistant" else ""
        when = chat.update_time.isoformat()
        row = {"id": f"m{number}", "role": role, "text": text, "create_time": when, "turn": turn, "model": model}
        chat.messages.append(row)

    @web.middleware
    async def _guard(self, request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
        if self.down and request.transport is not None:
            request.transport.abort()
            return web.Response(status=503)
        body = await request.json() if request.can_read_body else None
        if not request.path.startswith("/static"):
            self.calls.append((request.method, request.path_qs, body))
        if request.method != "GET" and request.headers.get("X-MoltBot") != "1":
            return error(403, "The request does not come from the page.", "forbidden")
        if request.path.startswith("/api") and request.path != "/api/login" and not self._known(request):
            return error(401, "Sign in first.", "unauthenticated")
        response: web.StreamResponse = await handler(request)
        if not response.prepared:
            response.headers["Content-Security-Policy"] = CSP
            response.headers["X-Content-Type-Options"] = "nosniff"
            response.headers["Referrer-Policy"] = "no-referrer"
            response.headers["Cache-Control"] = "no-cache"
        return response

    def _known(self, request: web.Request) -> bool:
        return not self.key or request.cookies.get(COOKIE) == "good"

    async def _page(self, request: web.Request) -> web.StreamResponse:
        text = (STATIC / "index.html").read_text(encoding="utf-8")
        return web.Response(text=text, content_type="text/html", status=200 if self._known(request) else 401)

    async def _link(self, request: web.Request) -> web.StreamResponse:
        raise web.HTTPSeeOther("/?error=link")

    async def _login(self, request: web.Request) -> web.StreamResponse:
        if self.login_refusals:
            return self.login_refusals.pop(0)
        if (await request.json()).get("key") != self.key:
            return error(401, "The key is not known.", "unauthenticated")
        response = web.Response(status=204)
        response.set_cookie(COOKIE, "good", httponly=True, samesite="Strict")
        return response

    async def _logout(self, request: web.Request) -> web.StreamResponse:
        response = web.Response(status=204)
        response.del_cookie(COOKIE)
        return response

    async def _me(self, request: web.Request) -> web.StreamResponse:
        if self.core_away:
            return error(503, "The core is not there.", "core_unavailable")
        named = {BUILT_IN: "MoltBot built-in model"}
        models = [{"id": name, "display_name": named.get(name, name.capitalize())} for name in self.models]
        told = {"user": self.user, "version": "0.1.0", "default_model": models[0], "models": models}
        return web.json_response({**told, "store_away": self.store_away})

    async def _list(self, request: web.Request) -> web.StreamResponse:
        if self.slow_list:
            await self.gate("list").wait()
        if self.store_away:
            return error(503, NO_STORE, "storage_unavailable")
        chats = sorted(self.sessions.values(), key=lambda chat: chat.update_time, reverse=True)
        start = int(request.query.get("page_token") or 0)
        end = start + self.page_size
        rows = [self._row(chat) for chat in chats[start:end]]
        return web.json_response({"sessions": rows, "next_page_token": str(end) if end < len(chats) else ""})

    @staticmethod
    def _row(chat: ScriptedSession) -> dict[str, Any]:
        active = [turn for turn in chat.turns.values() if not turn.done]
        return {
            "id": chat.id,
            "title": chat.title,
            "update_time": chat.update_time.isoformat(),
            "message_count": len(chat.messages),
            "active_turn": {"id": active[-1].id, "last_sequence": len(active[-1].events)} if active else None,
        }

    async def _messages(self, request: web.Request) -> web.StreamResponse:
        if self.store_away:
            return error(503, NO_STORE, "storage_unavailable")
        chat = self.sessions.get(request.match_info["sid"])
        if chat is None:
            return error(404, "No such session.", "not_found")
        start = int(request.query.get("page_token") or 0)
        end = start + self.page_size
        more = str(end) if end < len(chat.messages) else ""
        return web.json_response({"messages": chat.messages[start:end], "next_page_token": more})

    async def _delete(self, request: web.Request) -> web.StreamResponse:
        gone = self.sessions.pop(request.match_info["sid"], None)
        return web.Response(status=204) if gone else error(404, "No such session.", "not_found")

    async def _start(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if self.refusals:
            refusal = self.refusals.pop(0)
            if refusal is not None:
                return refusal
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if self.store_away:
            return await self._refuse_late(request)
        turn = self.by_request.get(body["request_id"]) or self._begin(body)
        return await self._stream(request, turn, 0)

    def _begin(self, body: dict[str, Any]) -> ScriptedTurn:
        sid = body["session"] or f"s{uuid.uuid4().hex[:8]}"
        now = datetime.now(UTC)
        chat = self.sessions.setdefault(sid, ScriptedSession(id=sid, title=body["text"][:40], update_time=now))
        chat.update_time = now
        tid = f"t{uuid.uuid4().hex[:8]}"
        turn = ScriptedTurn(id=tid, session=sid, request_id=body["request_id"], text=body["text"])
        chat.turns[turn.id] = self.by_request[turn.request_id] = turn
        self._message(chat, "user", turn.text, turn.id)
        turn.task = asyncio.create_task(self._play(turn, chat))
        return turn

    async def _play(self, turn: ScriptedTurn, chat: ScriptedSession) -> None:
        if self.slow_accept:
            await self.gate("accept").wait()
        names = {"turn": turn.id, "session": turn.session, "message": "m", "request_id": turn.request_id}
        await turn.record("accepted", names)
        for step in self.script(turn.text):
            await self._step(turn, step)
            if turn.cancelled.is_set() or turn.done:
                break
        if turn.answer:
            self._message(chat, "assistant", turn.answer, turn.id)
        if not turn.done:
            await turn.record("completed", self._completion(turn))

    async def _step(self, turn: ScriptedTurn, step: Step) -> None:
        if isinstance(step, Hold):
            gate = asyncio.create_task(self.gate(step.gate).wait())
            stop = asyncio.create_task(turn.cancelled.wait())
            _, late = await asyncio.wait([gate, stop], return_when=asyncio.FIRST_COMPLETED)
            for task in late:
                task.cancel()
        elif isinstance(step, Cut):
            async with turn.changed:
                turn.cuts += 1
                turn.changed.notify_all()
        elif isinstance(step, Emit):
            if step.kind == "reset":
                turn.answer = step.data["text"]
            await turn.record(step.kind, step.data)
        else:
            await self._say(turn, step)

    @staticmethod
    async def _say(turn: ScriptedTurn, step: Say) -> None:
        for start in range(0, len(step.text), step.chunk):
            if turn.cancelled.is_set():
                return
            piece = step.text[start : start + step.chunk]
            turn.answer += piece
            await turn.record("text_delta", {"text": piece})
            await asyncio.sleep(step.pace)  # the pace is what the script asks for

    def _completion(self, turn: ScriptedTurn) -> dict[str, Any]:
        return {
            "text": turn.answer,
            "finish_reason": "cancelled" if turn.cancelled.is_set() else "stop",
            "usage": {"input_tokens": 24, "output_tokens": len(turn.answer) // 4, "cached_input_tokens": 0},
            "timings": {"accept_ms": 1, "first_token_ms": 18, "generation_ms": 840, "total_ms": 861},
            "model": self.models[0],
            "message": "m",
        }

    async def _events(self, request: web.Request) -> web.StreamResponse:
        if self.store_away:
            return await self._refuse_late(request)
        chat = self.sessions.get(request.match_info["sid"])
        turn = chat.turns.get(request.match_info["tid"]) if chat else None
        if turn is None:
            return error(404, "No such turn.", "not_found")
        after = request.query.get("after") or request.headers.get("Last-Event-ID") or 0
        return await self._stream(request, turn, max(0, int(after) - self.overlap))

    async def _refuse_late(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        await response.prepare(request)
        await response.write(b": ping\n\n")
        told = {"status": 503, "error": {"message": NO_STORE, "type": "server_error", "code": "storage_unavailable"}}
        await response.write(f"event: refused\ndata: {json.dumps(told)}\n\n".encode())
        return response

    async def _stream(self, request: web.Request, turn: ScriptedTurn, after: int) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        await response.prepare(request)
        await response.write(b": ping\n\n")
        cuts = turn.cuts
        while True:
            for kind, data in turn.events[after:]:
                text = json.dumps(data, ensure_ascii=False)
                frame = f"id: {data['sequence']}\nevent: {kind}\ndata: {text}\n\n".encode()
                for start in range(0, len(frame), self.shred or len(frame)):
                    await response.write(frame[start : start + (self.shred or len(frame))])
                after += 1
            if turn.done:
                return response
            async with turn.changed:
                await turn.changed.wait_for(lambda: len(turn.events) > after or turn.cuts > cuts)  # noqa: B023
            if turn.cuts > cuts and request.transport is not None:
                request.transport.abort()
                return response

    async def _cancel(self, request: web.Request) -> web.StreamResponse:
        turn = self.sessions[request.match_info["sid"]].turns[request.match_info["tid"]]
        running = not turn.done
        turn.cancelled.set()
        return web.json_response({"cancelled": running})
