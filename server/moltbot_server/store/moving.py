"""What a store holds as lines of JSON, to be kept, looked at, or put into another store.

The first line says what the file is, the last one how much is in it: a file that was cut off has none. Between them is
a line for each session, turn, `request_id` of a deleted turn, delivery and row of usage. Sessions come before their
turns.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Annotated, BinaryIO, Protocol

import msgspec

from moltbot_server.store.protocol import UsageRow
from moltbot_server.turns import Completed, Event, Failed, Part, TurnInput, TurnState, Value

FORMAT = 3
NOWHERE = "imported"
"""The node of turns that ran in another store: it is never there, so whoever looks takes them over."""
_TOGETHER = 200
_LONGEST_END = 4096

Ordinal = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
"""The number of a turn in its session, from 1 on; 0 before the first. Redis keeps it as a double."""


class Header(Value, frozen=True, kw_only=True, tag="moltbot-store"):
    """The first line: the version of the format, and when the file was begun (Unix seconds)."""

    version: int
    created: float


class SessionRecord(Value, frozen=True, kw_only=True, tag="session"):
    """A session. `base_ordinal` is the number of the last turn that a reset has taken away."""

    workspace: str
    session: str
    title: str
    user: str
    channel: str
    create_time: float
    update_time: float
    base_ordinal: Ordinal
    ephemeral: bool


class TurnRecord(Value, frozen=True, kw_only=True, tag="turn"):
    """A turn. Without a question, another turn has taken its place; `kept` is of one that runs."""

    workspace: str
    session: str
    ordinal: Ordinal
    request_id: str
    digest: bytes
    state: TurnState
    create_time: float
    end_time: float
    model: str
    finish: str
    question: tuple[Part, ...]
    answer: tuple[Part, ...] | None
    events: tuple[Event, ...]
    rest: TurnInput | None
    deadline: float
    epoch: int
    kept: tuple[Event, ...]


class DeletedRecord(Value, frozen=True, kw_only=True, tag="deleted"):
    """The `request_id` of a turn that was deleted with its session, and until when it is known (Unix seconds)."""

    workspace: str
    request_id: str
    until: float


class DeliveryRecord(Value, frozen=True, kw_only=True, tag="delivery"):
    """An answer on its way, or one that was delivered, of which nothing is said any more, or given up.

    `state` is open, delivered or dead; `spared` are the attempts before it was last retried; `note` is why it was given
    up, or the platform's id.
    """

    workspace: str
    id: str
    channel: str
    address: str
    session: str
    ordinal: Ordinal
    request_id: str
    ending: Completed | Failed | None
    create_time: float
    state: str
    attempt: int
    spared: int
    over_time: float
    note: str


class UsageRecord(Value, frozen=True, kw_only=True, tag="usage"):
    """What was used of a model by a user in a day."""

    row: UsageRow


class End(Value, frozen=True, kw_only=True, tag="end"):
    """The last line: how many records there are."""

    records: int


Record = SessionRecord | TurnRecord | DeletedRecord | DeliveryRecord | UsageRecord
Line = Header | Record | End


class NotMovable(Exception):
    """A file cannot be read as what a store held; the text says why."""


class Records(Protocol):
    """What a store holds, record by record. A store that is in use may change meanwhile."""

    async def count(self) -> int:
        """Return about how many records there are."""

    def read(self) -> AsyncIterator[Record]:
        """Yield all records, sessions before their turns."""

    async def put(self, records: Sequence[Record]) -> int:
        """Store records that are not there yet; return how many that were. Nothing that is there is changed."""


_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Line] = msgspec.json.Decoder(Header | Record | End)


async def export(records: Records, file: BinaryIO, progress: Callable[[int], None]) -> int:
    """Write all records to a file and return how many; `progress` hears of each hundred.

    Raises:
        StorageUnavailable: the store cannot be read.
        OSError: the file cannot be written.
    """
    written = 0
    _write(file, Header(version=FORMAT, created=time.time()))
    async for record in records.read():
        _write(file, record)
        written += 1
        if not written % 100:
            progress(written)
    _write(file, End(records=written))
    return written


async def take_in(records: Records, path: Path, progress: Callable[[int], None]) -> tuple[int, int]:
    """Store what a file holds; return how many records were read, and how many of them were new.

    `progress` hears how many bytes were read. What breaks off can be begun again: what is there is not stored twice.

    Raises:
        NotMovable: the file is no such file, or is not whole.
        StorageUnavailable: the store cannot be written.
        OSError: the file cannot be read.
    """
    read = new = 0
    end = check_file(path)
    waiting: list[Record] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            record = _decoded(line, number)
            progress(len(line))
            if isinstance(record, Header | End):
                continue
            waiting.append(record)
            read += 1
            if len(waiting) == _TOGETHER:
                new += await records.put(waiting)
                waiting = []
    new += await records.put(waiting)
    if read != end.records:
        raise NotMovable(f"it should have {end.records} records and has {read}; all of them are stored")
    return read, new


def check_file(path: Path) -> End:
    """Return the end of a file that is whole.

    Raises:
        NotMovable: it is no such file, was cut off, or was written by a newer release.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        first = file.readline(_LONGEST_END)
        file.seek(max(0, path.stat().st_size - _LONGEST_END))
        last = file.read().rstrip(b"\n").rpartition(b"\n")[2]
    try:
        header = _decoder.decode(first)
    except msgspec.MsgspecError:
        header = None
    if not isinstance(header, Header):
        raise NotMovable("it was not written by `moltbot store export`")
    if header.version > FORMAT:
        raise NotMovable(f"a newer release has written it (format {header.version}, this one reads {FORMAT})")
    try:
        end = _decoder.decode(last)
    except msgspec.MsgspecError:
        end = None
    if not isinstance(end, End):
        raise NotMovable("its end is missing: it was cut off, or is still being written")
    return end


def _write(file: BinaryIO, record: Line) -> None:
    file.write(_encoder.encode(record) + b"\n")


def _decoded(line: bytes, number: int) -> Line:
    try:
        return _decoder.decode(line)
    except msgspec.MsgspecError as problem:
        raise NotMovable(f"line {number} cannot be read: {problem}") from None
