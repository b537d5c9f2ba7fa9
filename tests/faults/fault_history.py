"""What happened in a run with faults, as its clients and its store tell it: JSON lines that a checker reads.

Entries are in the order in which one observer noted them, so their order is that of things. A *follower* is somebody
who looks at one turn and, after a break, goes on where it was; a *stream* is one call of it. Times are in seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec


class _Entry(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True, tag=str.lower):
    at: float = 0.0


class Opened(_Entry, frozen=True, kw_only=True):
    """A stream was opened: a turn was asked for, or with a `turn`, resumed after a sequence number.

    `deadline` is when the turn has to have ended. `answer` is what has to be answered, where that is known.
    `other`: the request_id was used with other content, which has to be refused.
    """

    follower: str
    stream: int
    request: str
    session: str
    question: str = ""
    turn: str = ""
    after: int = 0
    deadline: float = 0.0
    answer: str = ""
    other: bool = False


class Told(_Entry, frozen=True, kw_only=True):
    """A stream told an event; `kind` is a name of the contract. `text`: what was said, or the answer of the end.

    `code` is the reason of a failure, or why a completed answer ended.
    """

    stream: int
    sequence: int
    kind: str
    turn: str = ""
    text: str = ""
    code: str = ""
    retryable: bool = False


class Closed(_Entry, frozen=True, kw_only=True):
    """A stream ended: well, when `code` is empty, or with a status; `reason` is that of an error of ours."""

    stream: int
    code: str = ""
    reason: str = ""


class Left(_Entry, frozen=True, kw_only=True):
    """A follower went away by itself, and does not come back."""

    follower: str


class Cancelled(_Entry, frozen=True, kw_only=True):
    """A call that cancels a turn was answered that it had done so."""

    turn: str


class Fault(_Entry, frozen=True, kw_only=True):
    """Something was done to a node: `kill`, `stop`, `go_on`, `leave`, `power` …; or a node `serves` again."""

    what: str
    node: str


class Read(_Entry, frozen=True, kw_only=True):
    """A model began an answer: what it read before the question, and what it means to say."""

    generation: str
    question: str
    history: tuple[str, ...]
    answer: str


class KeptEvent(msgspec.Struct, frozen=True, kw_only=True, gc=False, array_like=True):
    """An event as the store has it. `code` is why a completed answer ended, where that is known."""

    sequence: int
    at: float
    kind: str
    text: str = ""
    code: str = ""


class Kept(_Entry, frozen=True, kw_only=True):
    """A turn as the store has it in the end. `gave_way`: another turn of its request_id stands in its place.

    `journal`: how many entries of what it told while it ran are there still.
    """

    turn: str
    request: str
    state: str
    events: tuple[KeptEvent, ...] = ()
    gave_way: bool = False
    journal: int = 0


class Listed(_Entry, frozen=True, kw_only=True):
    """The messages of a session in the end, oldest first: question, answer, question …"""

    session: str
    texts: tuple[str, ...]


class Counted(_Entry, frozen=True, kw_only=True):
    """How many ends of turns the cores have counted; of cores alone that have lived since the run began."""

    turns: int


Entry = Opened | Told | Closed | Left | Cancelled | Fault | Read | Kept | Listed | Counted

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Entry)


def write(path: Path, history: Iterable[Entry]) -> None:
    """Write a history, one entry on each line."""
    path.write_bytes(b"\n".join(map(_encoder.encode, history)) + b"\n")


def read(path: Path) -> list[Entry]:
    """Read a history."""
    return [_decoder.decode(line) for line in path.read_bytes().splitlines() if line]


def name_of(session: str, ordinal: int) -> str:
    """Return the resource name of a turn."""
    return f"sessions/{session}/turns/{ordinal}"


def ordinal_of(turn: str) -> int:
    """Return the number of a turn in its session."""
    return int(turn.rpartition("/")[2])
