"""What the store in memory keeps: sessions, and turns with what was asked and how they ended."""

from __future__ import annotations

import msgspec

from moltbot_server.store.protocol import EndedTurn, NewTurn, Orphan, StoredTurn
from moltbot_server.turns import Event, Failed, FinishReason, Message, Part, Role, Session, TurnState


class KeptTurn:
    """A turn: its row, what it told while it ran, and its end."""

    __slots__ = ("end", "epoch", "gave_way", "journal", "row", "state")

    def __init__(self, row: NewTurn) -> None:
        self.row = row
        self.state = TurnState.RUNNING
        self.end: EndedTurn | None = None
        self.epoch = 1
        self.journal: dict[int, tuple[Event, ...]] = {}
        self.gave_way = False

    @property
    def answer(self) -> tuple[Part, ...]:
        """What was answered."""
        return self.end.answer if self.end is not None else ()

    def finish(self, end: EndedTurn) -> None:
        """Take the end."""
        self.state, self.end = end.state, end
        self.journal.clear()

    def give_way(self) -> None:
        """Leave the request_id and the question to another turn."""
        self.gave_way = True
        self.journal.clear()
        if self.state is TurnState.RUNNING:
            self.state = TurnState.FAILED

    def take_over(self) -> Orphan | None:
        """Return what it takes to carry the turn on, where it runs; with too little, it has failed."""
        if self.state is not TurnState.RUNNING:
            return None
        if self.row.rest is None:
            self.state = TurnState.FAILED
            return None
        self.epoch += 1
        kept = tuple(event for first in sorted(self.journal) for event in self.journal[first])
        asked = msgspec.structs.replace(self.row.rest, parts=self.row.question)
        turn = msgspec.structs.replace(self.stored(), events=kept)
        return Orphan(turn=turn, input=asked, epoch=self.epoch, deadline=self.row.deadline)

    def stored(self) -> StoredTurn:
        """Return the turn as the core knows it."""
        events = self.end.events if self.end is not None else ()
        last = events[-1].kind if events else None
        retryable = self.state is TurnState.FAILED and (last is None or (isinstance(last, Failed) and last.retryable))
        return StoredTurn(
            key=self.row.key,
            request_id=self.row.request_id,
            digest=self.row.digest,
            state=self.state,
            create_time=self.row.create_time,
            end_time=self.end.end_time if self.end is not None else 0.0,
            events=events,
            retryable=retryable,
        )

    @property
    def is_told(self) -> bool:
        """Whether a model that goes on reads it: it was answered, or another turn answered it too."""
        return bool(self.answer) or (self.end is not None and self.end.finish_reason is FinishReason.JOINED)

    def messages(self) -> list[Message]:
        """Return what was asked and, if it was answered, the answer."""
        row, end, ordinal = self.row, self.end, self.row.key.ordinal
        asked = Message(
            role=Role.USER, parts=row.question, id=f"{ordinal}.0", turn=ordinal, create_time=row.create_time
        )
        if end is None or not end.answer:
            return [asked]
        answered = Message(
            role=Role.ASSISTANT,
            parts=end.answer,
            id=f"{ordinal}.1",
            turn=ordinal,
            model=end.model,
            create_time=end.end_time,
            finish_reason=end.finish_reason,
        )
        return [asked, answered]


class Conversation:
    """A session and its turns by number."""

    __slots__ = ("_base", "channel", "create_time", "ephemeral", "key", "title", "turns", "update_time", "user")

    def __init__(self, first: NewTurn) -> None:
        """`first` is the turn that it begins with."""
        self.key = first.key.session
        self.title, self.user, self.channel = first.title, first.user, first.channel
        self.ephemeral = first.ephemeral
        self.create_time = self.update_time = first.create_time
        self.turns: dict[int, KeptTurn] = {}
        self._base = 0

    @property
    def last_ordinal(self) -> int:
        """The highest number that a turn ever had."""
        return max(self._base, max(self.turns, default=0))

    def in_order(self) -> list[KeptTurn]:
        """Return the turns by number: they may be stored in another order."""
        return [self.turns[ordinal] for ordinal in sorted(self.turns)]

    def reset(self) -> None:
        """Forget what was said."""
        self._base = self.last_ordinal
        self.title = ""
        self.turns.clear()

    def listed(self) -> Session:
        """Return the session as it is listed."""
        said = [turn for turn in self.turns.values() if not turn.gave_way]
        return Session(
            key=self.key,
            title=self.title,
            user=self.user,
            channel=self.channel,
            create_time=self.create_time,
            update_time=self.update_time,
            message_count=len(said) + sum(bool(turn.answer) for turn in said),
        )
