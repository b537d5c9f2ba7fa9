"""What a turn on its way needs of the pipeline that it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from moltbot_server.errors import MoltBotError
from moltbot_server.journal import Journal
from moltbot_server.live_turn import LiveTurn
from moltbot_server.metrics import Metrics
from moltbot_server.models.context import ContextWindow, Fitted
from moltbot_server.models.engine import Asker, Engine, Generation, Listener
from moltbot_server.sessions import OpenSession
from moltbot_server.store import Store, Taken
from moltbot_server.turns import Message, TurnInput, Usage


class Surroundings(Protocol):
    """What a run needs of the pipeline that it belongs to."""

    store: Store
    journal: Journal
    metrics: Metrics

    def conversation(self, turn: TurnInput, session: OpenSession[ContextWindow], engine: Engine) -> Fitted:
        """Return what the model is to read, cut to its context."""

    def generate(
        self, engine: Engine, messages: Sequence[Message], turn: TurnInput, listener: Listener, asker: Asker
    ) -> Generation:
        """Begin the answer; raises what `Engine.begin` does."""

    def used(self, live: LiveTurn, usage: Usage, *, cached: bool, model: str) -> None:
        """Count what an answer took, or what there was of it."""

    @property
    def is_taking_over(self) -> bool:
        """True while turns of nodes that are gone are being taken over."""

    def begin_again(self, live: LiveTurn, session: OpenSession[ContextWindow], deadline: float | None) -> None:
        """Start a turn again that was begun on an old session; `deadline` is on the event loop's clock."""

    def guessed(self, session: OpenSession[ContextWindow], answer: Taken | MoltBotError) -> None:
        """Take note of what the store says of a session that was taken for new."""

    def lost(self, session: OpenSession[ContextWindow]) -> None:
        """Take note that another node has a session."""

    def replied(self, live: LiveTurn) -> None:
        """Take note that the answer of a turn waits to be delivered."""

    def over(self, run: Any) -> None:
        """Let a run go."""
