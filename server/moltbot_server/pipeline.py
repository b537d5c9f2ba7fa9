"""The walk of a turn, top to bottom: check, session, route, answer, journal.

`start` accepts a turn and returns at once; a task of its own carries it to its end, whoever listens. The engine begins
while the turn is being stored, but nobody is told anything before it is.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import secrets
import time
from asyncio import Future
from contextlib import aclosing

import msgspec

from moltbot_server.errors import (
    DeadlineExceeded,
    EmptyMessage,
    InternalError,
    InvalidField,
    MoltBotError,
    NotServing,
    QueueFull,
    TurnInterrupted,
)
from moltbot_server.journal import Journal, LiveTurn, same_content
from moltbot_server.metrics import Metrics
from moltbot_server.models.catalog import Catalog
from moltbot_server.models.context import ContextWindow, Fitted
from moltbot_server.models.engine import Chunk, Engine, Finished
from moltbot_server.models.limits import check_content
from moltbot_server.sessions import OpenSession, Sessions
from moltbot_server.store import EndedTurn, NewTurn, Store, StoredTurn
from moltbot_server.turns import (
    Accepted,
    Completed,
    Failed,
    FinishReason,
    Message,
    Principal,
    Role,
    Routed,
    SessionKey,
    TextPart,
    Timings,
    TurnInput,
    TurnKey,
    TurnState,
    Usage,
    encode,
)

log = logging.getLogger(__name__)

_TITLE_LENGTH = 80
_MOST_IN_A_SESSION = 128
_NAME = re.compile(r"[A-Za-z0-9._~-]{1,128}\Z")
_CHANNEL = re.compile(r"[a-z0-9_-]{0,32}\Z")


class TurnPipeline:
    """Takes turns from their arrival to their end."""

    def __init__(
        self,
        *,
        store: Store,
        journal: Journal,
        sessions: Sessions[ContextWindow],
        catalog: Catalog,
        metrics: Metrics,
        system_prompt: str,
        flush_interval: float,
    ) -> None:
        self._store = store
        self._journal = journal
        self._sessions = sessions
        self._catalog = catalog
        self._metrics = metrics
        self._system_prompt = system_prompt
        self._flush_interval = flush_interval
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining = False

    # --- accept --------------------------------------------------------------------------------------------------

    async def start(
        self, principal: Principal, turn: TurnInput, *, deadline: float | None, arrived: float
    ) -> LiveTurn | StoredTurn:
        """Start a turn, or return the one that the same request_id started.

        `deadline` is on the event loop's clock, `arrived` on `time.perf_counter`.

        Raises:
            MoltBotError: the turn is not accepted; nothing was stored.
        """
        self._check(turn)
        digest = _digest(turn)
        if turn.request_id:
            earlier = await self._repeated(principal, turn, digest)
            if isinstance(earlier, LiveTurn):
                earlier.allow_until(deadline)
                return earlier
            if earlier is not None and not earlier.retryable:
                return earlier
        else:
            turn = msgspec.structs.replace(turn, request_id=secrets.token_hex(16))
        if self._draining:
            raise NotServing("the core is leaving; repeat with the same request_id", retry_after=1.0)
        return await self._begin(principal, turn, digest, deadline, arrived)

    async def _repeated(self, principal: Principal, turn: TurnInput, digest: bytes) -> LiveTurn | StoredTurn | None:
        """Return the turn that the same request_id started; one that has run out of time is waited for first."""
        while True:
            earlier = await self._journal.repeated(principal, turn, digest)
            if not isinstance(earlier, LiveTurn) or not earlier.late or earlier.task is None:
                return earlier
            await asyncio.wait({earlier.task})

    async def _begin(
        self, principal: Principal, turn: TurnInput, digest: bytes, deadline: float | None, arrived: float
    ) -> LiveTurn:
        engine = self._catalog.get(turn.model)
        engine.check(turn.options)
        check_content(Message(role=Role.USER, parts=turn.parts), engine.capabilities)
        for message in turn.transcript or ():
            check_content(message, engine.capabilities)
        session = await self._session(principal, turn)
        if (begun := self._journal.begun(principal, turn.request_id)) is not None:
            # The same call came twice, and the other one's session was read first.
            same_content(begun.digest, digest)
            begun.allow_until(deadline)
            return begun
        if session.claims >= _MOST_IN_A_SESSION:
            raise QueueFull("too many turns wait in this session already", retry_after=1.0)
        key = TurnKey(session=session.key, ordinal=session.claim())
        live = LiveTurn(
            key=key,
            turn=turn,
            principal=principal,
            digest=digest,
            arrived=arrived,
            interval=self._flush_interval if turn.flush_interval is None else turn.flush_interval,
            ticker=self._journal.ticker,
        )
        live.record(Accepted(session=key.session.session, ordinal=key.ordinal, request_id=turn.request_id))
        self._journal.begin(live)
        self._accept(live, session)
        live.task = task = asyncio.create_task(self._run(live, session, engine))
        live.expire_at(deadline)
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._ended(live, session, task))
        return live

    def _ended(self, live: LiveTurn, session: OpenSession[ContextWindow], task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        session.release()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a turn's task failed", exc_info=error)
        if not live.ended and live.refusal is None and live.duplicate_of is None:
            # Nobody may wait for an end that will not come.
            live.stored(refusal=InternalError("something went wrong in the core; its log says what"))
        self._journal.close(live)

    async def _session(self, principal: Principal, turn: TurnInput) -> OpenSession[ContextWindow]:
        if turn.session:
            return await self._sessions.open(SessionKey(workspace=principal.workspace, session=turn.session))
        key = SessionKey(workspace=principal.workspace, session=secrets.token_hex(12))
        return self._sessions.create(key, keep=turn.transcript is None)

    def _accept(self, live: LiveTurn, session: OpenSession[ContextWindow], *, again: bool = False) -> None:
        turn = live.input
        row = NewTurn(
            key=live.key,
            request_id=turn.request_id,
            digest=live.digest,
            create_time=time.time(),
            question=turn.parts,
            opens_session=not session.exists,
            title="" if session.exists else _title(turn),
            user=turn.user,
            channel=turn.channel,
            ephemeral=turn.transcript is not None,
        )
        written = self._store.reaccept(row) if again else self._store.accept(row)
        written.add_done_callback(lambda future: self._accepted(live, session, future, again))

    def _accepted(
        self, live: LiveTurn, session: OpenSession[ContextWindow], written: Future[StoredTurn | None], again: bool
    ) -> None:
        """Tell the followers what the store said; a turn that it did not take is stopped."""
        live.accepted_after = time.perf_counter() - live.arrived
        error = None if written.cancelled() else written.exception()
        if error is not None or written.cancelled():
            live.stored(refusal=error if isinstance(error, MoltBotError) else NotServing("the core is leaving"))
        elif (earlier := written.result()) is None:
            session.exists = True
            live.stored(again=again)
            return
        elif self._may_start_again(earlier) and earlier.digest == live.digest and not again:
            self._accept(live, session, again=True)
            return
        else:
            live.stored(duplicate_of=earlier, refusal=_content_error(earlier, live))
        live.stop()

    def _may_start_again(self, earlier: StoredTurn) -> bool:
        """Tell whether a turn is over without a good end; one whose end could not be stored runs in the store only."""
        gone = earlier.state is TurnState.RUNNING and self._journal.live(earlier.key) is None
        return earlier.retryable or gone

    def _check(self, turn: TurnInput) -> None:
        """Refuse what no model could answer."""
        if not turn.parts:
            raise EmptyMessage("turn.parts", "the message is empty; send at least one part")
        if all(isinstance(part, TextPart) and not part.text.strip() for part in turn.parts):
            raise EmptyMessage("turn.parts", "the message is blank; say something")
        if turn.session and not _NAME.match(turn.session):
            raise InvalidField("turn.session", "use `sessions/` and 1 to 128 characters of A-Z a-z 0-9 . _ ~ -")
        if len(turn.request_id) > 128 or not turn.request_id.isprintable():
            raise InvalidField("turn.request_id", "use at most 128 printable characters; a UUID is recommended")
        if not _CHANNEL.match(turn.channel):
            raise InvalidField("turn.channel", "use at most 32 characters of a-z 0-9 _ -")
        if len(turn.user) > 256:
            raise InvalidField("turn.user", "use at most 256 characters")
        if turn.transcript is not None and turn.session:
            raise InvalidField("turn.transcript", "leave turn.session empty: a transcript stands in for a session")

    # --- run -----------------------------------------------------------------------------------------------------

    async def _run(self, live: LiveTurn, session: OpenSession[ContextWindow], engine: Engine) -> None:
        """Carry a turn to its end: answer it, store how it ended, then tell."""
        answer = _Answer()
        try:
            live.set_out()
            await session.enter(live)
        except asyncio.CancelledError:
            # It was told to stop while it waited for its session.
            await self._finish(live, session, engine, answer, self._stopped(live, answer))
            return
        try:
            ending = await self._attempt(live, session, engine, answer)
            await self._finish(live, session, engine, answer, ending)
        finally:
            session.leave()

    async def _attempt(
        self, live: LiveTurn, session: OpenSession[ContextWindow], engine: Engine, answer: _Answer
    ) -> Completed | Failed:
        """Answer a turn and return its last event; what goes wrong becomes that event."""
        answer.started = time.perf_counter()
        try:
            await self._answer(live, session, engine, answer)
            return answer.completed(live, engine)
        except asyncio.CancelledError:
            return self._stopped(live, answer)
        except MoltBotError as error:
            return answer.failed(live, error)
        except Exception:
            incident = secrets.token_hex(4)
            log.exception("a turn failed", extra={"incident": incident})
            return answer.failed(live, InternalError(f"something went wrong in the core (incident {incident})"))

    async def _answer(
        self, live: LiveTurn, session: OpenSession[ContextWindow], engine: Engine, answer: _Answer
    ) -> None:
        """Route a turn and record what answers it."""
        turn = live.input
        named = "the request names this model" if turn.model else "it is the workspace's default model"
        live.record(Routed(kind="model", name=engine.id, reason=named))
        answer.model = engine.id
        answer.fitted = self._conversation(turn, session, engine)
        async with aclosing(engine.generate(answer.fitted.messages, turn.options)) as chunks:
            async for chunk in chunks:
                if isinstance(chunk, Chunk):
                    answer.add(chunk.text)
                    live.say(chunk.text)
                else:
                    answer.finished = chunk

    def _conversation(self, turn: TurnInput, session: OpenSession[ContextWindow], engine: Engine) -> Fitted:
        """Return what the model is to read, cut to its context."""
        rules = turn.system_prompt or self._system_prompt
        system = [Message(role=Role.SYSTEM, parts=(TextPart(text=rules),))] if rules else []
        window = session.history
        if turn.transcript is not None or engine.id != self._catalog.default:
            # What the session keeps was counted by the default model.
            history = session.history.messages if turn.transcript is None else turn.transcript
            window = ContextWindow.of(history, engine.count, engine.capabilities.context_length)
        return window.fit(Message(role=Role.USER, parts=turn.parts), turn.options, system)

    # --- end -----------------------------------------------------------------------------------------------------

    async def _finish(
        self,
        live: LiveTurn,
        session: OpenSession[ContextWindow],
        engine: Engine,
        answered: _Answer,
        ending: Completed | Failed,
    ) -> None:
        """Store how a turn ended, remember it in the session, then let the followers see it."""
        answer: tuple[TextPart, ...] = ()
        state = TurnState.FAILED
        if isinstance(ending, Completed):
            cancelled = ending.finish_reason is FinishReason.CANCELLED
            state = TurnState.CANCELLED if cancelled else TurnState.COMPLETED
            answer = (TextPart(text=ending.text),) if ending.text else ()
        events = live.close(ending)
        row = EndedTurn(
            key=live.key,
            state=state,
            end_time=events[-1].at,
            events=events,
            answer=answer,
            model=engine.id,
        )
        error = await self._stored(live, row)
        if live.refusal is not None or live.duplicate_of is not None:
            return
        if error is not None:
            ending = answered.failed(live, error)
            events = live.close(ending)
        elif answer and live.input.transcript is None:
            question = Message(role=Role.USER, parts=live.input.parts, turn=live.key.ordinal)
            said = Message(role=Role.ASSISTANT, parts=answer, turn=live.key.ordinal, model=engine.id)
            session.history.extend((question, said))
        live.end(events[-1])
        self._metrics.turn_ended(ending, engine.id)

    async def _stored(self, live: LiveTurn, row: EndedTurn) -> MoltBotError | None:
        """Wait until a turn and its end are on the disk; both may go there together."""
        written = self._store.finish(row)
        if await live.wait_stored():
            # The first row gave way to an earlier turn's, and its end with it.
            written = self._store.finish(row)
        try:
            await written
        except MoltBotError as error:
            return error
        return None

    def _stopped(self, live: LiveTurn, answer: _Answer) -> Completed | Failed:
        """Return the end of a turn whose task was cancelled: by a caller, its deadline, or because the core leaves."""
        if live.late:
            return answer.failed(live, DeadlineExceeded("the deadline passed before the answer was complete"))
        if not live.cancelling:
            return answer.failed(live, TurnInterrupted("the core stopped while the turn ran"))
        return answer.cancelled(live)

    async def drain(self, grace: float) -> None:
        """Refuse new turns, let those under way end within `grace` seconds, then cut the rest; they are retryable."""
        self._draining = True
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=grace)
        for live in self._journal.under_way():
            if not live.closing:
                live.stop()
        if self._tasks:
            await asyncio.wait(set(self._tasks))


_NOTHING_READ = Fitted([], 0, 0, 0)


class _Answer:
    """What is known of an answer while it is being written."""

    __slots__ = ("finished", "first_text", "fitted", "model", "pieces", "started")

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.started = 0.0
        self.first_text = 0.0
        self.finished: Finished | None = None
        self.model = ""
        self.fitted = _NOTHING_READ

    def add(self, text: str) -> None:
        """Note another piece of the text."""
        if not self.pieces:
            self.first_text = time.perf_counter()
        self.pieces.append(text)

    def completed(self, live: LiveTurn, engine: Engine) -> Completed:
        """Return the event of an answer that ended by itself."""
        finished = self.finished
        return Completed(
            text="".join(self.pieces),
            finish_reason=finished.finish_reason if finished else FinishReason.STOP,
            usage=self.usage(),
            timings=self.timings(live),
            model=engine.id,
            message=f"{live.key.ordinal}.1" if self.pieces else "",
        )

    def usage(self) -> Usage:
        """Return the tokens read and written, as the engine counted them or, before its end, as they came."""
        counted = self.finished.usage if self.finished else Usage(output_tokens=len(self.pieces))
        if counted.input_tokens:
            return counted
        return msgspec.structs.replace(counted, input_tokens=self.fitted.tokens)

    def cancelled(self, live: LiveTurn) -> Completed:
        """Return the event of an answer that a caller stopped; its text so far is kept."""
        return Completed(
            text="".join(self.pieces),
            finish_reason=FinishReason.CANCELLED,
            usage=self.usage(),
            timings=self.timings(live),
            model=self.model if self.pieces else "",
            message=f"{live.key.ordinal}.1" if self.pieces else "",
        )

    def failed(self, live: LiveTurn, error: MoltBotError) -> Failed:
        """Return the event of an answer that an error ended."""
        return Failed(
            status=error.status,
            reason=error.reason,
            message=error.message,
            retryable=error.retryable,
            retry_after=error.retry_after,
            timings=self.timings(live),
        )

    def timings(self, live: LiveTurn) -> Timings:
        """Return where the time went, up to now."""
        now = time.perf_counter()
        waited = self.finished.queue if self.finished else 0.0
        started = self.started or now
        first = self.first_text or now
        return Timings(
            accept=live.accepted_after,
            queue=started - live.arrived + waited,
            first_token=max(0.0, first - started - waited),
            generation=now - first,
            total=now - live.arrived,
            trimmed_messages=self.fitted.trimmed_messages,
            history_messages=self.fitted.history_messages,
            attempts=1 if self.started else 0,
        )


def _digest(turn: TurnInput) -> bytes:
    """Return a digest of what a turn asks, so that a repeated call can be told from a reused request_id."""
    content = encode(
        (turn.session, turn.parts, turn.model, turn.options, turn.system_prompt, turn.transcript, turn.user)
    )
    return hashlib.blake2b(content, digest_size=16).digest()


def _content_error(earlier: StoredTurn, live: LiveTurn) -> MoltBotError | None:
    try:
        same_content(earlier.digest, live.digest)
    except MoltBotError as error:
        return error
    return None


def _title(turn: TurnInput) -> str:
    text = " ".join(part.text for part in turn.parts if isinstance(part, TextPart))
    line = " ".join(text.split())
    return line if len(line) <= _TITLE_LENGTH else line[: _TITLE_LENGTH - 1] + "…"
