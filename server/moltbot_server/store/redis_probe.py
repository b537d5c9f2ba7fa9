"""Looks whether a Redis that refused a write takes writes again: nobody may have anything to write then."""

from __future__ import annotations

import asyncio

from moltbot_server.errors import MoltBotError
from moltbot_server.store.redis_line import Call, Command, RedisLine
from moltbot_server.store.redis_presence import Presence

_EVERY = 1.0
"""Seconds from one look at a Redis that takes no writes to the next."""
_PROBE = bytes(65536)


def probe(prefix: str) -> Command:
    """Return a write that Redis refuses like any other, and that leaves nothing behind.

    It is as large as a turn may well be, for small ones may pass where others find no memory. It would overwrite a key
    that there never is, so Redis changes nothing, and has nothing to save.
    """
    return ("SET", f"{prefix}:probe", _PROBE, "XX")


class WriteProbe:
    """The write that leaves nothing behind, tried until Redis takes it."""

    def __init__(self, line: RedisLine, presence: Presence, prefix: str) -> None:
        """Look by a line whenever the presence finds that Redis takes no writes; `prefix` is of the store's keys."""
        self._line = line
        self._presence = presence
        self._command = probe(prefix)
        self._timer: asyncio.TimerHandle | None = None
        self._ended = False
        presence.when_refusing(self._look_later)

    def end(self) -> None:
        """Look no more."""
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look_later(self) -> None:
        if not self._ended:
            self._timer = asyncio.get_running_loop().call_later(_EVERY, self._look)

    def _look(self) -> None:
        self._timer = None
        self._line.put(Call(self._command, read=lambda _: None)).then(self._hear)

    def _hear(self, outcome: MoltBotError | None) -> None:
        if outcome is None:
            self._presence.took()
        else:
            self._look_later()
