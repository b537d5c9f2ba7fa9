"""Where sessions and turns are kept: one protocol, a file for each store."""

from moltbot_server.store.pending import Pending
from moltbot_server.store.protocol import (
    SEQUENCE_AFTER_CRASH,
    Elsewhere,
    EndedTurn,
    Moved,
    NewTurn,
    Store,
    StoredSession,
    StoredTurn,
    Taken,
    UsagePage,
    UsagePlace,
    UsageQuery,
    UsageRow,
)

__all__ = [
    "SEQUENCE_AFTER_CRASH",
    "Elsewhere",
    "EndedTurn",
    "Moved",
    "NewTurn",
    "Pending",
    "Store",
    "StoredSession",
    "StoredTurn",
    "Taken",
    "UsagePage",
    "UsagePlace",
    "UsageQuery",
    "UsageRow",
]
