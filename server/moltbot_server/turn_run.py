"""One turn on its way: stored, queued in its session, answered, ended. `pipeline` has its beginning."""

from __future__ import annotations

import logging
import secrets
import time

import msgspec

from moltbot_server.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    InternalError,
    MoltBotError,
    NotServing,
    TurnDeleted,
    TurnInterrupted,
)
from moltbot_server.journal import content_error
from moltbot_server.live_turn import LiveTurn
from moltbot_server.models.catalog import CatalogEntry
from moltbot_server.models.context import ContextWindow, Fitted
from moltbot_server.models.engine import Asker, Finished, Generation, Listener
from moltbot_server.sessions import OURS, OpenSession, title_of
from moltbot_server.store import Deleted, Elsewhere, EndedTurn, Moved, NewTurn, StoredTurn, Taken
from moltbot_server.surroundings import Surroundings
from moltbot_server.turn_anew import MOST, Anew
from moltbot_server.turn_begun import begun, go_on, with_answer
from moltbot_server.turn_end import end_of, failed, joined, remembered, timings, unkept
from moltbot_server.turns import (
    Accepted,
    Attempt,
    Completed,
    Failed,
    FinishReason,
    Notice,
    Queued,
    ReasoningDelta,
    Reset,
    Routed,
    Timings,
    TurnState,
    Usage,
    WhenBusy,
)

log = logging.getLogger(__name__)

_TRY_AGAIN = 1.0  # seconds from one attempt to store an end to the next
_NOTHING_READ = Fitted([], 0, 0, 0)


class TurnRun:
    """One turn on its way from its acceptance to its end.

    Nothing here waits: the store, the session and the engine call back. A task for each turn would cost more than all
    that is done in it. The engine's listener is the run itself.
    """

    __slots__ = (
        "_asker",
        "_attempts",
        "_broken",
        "_deadline",
        "_delayed",
        "_ending",
        "_engine",
        "_entered",
        "_entry",
        "_finished",
        "_first_text",
        "_fitted",
        "_generation",
        "_live",
        "_over",
        "_pieces",
        "_pipeline",
        "_routed",
        "_row",
        "_session",
        "_started",
        "_thoughts",
        "_writes",
    )

    def __init__(
        self,
        pipeline: Surroundings,
        live: LiveTurn,
        session: OpenSession[ContextWindow],
        entry: CatalogEntry,
        asker: Asker,
        deadline: float = 0.0,
    ) -> None:
        """`deadline` is a Unix time, 0 for none."""
        self._deadline = deadline
        self._pipeline = pipeline
        self._live = live
        self._session = session
        self._entry = entry
        self._engine = entry.hold()
        self._asker = asker
        self._entered = self._over = self._delayed = False
        self._started = self._first_text = 0.0
        self._fitted, self._pieces = _NOTHING_READ, list[str]()
        self._generation: Generation | None = None
        self._finished: Finished | None = None
        self._thoughts = self._routed = ""
        self._attempts: tuple[Attempt, ...] = ()
        self._ending: Completed | Failed | None = None
        self._row: EndedTurn | None = None
        self._writes = self._broken = 0
        live.halt = self.stop

    # --- accept --------------------------------------------------------------------------------------------------

    def begin(self, warning: str = "") -> None:
        """Have the turn stored, and set out as soon as the session is free. `warning` is told to its caller."""
        live, session = self._live, self._session
        live.record(Accepted(session=session.key.session, ordinal=live.key.ordinal, request_id=live.input.request_id))
        if warning:
            live.record(Notice(code="BUDGET", origin="", target="", reason=warning))
        self._accept()
        if session.enter(live, self._answer):
            self._answer()

    def carry_on(self, *, interrupted: bool = False) -> None:
        """Set out on a turn that another core began: it goes on, or anew; an `interrupted` one keeps what it has."""
        live, session = self._live, self._session
        kept, go = (live.text, self._cut_short) if interrupted else (begun(live, self._engine), self._answer)
        self._take_up()
        if kept and not interrupted:
            live.go_on_with(kept, "the core that was answering is gone: another one goes on")
        else:
            # Also where nothing was kept: a power failure may have taken what was shown.
            live.record(Reset(text=kept, reason="the core that was answering is gone: what comes now counts"))
        self._pieces = [kept] if kept else []
        if session.enter(live, go):
            go()
        else:
            self._interrupt()

    def _cut_short(self) -> None:
        """End a turn that a later one interrupts, as when it is cancelled; the session is this turn's."""
        if not self._over and self._ending is None:
            self._entered = True
            self._conclude(self._completed(FinishReason.CANCELLED))

    def _interrupt(self) -> None:
        """Cancel the turns before this one if it is to go first: not before it is known to be one of its own."""
        if self._live.input.when_busy is WhenBusy.INTERRUPT:
            self._session.interrupt(self._live)

    def _take_up(self) -> None:
        """Let the turn's followers begin where they are, or with its acceptance."""
        live = self._live
        live.stored()
        if not live.events:
            name = self._session.key.session
            live.record(Accepted(session=name, ordinal=live.key.ordinal, request_id=live.input.request_id))

    def abandon(self, error: MoltBotError) -> None:
        """End a turn that another core began and that cannot be carried on."""
        self._take_up()
        self._conclude(self._failed(error))

    def _accept(self, *, again: bool = False) -> None:
        """Store the turn; `again` in the place of a failed one with its request_id."""
        live, session, store = self._live, self._session, self._pipeline.store
        turn = live.input
        row = NewTurn(
            key=live.key,
            request_id=turn.request_id,
            digest=live.digest,
            create_time=time.time(),
            question=turn.parts,
            opens_session=not session.exists,
            title="" if session.exists else title_of(turn),
            user=turn.user,
            channel=turn.channel,
            ephemeral=turn.transcript is not None,
            rest=turn,
            deadline=self._deadline,
            version=session.version,
        )
        if again:
            store.reaccept(row).then(lambda answer: self._accepted(answer, again=True))
        else:
            store.accept(row).then(self._accepted)

    def _accepted(self, earlier: Taken | MoltBotError, *, again: bool = False) -> None:
        """Tell the followers what the store said; a turn that it did not take is dropped."""
        live, guessed = self._live, self._live.is_guess
        if guessed:
            live.is_guess = False
            self._pipeline.guessed(self._session, earlier)
        if self._over:
            return  # broken off meanwhile
        live.accepted_after = time.perf_counter() - live.arrived
        if earlier is None:
            self._session.exists, self._session.version = True, OURS
            live.stored()
            self._interrupt()
            if (again or guessed) and live.visible < len(live.events):
                # What it has recorded came to the store before its row did, and was left out; of a guess it waits here.
                self._pipeline.journal.note(live)
            if (again or guessed) and self._row is not None:
                # The first row gave way to an earlier turn's, and its end with it.
                self._finish(self._row)
        elif isinstance(earlier, MoltBotError):
            self._drop(refusal=earlier)
        elif isinstance(earlier, Moved):
            self._begin_again()
        elif isinstance(earlier, Elsewhere):
            self._pipeline.lost(self._session)
            self._drop(refusal=NotServing.elsewhere(earlier.node))
        elif isinstance(earlier, Deleted):
            self._drop(refusal=TurnDeleted("the turn of this request_id was deleted; make a new one to ask again"))
        elif self._may_start_again(earlier) and earlier.digest == live.digest and not again:
            if self._session.is_old:  # a turn before this one was told so, and goes before it
                self._begin_again()
            else:
                self._accept(again=True)
        else:
            self._drop(
                refusal=content_error(earlier.digest, live.digest) or self._elsewhere(earlier), duplicate_of=earlier
            )

    def _begin_again(self) -> None:
        """Have the turn begun again with what others have said in its session; nobody has seen anything of it."""
        live, session, deadline = self._live, self._session, self._live.expires_at
        self._fall_silent()
        self._leave(suspended=True)
        self._pipeline.begin_again(live, session, deadline)

    def _may_start_again(self, earlier: StoredTurn) -> bool:
        """Tell whether a turn is over without a good end; one whose end could not be stored runs in the store only."""
        gone = earlier.state is TurnState.RUNNING and not self._is_here(earlier)
        return earlier.retryable or (gone and self._elsewhere(earlier) is None)

    def _is_here(self, earlier: StoredTurn) -> bool:
        """Tell whether a turn that holds the request_id is under way here: not this one, which may have its number."""
        return self._pipeline.journal.running(earlier) not in (None, self._live)

    def _elsewhere(self, earlier: StoredTurn) -> MoltBotError | None:
        """Return where to follow a turn that another core carries out, or that this one is about to, if so."""
        pipeline, store = self._pipeline, self._pipeline.store
        if earlier.state is not TurnState.RUNNING or not store.shared:
            return None
        if earlier.node != store.node:
            return NotServing.elsewhere(earlier.node)
        is_coming = pipeline.is_taking_over and not self._is_here(earlier)
        return NotServing.elsewhere() if is_coming else None

    def _drop(self, *, refusal: MoltBotError | None = None, duplicate_of: StoredTurn | None = None) -> None:
        """End without an end: the store has no such turn."""
        self._fall_silent()
        self._live.stored(refusal=refusal, duplicate_of=duplicate_of)
        self._leave()

    # --- answer --------------------------------------------------------------------------------------------------

    def _answer(self) -> None:
        """Route the turn and set the engine to work; the session is this turn's."""
        if self._over or self._ending is not None:
            return  # stopped in the moment that the session was given to it
        self._entered = True
        self._started = time.perf_counter()
        live, engine = self._live, self._engine
        turn = live.input
        if (later := self._session.joined_by(live)) is not None:
            self._conclude(joined(self._timings(), later.key.ordinal))
            return
        named = "the request names this model" if turn.model else "it is the workspace's default model"
        if not engine.is_route:
            live.record(Routed(kind="model", name=engine.id, reason=named))
        try:
            self._fitted = self._pipeline.conversation(turn, self._session, engine)
            if self._pieces:
                go_on(self._generate, self, self._pieces[0])
            else:
                self._generate(self)
        except Exception as error:
            self.ended(error)

    def _generate(self, listener: Listener, begun: str = "") -> None:
        turn, messages = self._live.input, with_answer(self._fitted.messages, begun)
        self._generation = self._pipeline.generate(self._engine, messages, turn, listener, self._asker)

    def queued(self, position: int) -> None:
        """Tell the place in the queue before the engine; the engine calls this."""
        self._live.record(Queued(position=position))

    def wrote(self, text: str, tokens: int) -> None:
        """Record another piece of the answer; the engine calls this."""
        if not (self._pieces and self._first_text):
            self._first_text = time.perf_counter()
        self._pieces.append(text)
        self._live.say(text)

    def thought(self, text: str) -> None:
        """Record more of what the model thinks; the engine calls this."""
        self._thoughts += text
        self._live.record(ReasoningDelta(text=text))

    def noted(self, what: Routed | Notice | Reset) -> None:
        """Record who answers, a switch, or that what was written is void; the engine calls this."""
        if isinstance(what, Routed):
            self._routed = what.name
        if isinstance(what, Reset):
            self._pieces = [what.text] if what.text else []
            self._thoughts = ""
        self._live.record(what)

    def ended(self, end: Finished | Exception) -> None:
        """Conclude the turn; the engine calls this."""
        try:
            self._end(end)
        except Exception:
            self._break_off()

    def _end(self, end: Finished | Exception) -> None:
        if isinstance(end, MoltBotError | Finished):
            self._attempts = end.attempts
        if isinstance(end, Finished):
            self._finished = end
            self._conclude(self._completed(end.finish_reason))
        elif isinstance(end, ContextLengthExceeded):
            # The engine blames the conversation that it was given; the caller sent its newest message alone.
            self._conclude(self._failed(end.at("turn.parts")))
        elif isinstance(end, TurnInterrupted) and self._broken < MOST and not self._engine.is_route:
            self._broken += 1  # a route says by itself what becomes of an answer that broke off
            text = "" if self._thoughts else "".join(self._pieces)
            try:
                if self._engine.capabilities.continuation and text and not text.isspace():
                    go_on(self._generate, self, text)
                else:
                    self._generate(Anew(self))
            except Exception as error:
                self._end(error)
        elif isinstance(end, MoltBotError):
            self._conclude(self._failed(end))
        else:
            incident = secrets.token_hex(4)
            log.error("a turn failed", exc_info=end, extra={"incident": incident})
            self._conclude(self._failed(InternalError(f"something went wrong in the core (incident {incident})")))

    def stop(self) -> None:
        """End the turn now: for a caller, because its deadline passed, or because the core leaves."""
        if self._over or self._ending is not None:
            return
        if self._live.lost:
            self._drop(refusal=NotServing.elsewhere())
            return
        self._fall_silent()
        ending: Completed | Failed
        if self._live.late:
            ending = self._failed(DeadlineExceeded("the deadline passed before the answer was complete"))
        elif not self._live.cancelling:
            ending = self._failed(TurnInterrupted("the core stopped while the turn ran"))
        else:
            ending = self._completed(FinishReason.CANCELLED)
        self._conclude(ending)

    def hand_over(self, *, at_once: bool = False) -> None:
        """Leave the turn to the next core, `at_once` although its end is being stored: its row stays as it is."""
        if self._over or (self._ending is not None and not self._delayed and not at_once):
            return
        if self._ending is None and (self._live.input.cancel_on_disconnect or not self._live.is_stored):
            self.stop()
            return
        text = "the core is leaving; the next one carries this turn on: follow it there, or repeat the call"
        self._drop(refusal=NotServing(text, retry_after=1.0, handed_over=True))

    def _fall_silent(self) -> None:
        """Free the engine. A place in the session's queue is given up when the end is stored, which may be late."""
        if self._generation is not None:
            self._generation.stop()

    # --- end -----------------------------------------------------------------------------------------------------

    def _conclude(self, ending: Completed | Failed) -> None:
        """Have the end stored, before anybody sees it."""
        self._ending = ending
        self._finish(end_of(self._live, ending, self._model()))

    def _finish(self, row: EndedTurn) -> None:
        self._row = row
        if self._live.is_guess:
            return  # stored when it is known whose number it has
        self._writes += 1
        self._pipeline.store.finish(row).then(self._stored)

    def _stored(self, error: MoltBotError | None) -> None:
        try:
            self._settle(error)
        except Exception:
            self._break_off()

    def _settle(self, error: MoltBotError | None) -> None:
        """Remember the answer in the session, then let the followers see the end."""
        self._writes -= 1
        live, row, ending = self._live, self._row, self._ending
        if self._over or self._writes or not live.is_stored or row is None or ending is None:
            return  # it was dropped, or is being stored again
        last = row.events[-1]
        if isinstance(error, TurnInterrupted):
            self._drop(refusal=NotServing.elsewhere())
            return
        if error is not None:
            self._store_later(error)
            return
        if self._delayed:
            live.stored()  # its followers may come back
        self._session.history.extend(remembered(live, row))
        live.end(last)
        if row.delivery is not None:
            self._pipeline.replied(live)
        self._pipeline.metrics.turn_ended(ending, row.model)
        if row.model and (isinstance(ending, Completed) or self._pieces):
            cached = isinstance(ending, Completed) and ending.cached
            self._pipeline.used(live, self._usage(), cached=cached, model=row.model)
        self._leave()

    def _store_later(self, error: MoltBotError) -> None:
        """Tell nobody of an end that is not kept: send the followers away, and try again until it is."""
        self._delayed = True
        self._live.stored(refusal=unkept(error))
        self._pipeline.journal.ticker.call_within(_TRY_AGAIN, self._store_again)

    def _store_again(self) -> None:
        if not self._over and self._row is not None:
            self._finish(self._row)

    def _break_off(self) -> None:
        """Let nobody wait for an end that will not come. Called while an exception is handled."""
        log.exception("a turn could not be brought to its end")
        self._drop(refusal=InternalError("something went wrong in the core; its log says what"))

    def _leave(self, *, suspended: bool = False) -> None:
        """Make room for the next turn, once. A `suspended` one begins again."""
        if self._over:
            return
        self._over = True
        if self._delayed:
            self._pipeline.journal.ticker.forget(self._store_again)
        if self._entered:
            self._session.leave()
        else:
            self._session.withdraw(self._live)
        self._session.release()
        self._generation = None
        self._live.let_go()
        if suspended:
            self._pipeline.journal.suspend(self._live)
        else:
            self._pipeline.journal.close(self._live)
        self._entry.release()
        self._pipeline.over(self)

    # --- what is told --------------------------------------------------------------------------------------------

    def _completed(self, reason: FinishReason) -> Completed:
        """Return the event of an answer that ended by itself, or that a caller stopped: its text so far is kept."""
        pieces, ordinal = self._pieces, self._live.key.ordinal
        attachments = self._finished.attachments if self._finished else ()
        return Completed(
            text="".join(pieces),
            finish_reason=reason,
            usage=self._usage(),
            timings=self._timings(),
            model=self._model() if pieces or reason is not FinishReason.CANCELLED else "",
            message=f"{ordinal}.1" if pieces or attachments else "",
            attachments=attachments,
            reasoning=self._thoughts,
            cached=self._finished.cached if self._finished else False,
        )

    def _model(self) -> str:
        """Return the id of the model that answered: of a route it is known at the end, or not at all."""
        if self._finished is not None and self._finished.model:
            return self._finished.model
        return self._routed or self._engine.id

    def _failed(self, error: MoltBotError) -> Failed:
        """Return the event of an answer that an error ended."""
        return failed(error, self._timings())

    def _usage(self) -> Usage:
        """Return the tokens read and written, as the engine counted them or, before its end, as they came."""
        counted = self._finished.usage if self._finished else Usage(output_tokens=len(self._pieces))
        if counted.input_tokens:
            return counted
        return msgspec.structs.replace(counted, input_tokens=self._fitted.tokens)

    def _timings(self) -> Timings:
        """Return where the time went, up to now."""
        fitted, end, attempts = self._fitted, self._finished, self._attempts
        return timings(self._live, self._started, self._first_text, fitted=fitted, end=end, attempts=attempts)
