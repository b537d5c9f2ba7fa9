"""What a store promises, and the values that cross its border."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from moltbot_server.store.outbox import NewDelivery, Outbox
from moltbot_server.store.pending import Pending
from moltbot_server.turns import (
    Event,
    FinishReason,
    Message,
    Part,
    Session,
    SessionKey,
    TurnInput,
    TurnKey,
    TurnState,
    Value,
)

# After a crash nobody knows what a reader has seen of a turn; the number of its next event lies beyond it.
SEQUENCE_AFTER_CRASH = 1_000_000


class Elsewhere(Value, frozen=True, kw_only=True):
    """Another node runs turns of the session: what is to happen in it has to happen there."""

    node: str


class Moved(Value, frozen=True):
    """What this node remembers of the session is old: load it again."""


class Deleted(Value, frozen=True):
    """The `request_id` started a turn that was deleted with its session within the last day: see `KEEP_REQUESTS`."""


KEEP_REQUESTS = 86_400.0
"""Seconds after its acceptance for which, at least, a deleted turn is known by its `request_id`."""
GUESSED = -2
"""The version of a session that is taken for new unseen: the store refuses its turn if there is such a session."""


class NewTurn(Value, frozen=True, kw_only=True):
    """A turn to be accepted: its row, its user message, and its session if that is new.

    `rest` is what else it takes to carry the turn out, without its question; `deadline` is a Unix time, 0 for none.
    `digest` is of the content, so that a reused `request_id` can be told from a repeated call. `ephemeral` sessions are
    not listed. `opens_session` is True when the session's row may be missing or untitled; else `title`, `user` and
    `channel` are not looked at. `version` is the session's as it was loaded, 0 when there was none, or `GUESSED`: then
    nothing else is told of the turn before it is accepted, for it may have the number of another one.
    """

    key: TurnKey
    request_id: str
    digest: bytes
    create_time: float
    question: tuple[Part, ...]
    opens_session: bool = True
    title: str = ""
    user: str = ""
    channel: str = ""
    ephemeral: bool = False
    rest: TurnInput | None = None
    deadline: float = 0.0
    version: int = 0


class JournalEntry(Value, frozen=True, kw_only=True):
    """What happened in a turn that runs, to be kept before anybody sees it. `epoch`: see `Orphan`."""

    key: TurnKey
    events: tuple[Event, ...]
    epoch: int = 1


class EndedTurn(Value, frozen=True, kw_only=True):
    """How a turn ended: its events, the answer that belongs to the session's history, and what is to be delivered."""

    key: TurnKey
    state: TurnState
    end_time: float
    events: tuple[Event, ...]
    answer: tuple[Part, ...] = ()
    model: str = ""
    finish_reason: FinishReason | None = None
    epoch: int = 1
    delivery: NewDelivery | None = None


class StoredTurn(Value, frozen=True, kw_only=True):
    """A turn as the store knows it. `events` is empty while it runs; `retryable`: it failed in a way that may pass.

    `node` is the one that runs it; empty when it has ended.
    """

    key: TurnKey
    request_id: str
    digest: bytes
    state: TurnState
    create_time: float
    end_time: float = 0.0
    events: tuple[Event, ...] = ()
    retryable: bool = False
    node: str = ""


Taken = StoredTurn | Elsewhere | Moved | Deleted | None
"""What becomes of a turn that is to be accepted: see `Store.accept`."""


class Orphan(Value, frozen=True, kw_only=True):
    """A turn whose core is gone, taken over to be carried on: what was asked, and what was kept of its events.

    `epoch` counts the cores that had the turn. The store takes nothing of it from one with a lower number.
    """

    turn: StoredTurn
    input: TurnInput
    epoch: int
    deadline: float = 0.0


class StoredSession(Value, frozen=True, kw_only=True):
    """What a session needs to go on: its last ordinal, and its latest messages, oldest first.

    `version` is another one after each turn that was accepted, each reset, and each time that somebody else has the
    session; it is never 0. `running_on` is the node that runs turns of it now, empty for none; when that is another
    node, the session cannot go on here, and there are no messages.
    """

    last_ordinal: int
    messages: tuple[Message, ...]
    version: int = 1
    running_on: str = ""


class UsageRow(Value, frozen=True, kw_only=True):
    """What turns of one day, model and user used, or a sum of such, in which what was summed over is empty.

    `day` is `YYYY-MM-DD` in UTC; `cost` is in millionths of the currency that prices are in. Turns that were answered
    from a cache of ours are among the `turns` and have no tokens.
    """

    workspace: str
    day: str = ""
    model: str = ""
    user: str = ""
    turns: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cached_input_tokens: int = 0
    cached_turns: int = 0
    cost: float = 0.0


UsagePlace = tuple[str, str, str]
"""A row's day, model and user: its place in a list."""


class UsageQuery(Value, frozen=True, kw_only=True):
    """Which usage is asked for: from the day `first` to `last`, told apart `by` day, model or user.

    Empty names stand for all: of workspaces, each has rows of its own.
    """

    first: str
    last: str
    by: tuple[str, ...]
    workspace: str = ""
    model: str = ""
    user: str = ""


class UsagePage(Value, frozen=True, kw_only=True):
    """Rows of usage, and the total over all that was asked for."""

    rows: tuple[UsageRow, ...]
    total: UsageRow


@dataclass(frozen=True, slots=True, kw_only=True)
class Away:
    """A store that cannot be reached or takes no writes: where, why, since when (Unix seconds). For whoever runs it."""

    where: str
    problem: str
    since: float


class Store(Protocol):
    """Keeps sessions and turns, and what they used.

    What a pending write or a coroutine has answered is on the disk. Every method raises `StorageFull` or
    `StorageUnavailable` when the store cannot do it. A `shared` store serves several cores at once, its nodes: turns of
    one that is gone are found by asking again and again. All turns of a session that run are on one node, and a
    session in which none runs belongs to nobody.
    """

    shared: bool

    @property
    def node(self) -> str:
        """The name of this node, which no other one ever has."""

    @property
    def away(self) -> Away | None:
        """Why the store cannot be reached, or takes no writes, now; None while all is well, as far as is known."""

    @property
    def warnings(self) -> Sequence[str]:
        """What whoever runs the store should know of it: that something is lost, or may be."""

    @property
    def outbox(self) -> Outbox:
        """Where deliveries of turns that ended are kept; there is one while the store is open."""

    async def open(self) -> None:
        """Open the store; turns that were running when it was last used wait to be taken over."""

    async def close(self) -> None:
        """Write what waits, then close."""

    async def address_of(self, node: str) -> str:
        """Return the address at which a node is reached; empty when it is gone, or has told none."""

    async def advertise(self, address: str) -> None:
        """Tell other nodes, where there may be some, at which address of the network this one is reached."""

    def accept(self, turn: NewTurn) -> Pending[Taken]:
        """Store a turn and its user message; answer None, or the turn that used the `request_id` before.

        Where other nodes had the session since it was loaded, nothing is stored, and `Elsewhere` or `Moved` is the
        answer; and `Deleted` where that turn was deleted. What this node has accepted last itself is never old.
        """

    def reaccept(self, turn: NewTurn) -> Pending[Taken]:
        """Store a turn like `accept`, taking the `request_id` and the question over from a turn without a good end.

        Whoever calls this knows that the earlier turn does not run any more here; one that another core runs stays.
        """

    def hurry(self, key: TurnKey) -> None:
        """Let a turn that is being accepted wait no longer for others to be stored with: it has something to show."""

    def append(self, entries: Sequence[JournalEntry]) -> Pending[Collection[TurnKey]]:
        """Keep what happened in turns that run; what is answered survives the death of the core.

        Entries of turns that the store has not, or that another core has taken over, are left out. The answer names
        those turns, but perhaps not one whose acceptance was not answered yet, and is refused then. An entry that
        begins with the same event as one that was kept takes its place.
        """

    async def take_over(self) -> Sequence[Orphan]:
        """Take over the turns whose core is gone, in the order in which they were accepted.

        Those that cannot be carried on, for which not enough was kept, become failed and retryable.
        """

    def finish(self, turn: EndedTurn) -> Pending[None]:
        """Store how a turn ended, and its delivery with it.

        It may be called before `accept` has answered, and does nothing if that refuses. It is answered with
        `TurnInterrupted` when another core has taken the turn over.
        """

    async def find_turn(self, key: TurnKey) -> StoredTurn | None:
        """Return a turn with its events, or None."""

    async def load_session(self, key: SessionKey, limit: int) -> StoredSession | None:
        """Return a session with the messages of its latest `limit` turns that were answered, or None."""

    async def get_session(self, key: SessionKey) -> Session | None:
        """Return a session as it is listed, or None."""

    async def list_sessions(
        self, workspace: str, *, user: str, channel: str, before: tuple[float, str] | None, limit: int
    ) -> Sequence[Session]:
        """Return sessions, last used first, that come after `before` (update time, id) in that order."""

    async def list_messages(self, key: SessionKey, *, after: tuple[int, int], limit: int) -> Sequence[Message]:
        """Return a session's messages, oldest first, that come after the position (ordinal, index)."""

    async def reset_session(self, key: SessionKey) -> Elsewhere | None:
        """Delete a session's turns and messages; its ordinals go on. Nothing is done where another node runs turns.

        For `KEEP_REQUESTS` after they were accepted nothing but their `request_id` is kept: see `Deleted`.
        """

    async def delete_session(self, key: SessionKey) -> Elsewhere | bool:
        """Delete a session with all that is in it; answer False when there is none.

        Nothing is done where another node runs turns of it. What is kept of turns: see `reset_session`.
        """

    async def prune(self, before: float, *, ephemeral: bool = True) -> int:
        """Delete ephemeral sessions, or all others, last used before a time: so many that nobody waits for it.

        Answer how many are gone; 0 when there are no more.
        """

    def add_usage(self, rows: Sequence[UsageRow]) -> Pending[None]:
        """Add rows to what is stored of the same workspace, day, model and user."""

    async def list_usage(self, query: UsageQuery, *, after: UsagePlace | None, limit: int) -> UsagePage:
        """Return rows by workspace, newest day, model and user that come after a place; `limit` below 0: all."""

    async def forget_usage(self, before: str) -> None:
        """Delete the usage of days before one."""
