"""The walk of a turn, top to bottom: check, session, route, answer, journal.

`TurnPipeline.start` accepts a turn and returns at once; a `TurnRun` carries it to its end, whoever listens. The engine
begins while the turn is being stored, but nobody is told anything before it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Sequence, Set

import msgspec

from moltbot_server.config_models import Price
from moltbot_server.errors import (
    InternalError,
    MoltBotError,
    NotServing,
    QueueFull,
    StorageUnavailable,
)
from moltbot_server.floods import Floods
from moltbot_server.journal import Journal, same_content
from moltbot_server.live_turn import LiveTurn
from moltbot_server.metrics import Metrics
from moltbot_server.models.caching.answers import AnswerCache
from moltbot_server.models.catalog import Catalog, CatalogEntry
from moltbot_server.models.context import ContextWindow, Fitted
from moltbot_server.models.engine import Asker, Engine, Generation, Listener
from moltbot_server.sessions import OpenSession, Sessions
from moltbot_server.store import GUESSED, Elsewhere, Moved, Store, StoredTurn, Taken
from moltbot_server.store.protocol import Orphan
from moltbot_server.turn_checks import check_for_model, check_turn, digest_of, unfinishable
from moltbot_server.turn_run import TurnRun
from moltbot_server.turns import (
    Message,
    Principal,
    Role,
    SessionKey,
    TextPart,
    TurnInput,
    TurnKey,
    Usage,
    WhenBusy,
)
from moltbot_server.usage import Ledger

log = logging.getLogger(__name__)

_MOST_IN_A_SESSION = 128
_MOST_MOVES = 8
"""How often a turn is begun again because others had its session first."""
_COME_BACK = 15.0
"""Seconds that a turn which ends with its last follower waits for one after a take-over."""
_LAST_WRITES = 2.0
"""Seconds beyond its grace that a core which leaves waits for its store."""
_TAKEN_WITHIN = 10.0
"""Seconds for which a turn waits for those before it that are being taken over, before its caller is asked back."""


def _to_nobody(workspace: str, channel: str) -> None:
    """Stand in for who would hear of answers that wait to be delivered."""


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
        answers: AnswerCache,
        ledger: Ledger,
        price: Callable[[str], Price | None],
        system_prompt: str,
        flush_interval: float,
        announce: Callable[[str, str], None] = _to_nobody,
        when_busy: Callable[[str], str] = lambda channel: "queue",
    ) -> None:
        """`price` tells what a model costs; None for nothing.

        `announce` hears the workspace and the channel of each answer that waits to be delivered; `when_busy` tells what
        becomes of a turn of a channel that does not say what a busy session is to do with it.
        """
        self.store = store
        self.journal = journal
        self.metrics = metrics
        self._sessions = sessions
        self._catalog = catalog
        self._answers = answers
        self._ledger = ledger
        self._price = price
        self._rules = _system(system_prompt)
        self._flush_interval = flush_interval
        self._announce = announce
        self._when_busy = when_busy
        self._runs: set[TurnRun] = set()
        self._orphans: dict[TurnKey, Orphan] = {}
        self._taking: asyncio.Event | None = None
        self._stale: set[SessionKey] = set()
        self._moving: set[asyncio.Task[None]] = set()
        self._emptied: asyncio.Event | None = None
        self._floods = Floods()

    def __len__(self) -> int:
        """How many turns are being carried out."""
        return len(self._runs)

    # --- accept --------------------------------------------------------------------------------------------------

    async def start(
        self, principal: Principal, turn: TurnInput, *, deadline: float | None, arrived: float
    ) -> LiveTurn | StoredTurn:
        """Start a turn, or return the one that the same request_id started.

        `deadline` is on the event loop's clock, `arrived` on `time.perf_counter`.

        Raises:
            MoltBotError: the turn is not accepted; nothing was stored.
        """
        check_turn(turn)
        digest = digest_of(turn)
        if not turn.request_id:
            turn = msgspec.structs.replace(turn, request_id=secrets.token_hex(16))
        elif self.journal.knows(principal, turn.request_id):
            earlier = await self._repeated(principal, turn, digest)
            if isinstance(earlier, LiveTurn):
                earlier.allow_until(deadline)
                return earlier
            if earlier is not None and not earlier.retryable:
                return earlier
        self._check_stays()
        if turn.when_busy is None and (rule := self._when_busy(turn.channel)) != "queue":
            turn = msgspec.structs.replace(turn, when_busy=WhenBusy(rule))
        entry = self._catalog.ready(turn.model)
        check_for_model(turn, entry.engine)
        warning = self._ledger.check(principal.workspace, turn.user, entry.engine.id)
        asker = Asker(workspace=principal.workspace, session=turn.session, deadline=deadline)
        self._admit(entry.engine, asker)
        key = SessionKey(workspace=principal.workspace, session=turn.session or secrets.token_hex(12))
        session = self._at_hand(key, turn)
        waited = session is None and not self._may_guess(key, entry.engine)
        if waited:
            session = await self._open(key)
            entry = self._still_ready(entry, turn)
            self._check_stays()
        if (begun := self.journal.begun(principal, turn.request_id)) is not None:
            # The same call came twice, and what it waited for came to the other one first.
            if begun.digest != digest and not begun.is_stored:
                await begun.settled()
                return await self.start(principal, turn, deadline=deadline, arrived=arrived)
            same_content(begun.digest, digest)
            begun.allow_until(deadline)
            return begun
        if waited:
            # Many others may have begun meanwhile.
            self._admit(entry.engine, asker)
        session = session or self._sessions.guess(key)
        return self._begin(principal, turn, digest, session, entry, deadline, arrived, warning)

    def _begin(
        self,
        principal: Principal,
        turn: TurnInput,
        digest: bytes,
        session: OpenSession[ContextWindow],
        entry: CatalogEntry,
        deadline: float | None,
        arrived: float,
        warning: str = "",
    ) -> LiveTurn:
        """Set a turn out on its way; the store says later whether it is accepted.

        Raises:
            QueueFull: too many wait in its session.
        """
        if session.claims >= _MOST_IN_A_SESSION:
            raise QueueFull("too many turns wait in this session already", retry_after=1.0)
        live = LiveTurn(
            key=TurnKey(session=session.key, ordinal=session.claim()),
            turn=turn,
            principal=principal,
            digest=digest,
            arrived=arrived,
            interval=self._flush_interval if turn.flush_interval is None else turn.flush_interval,
            journal=self.journal,
            is_guess=session.version == GUESSED,
        )
        self.journal.begin(live)
        # The turn ends by its own deadline, which those who attach to it may move; the engine is stopped then.
        asker = Asker(workspace=principal.workspace, session=session.key.session, wanted_by=deadline)
        until = 0.0 if deadline is None else time.time() + deadline - asyncio.get_running_loop().time()
        run = TurnRun(self, live, session, entry, asker, until)
        self._runs.add(run)
        run.begin(warning)
        live.expire_at(deadline)
        return live

    async def _open(self, key: SessionKey) -> OpenSession[ContextWindow]:
        """Return a session; turns of it that were taken over a moment ago come first.

        Raises:
            NotServing: another node runs turns of it, or those that were taken over are not heard of yet.
        """
        while True:
            session = await self._sessions.open(key)
            if (taking := self._taking) is None or not self._awaits_others(session):
                return session
            try:
                async with asyncio.timeout(_TAKEN_WITHIN):
                    await taking.wait()
            except TimeoutError:
                text = "turns before this one are being taken over; repeat with the same request_id"
                raise NotServing(text, retry_after=1.0) from None
            finally:
                if not session.claims:  # none of those turns was to be carried on
                    self.lost(session)

    def _awaits_others(self, session: OpenSession[ContextWindow]) -> bool:
        """Tell whether turns of a session were taken over that have not been begun yet."""
        return session.is_awaited and not session.claims and self._taking is not None

    def begin_again(self, live: LiveTurn, session: OpenSession[ContextWindow], deadline: float | None) -> None:
        """Start a turn again on its session as it is now: what was remembered of it was old. A run calls this."""
        self.lost(session)
        task = asyncio.create_task(self._begin_again(live, session, deadline))
        self._moving.add(task)
        task.add_done_callback(self._moving.discard)

    async def _begin_again(self, live: LiveTurn, old: OpenSession[ContextWindow], deadline: float | None) -> None:
        turn, unwanted = live.input, live.input.cancel_on_disconnect
        try:
            if live.moves == _MOST_MOVES:
                raise StorageUnavailable("the session changes all the time; repeat the call", retry_after=1.0)
            session = await self._open(old.key)
            entry = self._catalog.ready(turn.model)
            check_for_model(turn, entry.engine)
            self._check_stays()
            if unwanted and not live.is_followed:
                raise NotServing("nobody waits for this turn any more", retry_after=0.0)
            # Its old number may be in what was written meanwhile, and must not be another turn's.
            session.last_ordinal = max(session.last_ordinal, old.last_ordinal)
            begun = self._begin(live.principal, turn, live.digest, session, entry, deadline, live.arrived)
        except Exception as problem:
            refusal = problem if isinstance(problem, MoltBotError) else InternalError("the turn could not be begun")
            if refusal is not problem:
                log.exception("a turn could not be begun again")
            live.stored(refusal=refusal)
            self.journal.close(live)
            return
        begun.moves = live.moves + 1
        live.give_way(begun)

    def guessed(self, session: OpenSession[ContextWindow], answer: Taken | MoltBotError) -> None:
        """Take note of what the store says of a session that was taken for new; a run calls this."""
        is_known = isinstance(answer, Moved | Elsewhere)
        session.is_old = answer is not None
        self._sessions.settle(session, is_new=True if answer is None else False if is_known else None)

    def lost(self, session: OpenSession[ContextWindow]) -> None:
        """Take note that another node has a session; a run calls this."""
        session.is_old = True
        if self._sessions.at_hand(session.key) is session:
            self._sessions.forget(session.key)

    @property
    def is_taking_over(self) -> bool:
        """True while turns of nodes that are gone are being taken over, also when that broke off."""
        return self._taking is not None

    def _check_stays(self) -> None:
        if self._emptied is not None:
            raise NotServing("the core is leaving; repeat with the same request_id", retry_after=1.0)

    async def take_over(self) -> int:
        """Carry on what cores that are gone left unfinished; return how many turns that is.

        Called before any turn is started, and again and again where several cores share the store. What an error kept
        from being carried on is carried on by the next call; until then, turns that come later wait for it.

        Raises:
            MoltBotError: the store cannot tell. It may have made turns this node's all the same.
        """
        taking = self._taking = self._taking or asyncio.Event()
        taken = 0
        # What one call tells may be half of it, with an error behind it that only the next one raises.
        while found := await self._take_up():
            taken += found
        self._taking = None
        taking.set()
        return taken

    async def _take_up(self) -> int:
        found = await self.store.take_over()
        self._stale.update(orphan.turn.key.session for orphan in found)
        self._orphans |= {orphan.turn.key: orphan for orphan in found}
        by_session: dict[SessionKey, list[Orphan]] = {}
        for orphan in self._orphans.values():
            by_session.setdefault(orphan.turn.key.session, []).append(orphan)
        # A turn that took the place of a failed one was stored later than those behind it.
        ordered = [sorted(waiting, key=lambda orphan: orphan.turn.key.ordinal) for waiting in by_session.values()]
        interrupted = {orphan.turn.key for waiting in ordered for orphan in _interrupted(waiting)}
        taken = len(self._orphans)
        # All sessions at once: each is read from the store, and the last would wait for all the others.
        begun = (self._carry_on_all(waiting, interrupted) for waiting in ordered)
        for problem in await asyncio.gather(*begun, return_exceptions=True):
            if problem is not None:
                raise problem
        return taken

    async def _carry_on_all(self, waiting: Sequence[Orphan], interrupted: Set[TurnKey]) -> None:
        """Carry on the turns of a session, in their order."""
        for orphan in waiting:
            await self._carry_on(orphan, interrupted=orphan.turn.key in interrupted)
            del self._orphans[orphan.turn.key]

    async def _carry_on(self, orphan: Orphan, *, interrupted: bool) -> None:
        key, turn = orphan.turn.key, orphan.input
        if (mine := self.journal.live(key)) is not None:
            # It was this core's, which was away for too long: what it still does of it counts no more.
            mine.lose()
            await mine.outcome()
        if key.session in self._stale:
            # What is at hand of it, or being read, is from before this core had it.
            await self._sessions.renew(key.session)
            self._stale.discard(key.session)
        try:
            session = await self._sessions.open(key.session)
        except NotServing:
            return  # others have taken it over from this node in turn
        session.take_up(key.ordinal)
        live = LiveTurn(
            key=key,
            turn=turn,
            principal=Principal(workspace=key.session.workspace, key_id="", role=""),
            digest=orphan.turn.digest,
            arrived=time.perf_counter(),
            interval=self._flush_interval if turn.flush_interval is None else turn.flush_interval,
            journal=self.journal,
            taken=orphan,
        )
        self.journal.begin(live)
        left = orphan.deadline - time.time() if orphan.deadline else None
        wanted_by = None if left is None else asyncio.get_running_loop().time() + left
        asker = Asker(workspace=key.session.workspace, session=key.session.session, wanted_by=wanted_by)
        refusal = unfinishable(orphan, left, now=time.time())
        try:
            entry = self._catalog.ready(turn.model)
        except MoltBotError as error:
            entry, refusal = self._catalog.entry(""), refusal or error
        run = TurnRun(self, live, session, entry, asker, orphan.deadline)
        self._runs.add(run)
        if refusal is not None:
            run.abandon(refusal)
            return
        run.carry_on(interrupted=interrupted)
        live.expire_at(wanted_by)
        if turn.cancel_on_disconnect:
            asyncio.get_running_loop().call_later(_COME_BACK, live.cancel_unfollowed)

    def refusal_unread(self, principal: Principal) -> QueueFull | None:
        """Return why a turn that has arrived would be refused whatever it says, if so; only while its sender floods.

        What has been started with its request_id before is refused as well then; the caller may ask again.
        """
        if not self._floods.unread(principal.workspace):
            return None
        try:
            self._admit(self._catalog.ready("").engine, Asker(workspace=principal.workspace))
        except QueueFull as refusal:
            return refusal
        except MoltBotError:
            return None  # told when it was read
        return None

    def _admit(self, engine: Engine, asker: Asker) -> None:
        """Refuse what could not begin in time, and count it for those who flood the model that most ask."""
        try:
            engine.admit(asker)
        except QueueFull:
            if engine.id == self._catalog.default:
                self._floods.refused(asker.workspace)
            raise
        if engine.id != self._catalog.default:
            self._floods.over(asker.workspace)

    async def _repeated(self, principal: Principal, turn: TurnInput, digest: bytes) -> LiveTurn | StoredTurn | None:
        """Return the turn that the same request_id started; one that has run out of time is waited for first."""
        while True:
            earlier = await self.journal.repeated(principal, turn, digest)
            if not isinstance(earlier, LiveTurn) or not earlier.late:
                return earlier
            await earlier.outcome()

    def _at_hand(self, key: SessionKey, turn: TurnInput) -> OpenSession[ContextWindow] | None:
        """Return the turn's session if it need not be waited for: it is known, or new."""
        if turn.session:
            session = self._sessions.ready(key)
            return None if session is None or self._awaits_others(session) else session
        return self._sessions.create(key, keep=turn.transcript is None)

    def _may_guess(self, key: SessionKey, engine: Engine) -> bool:
        """Tell whether a session that is not at hand is taken for new: an answer that was begun in vain is no loss."""
        return engine.is_free and self._taking is None and self._sessions.may_be_new(key)

    def _still_ready(self, earlier: CatalogEntry, turn: TurnInput) -> CatalogEntry:
        """Return the turn's model again: another one may have been chosen, or this one loaded anew, meanwhile."""
        entry = self._catalog.ready(turn.model)
        if entry.engine is not earlier.engine:
            check_for_model(turn, entry.engine)
        return entry

    # --- what a run asks for -------------------------------------------------------------------------------------

    def conversation(self, turn: TurnInput, session: OpenSession[ContextWindow], engine: Engine) -> Fitted:
        """Return what the model is to read, cut to its context.

        Raises:
            ContextLengthExceeded: the newest message leaves no room for an answer.
        """
        window = session.history
        if turn.transcript is not None:
            window = ContextWindow.of(turn.transcript, engine.count, engine.capabilities.context_length)
        elif not window.is_counted_by(engine.count):
            window = ContextWindow.of(window.messages, engine.count, engine.capabilities.context_length)
            if engine.id == self._catalog.default:
                session.history = window
        rules = _system(turn.system_prompt) if turn.system_prompt else self._rules
        newest = Message(role=Role.USER, parts=turn.parts)
        return window.fit(newest, turn.options, rules, overhead=engine.overhead)

    def generate(
        self, engine: Engine, messages: Sequence[Message], turn: TurnInput, listener: Listener, asker: Asker
    ) -> Generation:
        """Begin the answer that a run listens to; raises what `Engine.begin` does."""
        return self._answers.begin(engine, messages, turn, asker.workspace, listener, asker)

    def used(self, live: LiveTurn, usage: Usage, *, cached: bool, model: str) -> None:
        """Count what an answer took, or what there was of it."""
        workspace, user = live.key.session.workspace, live.input.user
        self._ledger.record(workspace, user, model, usage, cached, live.events[-1].at, self._price(model))

    def replied(self, live: LiveTurn) -> None:
        """Say that the answer of a turn waits to be delivered."""
        if live.input.reply_to is not None:
            self._announce(live.key.session.workspace, live.input.reply_to.channel)

    def over(self, run: TurnRun) -> None:
        """Let a run go."""
        self._runs.discard(run)
        if self._emptied is not None and not self._runs:
            self._emptied.set()

    # --- leave ---------------------------------------------------------------------------------------------------

    async def drain(self, grace: float) -> None:
        """Refuse new turns, let those under way end within `grace` seconds, then leave the rest to the next core."""
        self._emptied = asyncio.Event()
        if self._runs:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace):
                    await self._emptied.wait()
        for run in tuple(self._runs):
            run.hand_over()
        if self._runs or self._moving:
            await self._end_the_rest(self._emptied)

    async def _end_the_rest(self, emptied: asyncio.Event) -> None:
        """Wait a moment for what is stored last; a store that hangs keeps nobody here."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WRITES):
                await emptied.wait()
                if self._moving:
                    await asyncio.wait(self._moving)
        if self._runs:
            log.warning("the store takes no ends; the next core carries them on", extra={"turns": len(self._runs)})
        for run in tuple(self._runs):
            run.hand_over(at_once=True)
        for task in tuple(self._moving):
            task.cancel()
        if self._moving:
            await asyncio.wait(self._moving)


def _system(text: str) -> Sequence[Message]:
    return (Message(role=Role.SYSTEM, parts=(TextPart(text=text),)),) if text else ()


def _interrupted(waiting: Sequence[Orphan]) -> Sequence[Orphan]:
    """Return those of a session's turns behind which one came that interrupts."""
    last = max((at for at, orphan in enumerate(waiting) if orphan.input.when_busy is WhenBusy.INTERRUPT), default=0)
    return waiting[:last]
