"""One turn of a route: it asks one model after the other, and some at once, until one of them has answered.

Nothing here waits: engines and a timer call back. Whoever gives the first sign, a word or a thought, is the one that
answers; others that were asked are stopped. Each model is asked once in a turn at most.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from moltbot_server.config_models import ModelRoute
from moltbot_server.errors import (
    BudgetExceeded,
    InvalidField,
    ModelCredential,
    ModelUnavailable,
    MoltBotError,
    QueueFull,
)
from moltbot_server.models.engine import Asker, Finished, Listener
from moltbot_server.models.routing.attempt import AttemptUnderWay
from moltbot_server.models.routing.budget import RetryBudget
from moltbot_server.models.routing.candidates import Candidate
from moltbot_server.models.routing.choice import Choice, Pick
from moltbot_server.models.routing.clock import Clock, Timer
from moltbot_server.models.routing.outcome import Refusal, final_error, message_of
from moltbot_server.models.routing.suitability import Conversation
from moltbot_server.turns import Attempt, FinishReason, Message, Notice, Reset, Role, Routed, TextPart, Usage

_log = logging.getLogger(__name__)

_EARLY = 0.002  # a timer may come that much too soon
_SHARE_OF_DEADLINE = 3  # a turn in a hurry waits a third of its time for its first choice
_INNOCENT = (InvalidField, QueueFull, BudgetExceeded)  # errors that tell nothing of a model's health


@dataclass(slots=True, kw_only=True)
class Counts:
    """What a route has counted since it was made."""

    turns: int = 0
    attempts: int = 0
    passed_over: int = 0
    switches: int = 0
    hedges: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What all turns of a route go by."""

    name: str
    spec: ModelRoute
    budget: RetryBudget
    counts: Counts = field(default_factory=Counts)


class RouteRun:
    """One turn on its way through the models of a route; to whoever began it, a `Generation`."""

    __slots__ = (
        "_asked",
        "_asker",
        "_carried",
        "_choice",
        "_clock",
        "_conversation",
        "_culprit",
        "_due",
        "_empty",
        "_latency",
        "_listener",
        "_log",
        "_over",
        "_pieces",
        "_refusals",
        "_stale",
        "_terms",
        "_timer",
        "_tokens",
        "_told",
        "_under_way",
        "_visible",
        "_waits_since",
        "_why",
        "_winner",
        "began",
    )

    def __init__(
        self,
        terms: Terms,
        clock: Clock,
        order: Sequence[Candidate],
        conversation: Conversation,
        longest: int,
        listener: Listener,
        asker: Asker,
    ) -> None:
        """`longest` is the context, in tokens, that the conversation was cut to."""
        self._terms = terms
        self._conversation = conversation
        self._listener = listener
        self._asker = asker
        self._choice = Choice(order, conversation, longest, asker)
        self._clock = clock
        self.began = self._waits_since = now = clock.time()
        self._latency = terms.spec.latency
        wanted_by = asker.wanted_by if asker.deadline is None else asker.deadline
        if wanted_by is not None:
            self._latency = min(self._latency, max(wanted_by - now, 0.0) / _SHARE_OF_DEADLINE)
        self._asked = self._tokens = self._carried = 0
        self._under_way: list[AttemptUnderWay] = []
        self._winner: AttemptUnderWay | None = None
        self._culprit: AttemptUnderWay | None = None
        self._empty: tuple[AttemptUnderWay, Finished] | None = None
        self._log: list[Attempt] = []
        self._refusals: list[Refusal] = []
        self._pieces: list[str] = []
        self._visible = self._stale = self._over = False
        self._told = self._why = ""
        self._timer: Timer | None = None
        self._due = 0.0

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """The attempts that are over, in the order in which they began; empty when the first choice just answered."""
        if len(self._log) == 1 and self._log[0].outcome == "ANSWERED":
            return ()
        return tuple(sorted(self._log, key=lambda attempt: attempt.start))

    def begin(self) -> None:
        """Ask the first model that can serve the turn."""
        self._terms.counts.turns += 1
        self._terms.budget.turn(self.began)
        self._advance()
        self._arm()

    def stop(self) -> None:
        """Stop what is under way; the listener hears no more."""
        if not self._over:
            self._leave("the turn was stopped")

    # --- whom to ask -----------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Ask the next model that can serve the turn; give up when none is left and none is under way."""
        now = self._clock.time()
        pick = self._choice.well(now)
        if self._choice.passed_over:
            self._pass_over(now)
        if pick is None and not self._under_way:
            # Better an answer from one that is ill, or that reads less of the history, than none.
            if not self._asked or self._terms.budget.has(now):
                pick = self._choice.ill(now)
            pick = pick or self._choice.cut(now)
        if pick is not None:
            self._ask(pick, now)
        elif not self._under_way:
            self._give_up()

    def _pass_over(self, now: float) -> None:
        """Take note of those that were not asked."""
        for model, error in self._choice.passed_over:
            self._log.append(Attempt(model=model, outcome="SKIPPED", reason=error.message, start=now - self.began))
            self._refusals.append(Refusal(model, error, asked=False))
            if not self._asked and not self._why:
                self._why = error.message
        self._terms.counts.passed_over += len(self._choice.passed_over)
        self._choice.passed_over.clear()

    def _ask(self, pick: Pick, now: float) -> None:
        if self._asked and not self._terms.budget.spend(now) and self._culprit is not None:
            self._culprit.rests(now, "too many turns of late had to ask another model after it")
        self._asked += 1
        self._terms.counts.attempts += 1
        attempt = AttemptUnderWay(self, pick.entry, pick.breaker, now, self._clock.time)
        attempt.trimmed = pick.trimmed
        self._under_way.append(attempt)
        if len(self._under_way) == 1:
            self._waits_since = now
            self._tell(attempt)
        else:
            self._terms.counts.hedges += 1
        if self._over:
            return  # stopped by who heard of it
        messages, options = pick.messages, self._conversation.options
        if self._holds:
            said = "".join(self._pieces)
            if not attempt.counts_all:
                said = said.rstrip()  # some providers refuse an answer begun that ends with a blank
            messages = (*messages, Message(role=Role.ASSISTANT, parts=(TextPart(text=said),)))
            if options.max_output_tokens is not None and not attempt.counts_all:
                options = msgspec.structs.replace(
                    options, max_output_tokens=max(1, options.max_output_tokens - self._tokens)
                )
        try:
            attempt.began_as(pick.entry.engine.begin(messages, options, attempt, self._asker))
        except Exception as error:
            attempt.ended(error)

    @property
    def _holds(self) -> bool:
        """Whether something visible was said that stays part of the answer."""
        return self._visible and not self._stale

    # --- what models say -------------------------------------------------------------------------------------------

    def placed(self, attempt: AttemptUnderWay, position: int) -> None:
        """Pass on the place in the queue of the model that was told of."""
        if attempt.model == self._told:
            self._listener.queued(position)

    def spoken(self, attempt: AttemptUnderWay, text: str, tokens: int) -> None:
        """Pass on a piece of the answer."""
        attempt.last_sign = self._clock.time()
        if attempt is not self._winner:
            self._wins(attempt)
        attempt.said = True
        self._tokens += tokens
        self._pieces.append(text)
        if not self._visible and not text.isspace():
            self._visible = bool(text)
        if self._visible and self._terms.spec.on_failure != "continue":
            attempt.speak_to(self._listener.wrote)  # nobody will need the text again
        self._listener.wrote(text, tokens)

    def mused(self, attempt: AttemptUnderWay, text: str) -> None:
        """Pass on what the model thinks."""
        attempt.last_sign = self._clock.time()
        if attempt is not self._winner:
            self._wins(attempt)
        self._listener.thought(text)

    def _wins(self, attempt: AttemptUnderWay) -> None:
        """Let the one that gave a sign answer, and stop the others."""
        now = attempt.last_sign
        attempt.speaks(now)
        self._winner = attempt
        for other in self._under_way:
            if other is not attempt:
                self._log.append(other.leave(now, "CANCELLED", f"{attempt.model} was faster"))
        self._under_way = [attempt]
        self._tell(attempt)
        if self._stale:
            self._stale = self._visible = False
            self._tokens = self._carried = 0
            self._pieces.clear()
            self._listener.noted(Reset(text="", reason=self._why))

    def _tell(self, attempt: AttemptUnderWay) -> None:
        """Tell who answers now, if that is not known."""
        told, model = self._told, attempt.model
        if told == model:
            return
        self._told = model
        if told:
            self._terms.counts.switches += 1
            switch = Notice(code="FAILOVER", origin=f"models/{told}", target=f"models/{model}", reason=self._why)
            self._listener.noted(switch)
            reason = f"stands in for {told}"
        elif self._why:
            reason = f"stands in: {self._why}"
        else:
            reason = f"it is the first choice of the route {self._terms.name}"
        self._listener.noted(Routed(kind="model", name=model, reason=reason))

    def over(self, attempt: AttemptUnderWay, end: Finished | Exception) -> None:
        """Conclude with a good end, or go on to the next model."""
        if isinstance(end, Exception):
            self._failed(attempt, end)
        elif attempt.said or self._holds or end.attachments or end.finish_reason is not FinishReason.STOP:
            self._finished(attempt, end)
        else:
            self._empty = (attempt, end)
            self._failed(attempt, ModelUnavailable(f"{attempt.model} ended its answer without a word."))
        self._arm()

    def _finished(self, attempt: AttemptUnderWay, end: Finished) -> None:
        now = self._clock.time()
        if attempt is not self._winner:
            attempt.last_sign = now
            self._wins(attempt)
        self._under_way.clear()
        self._log.append(attempt.finish(now))
        self._answer(attempt, end)

    def _answer(self, attempt: AttemptUnderWay, end: Finished) -> None:
        self._leave("")
        usage = end.usage
        if self._carried and not attempt.counts_all:
            usage = msgspec.structs.replace(usage, output_tokens=usage.output_tokens + self._carried)
        trimmed = end.trimmed_messages + attempt.trimmed
        self._listener.ended(
            msgspec.structs.replace(
                end, model=attempt.model, attempts=self.attempts, usage=usage, trimmed_messages=trimmed
            )
        )

    # --- what goes wrong -------------------------------------------------------------------------------------------

    def _failed(self, attempt: AttemptUnderWay, error: Exception) -> None:
        """Take note of how a model broke, and go on to the next one unless another may still answer."""
        now = self._clock.time()
        self._under_way.remove(attempt)
        told = message_of(error)
        self._log.append(self._judged(attempt, error, now, told))
        self._refusals.append(Refusal(attempt.model, error, asked=True))
        if attempt.model == self._told:
            self._why = told
        if attempt is self._winner:
            self._winner = None
            if self._visible and self._terms.spec.on_failure == "stop":
                if self._is_late(now):
                    self._give_up()
                else:
                    self._stop_short(attempt, told)
                return
            self._stale = not self._visible or self._terms.spec.on_failure == "restart"
            self._carried = self._tokens
        if not any(not other.is_slow for other in self._under_way):
            self._advance()
        elif self._told == attempt.model:
            self._tell(self._under_way[0])

    def _judged(self, attempt: AttemptUnderWay, error: Exception, now: float, told: str) -> Attempt:
        outcome = error.reason if isinstance(error, MoltBotError) else "INTERNAL"
        if isinstance(error, ModelCredential):
            return attempt.leave(now, outcome, told, refused=True)
        if isinstance(error, _INNOCENT) or self._is_late(now):
            return attempt.leave(now, outcome, told)
        if not isinstance(error, MoltBotError):
            _log.error("a model failed", exc_info=error, extra={"model": attempt.model, "route": self._terms.name})
        self._culprit = attempt
        return attempt.fail(now, outcome, told)

    def _is_late(self, now: float) -> bool:
        """Tell whether the caller's time is over, which is nobody's fault."""
        return self._asker.deadline is not None and now >= self._asker.deadline - _EARLY

    def _stop_short(self, attempt: AttemptUnderWay, why: str) -> None:
        """End the answer with what was said of it, and say why there is no more."""
        self._terms.counts.failed += 1
        self._listener.noted(Notice(code="UPSTREAM_ERROR", origin=f"models/{attempt.model}", target="", reason=why))
        if not self._over:  # stopped by who heard of it
            usage = Usage(output_tokens=attempt.tokens)
            self._answer(attempt, Finished(finish_reason=FinishReason.UPSTREAM_ERROR, usage=usage))

    def _give_up(self) -> None:
        """End the turn badly: nobody is left to ask."""
        if self._empty is not None and not self._visible and not self._stale:
            attempt, end = self._empty
            self._why = "an answer without a word is all there is"
            self._tell(attempt)
            self._answer(attempt, end)
            return
        error = final_error(self._refusals)
        if self._visible and not error.retryable:
            error = ModelUnavailable(f"The answer broke off: {error.message}")
        self._terms.counts.failed += 1
        self._leave("the turn failed")
        error.attempts = self.attempts
        self._listener.ended(error)

    def _leave(self, why: str) -> None:
        """Be over: nothing is under way any more and nothing is to come."""
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._under_way:
            now = self._clock.time()
            self._log += [attempt.leave(now, "CANCELLED", why) for attempt in self._under_way]
            self._under_way = []
        # Nothing may be left in a circle for the garbage collector to find.
        self._winner = self._culprit = self._empty = None
        self._refusals = []

    # --- time ------------------------------------------------------------------------------------------------------

    def _arm(self) -> None:
        """Have the timer come when the next thing is due; one that comes too early does no harm."""
        if self._over:
            return
        due = self._silent_since + self._terms.spec.timeout
        if self._winner is None:
            for attempt in self._under_way:
                if not attempt.is_slow:
                    due = min(due, attempt.began + self._latency)
        if self._timer is not None:
            if self._due <= due:
                return
            self._timer.cancel()
        self._due = due
        self._timer = self._clock.call_later(max(due - self._clock.time(), 0.0), self._tick)

    @property
    def _silent_since(self) -> float:
        return self._waits_since if self._winner is None else self._winner.last_sign

    def _tick(self) -> None:
        self._timer = None
        now = self._clock.time()
        if now >= self._silent_since + self._terms.spec.timeout - _EARLY:
            self._time_out(now)
        elif self._winner is None:
            self._hedge(now)
        self._arm()

    def _hedge(self, now: float) -> None:
        """Ask another model as well when those that were asked take too long."""
        late = [attempt for attempt in self._under_way if now >= attempt.began + self._latency - _EARLY]
        late = [attempt for attempt in late if not attempt.is_slow]
        for attempt in late:
            waited = now - attempt.began
            why = f"{attempt.model} said nothing for {_seconds(waited)}"
            attempt.slow(now, why, judged=waited >= self._terms.spec.latency - _EARLY)
            self._culprit = attempt
            self._why = why
        if late:
            self._advance()

    def _time_out(self, now: float) -> None:
        """Give those up that have given no sign for as long as a turn may wait."""
        self._waits_since = now
        for attempt in tuple(self._under_way):
            waited = _seconds(self._terms.spec.timeout)
            if attempt in self._under_way:
                self._failed(attempt, ModelUnavailable(f"{attempt.model} gave no sign for {waited}."))


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"
