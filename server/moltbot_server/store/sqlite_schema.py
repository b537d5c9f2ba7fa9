"""The tables of the embedded store, and the way to them from those of earlier releases."""

from __future__ import annotations

from moltbot_server.store.sqlite_journal import JOURNAL_SCHEMA
from moltbot_server.store.sqlite_outbox import OUTBOX_SCHEMA
from moltbot_server.store.sqlite_sessions import SESSIONS_SCHEMA
from moltbot_server.store.sqlite_usage import USAGE_SCHEMA

SCHEMA_VERSION = 7
"""The version of the schema that this release writes."""

SCHEMA = f"""
CREATE TABLE sessions (
    workspace TEXT NOT NULL, id TEXT NOT NULL, title TEXT NOT NULL, user TEXT NOT NULL, channel TEXT NOT NULL,
    create_time REAL NOT NULL, update_time REAL NOT NULL, base_ordinal INTEGER NOT NULL, ephemeral INTEGER NOT NULL,
    PRIMARY KEY (workspace, id)
) WITHOUT ROWID;
CREATE INDEX sessions_by_use ON sessions (workspace, ephemeral, update_time DESC, id);
CREATE TABLE turns (
    workspace TEXT NOT NULL, session TEXT NOT NULL, ordinal INTEGER NOT NULL, request_id TEXT NOT NULL,
    digest BLOB NOT NULL, state TEXT NOT NULL, create_time REAL NOT NULL, end_time REAL NOT NULL DEFAULT 0,
    model TEXT NOT NULL DEFAULT '', question BLOB NOT NULL, answer BLOB, events BLOB, finish TEXT NOT NULL DEFAULT ''
);
CREATE UNIQUE INDEX turns_by_session ON turns (workspace, session, ordinal);
CREATE UNIQUE INDEX turns_by_request ON turns (workspace, request_id);
CREATE INDEX turns_running ON turns (state) WHERE state = 'running';
{USAGE_SCHEMA}{JOURNAL_SCHEMA}{OUTBOX_SCHEMA}{SESSIONS_SCHEMA}"""
"""Makes a new database."""


def unknown_schema(version: int) -> str:
    """Return what is said of a version below all that there were."""
    return f"its schema is {version}, which no release has written: it is damaged, or not MoltBot's"


STEPS = {
    1: "ALTER TABLE turns ADD COLUMN finish TEXT NOT NULL DEFAULT ''; "
    "UPDATE turns SET finish = 'cancelled' WHERE state = 'cancelled';",
    2: USAGE_SCHEMA,
    3: JOURNAL_SCHEMA,
    4: OUTBOX_SCHEMA,
    5: SESSIONS_SCHEMA,
    6: "",  # what is kept has a checksum from here on, which earlier releases cannot read
}
"""From each version of the schema to the next. Of answers that were kept before, only a cancelled one can be told."""
