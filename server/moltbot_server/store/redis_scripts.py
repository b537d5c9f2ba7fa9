"""The scripts that change what is in Redis: each is one step that happens whole or not at all.

They stand beside this file as they are sent, each after `common.lua`. All keys of a workspace begin with the same
braces, so they lie on one node of a cluster; a script is given that beginning alone and makes the names itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from moltbot_server.store.redis_line import Argument, Command

_OUTBOX = (
    "outbox_lease",
    "outbox_renew",
    "outbox_confirm",
    "outbox_reject",
    "outbox_dead",
    "outbox_prune",
    "restore_delivery",
)
_FIRST: Mapping[str, Sequence[str]] = {
    "accept": ("accepting.lua",),
    "reaccept": ("outboxing.lua", "accepting.lua"),
    **dict.fromkeys(("finish", *_OUTBOX), ("outboxing.lua",)),
}
_NAMES = (
    "accept", "reaccept", "append", "finish", "take_over", "withdraw", "forget", "load", "messages", "add_usage",
    "export_turn", "restore_session", "restore_turn", "join", *_OUTBOX,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Script:
    """A script, and the name by which Redis knows it once it was loaded."""

    text: str
    digest: str

    def on(self, base: str, *arguments: Argument) -> Command:
        """Return the command that runs it on the keys that begin with `base`."""
        return ("EVALSHA", self.digest, "1", base, *arguments)


@cache
def scripts() -> dict[str, Script]:
    """Return all scripts by their names."""
    folder = resources.files("moltbot_server.store") / "lua"
    found = {}
    for name in _NAMES:
        parts = ("common.lua", *_FIRST.get(name, ()), f"{name}.lua")
        text = "".join((folder / part).read_text("utf-8") for part in parts)
        found[name] = Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())
    return found


def loading() -> tuple[Command, ...]:
    """Return the commands that make Redis know all scripts."""
    return tuple(("SCRIPT", "LOAD", script.text) for script in scripts().values())
