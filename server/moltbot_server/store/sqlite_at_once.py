"""Turns and ends written by a single statement, a transaction by itself, where nothing about them is unusual.

SQLite gives up the interpreter's lock for each statement that it runs, and the writer, with the database in its hands,
waits then for its own event loop to let go of it: that is most of the time of a transaction of several statements. So
the rows of a group go into a view, whose triggers do for each what there is to do. Whatever they are not made for
undoes them all.
"""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Container, Sequence
from itertools import chain
from typing import Any

from moltbot_server.store.protocol import GUESSED, EndedTurn, JournalEntry, NewTurn
from moltbot_server.store.sealed import seal
from moltbot_server.store.sqlite_rows import end_columns, names_of, rest_columns
from moltbot_server.turns import TurnKey

Row = NewTurn | EndedTurn | tuple[JournalEntry, ...]
"""What is written together: turns, how they ended, and what happened in them."""

_END = ["workspace", "session", "ordinal", "state", "end_time", "model", "answer", "events", "finish", "epoch", "node"]
_TURN = [*_END, "request_id", "digest", "create_time", "question", "rest", "deadline"]
_ROW = [*_TURN, "is_guess", "is_remembered", "title", "user", "channel", "ephemeral", "version"]
_NO_ROW = (None,) * len(_ROW)
_NO_TURN = (None,) * (len(_ROW) - len(_END))
_NO_SESSION = (None,) * 5

_SET_UP = f"""
PRAGMA temp_store = MEMORY;
CREATE TEMP VIEW IF NOT EXISTS written AS SELECT {", ".join(f"NULL AS {name}" for name in _ROW)};
CREATE TEMP TRIGGER IF NOT EXISTS accepted INSTEAD OF INSERT ON written
WHEN NEW.request_id IS NOT NULL BEGIN
    SELECT RAISE(ABORT, 'not this node''s, or not there any more') WHERE coalesce(
        (SELECT NEW.is_guess OR node <> NEW.node FROM sessions WHERE workspace = NEW.workspace AND id = NEW.session),
        NEW.is_remembered
    );
    INSERT INTO turns ({", ".join(_TURN)}) VALUES ({", ".join(f"NEW.{name}" for name in _TURN)});
    INSERT INTO sessions
        (workspace, id, title, user, channel, create_time, update_time, base_ordinal, ephemeral, node, version)
    SELECT NEW.workspace, NEW.session, NEW.title, NEW.user, NEW.channel, NEW.create_time, NEW.create_time, 0,
        NEW.ephemeral, NEW.node, NEW.version
    WHERE NEW.title IS NOT NULL
    ON CONFLICT (workspace, id) DO UPDATE SET title = excluded.title WHERE sessions.title = '';
END;
CREATE TEMP TRIGGER IF NOT EXISTS ended INSTEAD OF INSERT ON written
WHEN NEW.request_id IS NULL AND NEW.workspace IS NOT NULL BEGIN
    UPDATE turns SET state = NEW.state, end_time = NEW.end_time, model = NEW.model, answer = NEW.answer,
        events = NEW.events, finish = NEW.finish, rest = NULL
    WHERE workspace = NEW.workspace AND session = NEW.session AND ordinal = NEW.ordinal
        AND epoch = NEW.epoch AND node = NEW.node;
    SELECT RAISE(ABORT, 'not this node''s, or not there any more') WHERE changes() = 0;
END;
"""

_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""How many rows a statement is made for; rows of nothing fill it up."""


def _statement(count: int) -> str:
    row = f"({', '.join('?' * len(_ROW))})"
    return f"INSERT INTO written VALUES {', '.join([row] * count)}"


_STATEMENTS = {count: _statement(count) for count in _COUNTS}


def set_up(connection: sqlite3.Connection) -> None:
    """Prepare a connection for `write_at_once`; nobody else sees what is made for it.

    Raises:
        sqlite3.Error: the database has not the tables of a store.
    """
    # What another connection has made since this one was opened is found by a statement, and not by a trigger.
    connection.execute("SELECT 1 FROM turns, sessions LIMIT 0")
    connection.executescript(_SET_UP)


def write_at_once(
    connection: sqlite3.Connection,
    node: str,
    rows: Sequence[Row],
    journaled: Container[TurnKey],
) -> bool:
    """Write turns and ends if a single statement can; answer whether they are written, and on the disk.

    It cannot where something is to be delivered, or to be deleted of what is `journaled`, where a request_id or a
    number is another turn's, or a session or a turn another node's.

    Raises:
        sqlite3.Error: the database cannot be written; nothing was.
    """
    turns, ended = [], {}
    for row in rows:
        if isinstance(row, NewTurn):
            turns.append(row)
        elif isinstance(row, EndedTurn) and row.delivery is None and row.key not in journaled:
            ended[row.key] = row
        else:
            return False
    # A turn that ended before it was stored is one row.
    ends = {turn.key: ended.pop(turn.key) for turn in turns if turn.key in ended}
    values = [_turn(turn, ends, node) for turn in turns]
    values += [(*names_of(end.key), *end_columns(end), end.epoch, node, *_NO_TURN) for end in ended.values()]
    count = next(count for count in _COUNTS if count >= len(values))
    values += [_NO_ROW] * (count - len(values))
    try:
        connection.execute(_STATEMENTS[count], list(chain.from_iterable(values)))
    except sqlite3.IntegrityError:
        return False
    return True


def _turn(turn: NewTurn, ends: dict[TurnKey, EndedTurn], node: str) -> tuple[Any, ...]:
    opened = (turn.title, turn.user, turn.channel, int(turn.ephemeral), secrets.randbits(61) + 1)
    return (
        *names_of(turn.key),
        *end_columns(ends.get(turn.key)),
        1,
        node,
        turn.request_id,
        turn.digest,
        turn.create_time,
        seal(turn.question),
        *rest_columns(turn, ends),
        turn.version == GUESSED,
        turn.version not in (0, GUESSED),
        *(opened if turn.opens_session else _NO_SESSION),
    )
