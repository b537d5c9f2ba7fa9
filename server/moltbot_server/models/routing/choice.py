"""Which model of a route a turn asks next: the next one that is well, and when none is left, the next best."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

from moltbot_server.errors import ContextLengthExceeded, ModelUnavailable, MoltBotError
from moltbot_server.models.catalog import CatalogEntry
from moltbot_server.models.engine import Asker
from moltbot_server.models.routing.breaker import Breaker
from moltbot_server.models.routing.candidates import Candidate, Obstacle
from moltbot_server.models.routing.suitability import Conversation
from moltbot_server.turns import Message

_log = logging.getLogger(__name__)


class Pick(NamedTuple):
    """A model to ask, and what it is to read; `trimmed` messages of the history were left out for it."""

    entry: CatalogEntry
    breaker: Breaker
    messages: Sequence[Message]
    trimmed: int = 0


class Choice:
    """The models of one turn, each of which comes up once. `passed_over` gathers those that do not, and why."""

    __slots__ = (
        "_asker",
        "_conversation",
        "_longest",
        "_next",
        "_order",
        "_picked",
        "_resting",
        "_too_short",
        "passed_over",
    )

    def __init__(
        self,
        order: Sequence[Candidate],
        conversation: Conversation,
        longest: int,
        asker: Asker,
    ) -> None:
        """`longest` is the context, in tokens, that the conversation was cut to."""
        self._order = order
        self._conversation = conversation
        self._longest = longest
        self._asker = asker
        self._next = 0
        self._picked: list[str] = []
        self.passed_over: list[tuple[str, MoltBotError]] = []
        self._resting: list[Candidate] = []
        self._too_short: list[Candidate] = []

    def well(self, now: float) -> Pick | None:
        """Return the next model in order that nothing speaks against."""
        while self._next < len(self._order):
            candidate = self._order[self._next]
            self._next += 1
            found = candidate.obstacle(now)
            if isinstance(found, CatalogEntry) and found.engine.id in self._picked:
                continue  # one model by two names
            if isinstance(found, Obstacle):
                if found.last_resort:
                    self._resting.append(candidate)
                self.passed_over.append((candidate.model, found.error))
            elif (refusal := self._refusal(found)) is not None:
                if isinstance(refusal, ContextLengthExceeded):
                    self._too_short.append(candidate)
                self.passed_over.append((found.engine.id, refusal))
            else:
                return self._pick(candidate, found)
        return None

    def ill(self, now: float) -> Pick | None:
        """Return the next one that should rest but is not known to be dead."""
        while self._resting:
            candidate = self._resting.pop(0)
            found = candidate.obstacle(now, anyway=True)
            if not isinstance(found, Obstacle) and self._refusal(found) is None:
                return self._pick(candidate, found)
        return None

    def cut(self, now: float) -> Pick | None:
        """Return the next one that can read the conversation only without its oldest turns, where that will do."""
        if self._asker.whole:
            return None
        while self._too_short:
            candidate = self._too_short.pop(0)
            found = candidate.obstacle(now)
            if isinstance(found, Obstacle):
                continue
            try:
                fitted = self._conversation.shortened(found.engine)
            except ContextLengthExceeded:
                continue
            return self._pick(candidate, found)._replace(messages=fitted.messages, trimmed=fitted.trimmed_messages)
        return None

    def _pick(self, candidate: Candidate, entry: CatalogEntry) -> Pick:
        self._picked.append(entry.engine.id)
        return Pick(entry, candidate.breaker(entry.engine.id), self._conversation.messages)

    def _refusal(self, entry: CatalogEntry) -> MoltBotError | None:
        """Return why a model cannot serve this turn; None when it can."""
        try:
            if (problem := self._conversation.refusal(entry.engine, self._longest)) is not None:
                return problem
            entry.engine.admit(self._asker)
        except MoltBotError as problem:
            return problem
        except Exception:
            _log.exception("a model could not say whether it can serve a turn", extra={"model": entry.engine.id})
            return ModelUnavailable(f"{entry.engine.id} failed in an unexpected way; the log says how.")
        return None
