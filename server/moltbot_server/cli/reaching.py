"""Where the core of a workspace is, and whether somebody is there; asked before anything of gRPC is tried."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from moltbot_server.cli.looking import Trust, connects, look
from moltbot_server.cli.running import Running, is_held
from moltbot_server.cli.terminal import Exit, Failure, as_typed, command, shown
from moltbot_server.workspace import Workspace

_PATIENCE = 10.0  # as long as a turn waits for an engine that died; a killed core is there again within two, most often
_SILENT = 1.0  # after which somebody at a terminal wonders
_LOOK = 0.05
_GLANCE = 0.5  # seconds that a core may take to say how it is


def key_for(workspace: Workspace) -> str:
    """Return the key that the environment tells, or else that of the workspace.

    Raises:
        WorkspaceError: the workspace has none.
        Failure: what the environment tells cannot be one.
    """
    told = os.environ.get("MOLTBOT_KEY", "").strip()
    if not (told.isascii() and told.isprintable()):
        text = "what MOLTBOT_KEY holds is no key: unset that, or set it to the line in the workspace's `key` file."
        raise Failure(text, Exit.NOT_ALLOWED)
    return told or workspace.read_key()


def find_core(workspace: Workspace, given: str, trust: Trust | None = None) -> str:
    """Return the address of a core that answers: as told, as the environment tells, or the one of the workspace.

    Without an address told, the key of a workspace goes to the core of that workspace alone, never to whoever else
    listens where it would.

    Raises:
        Failure: nobody is there, it is no core, or what was told is no address.
    """
    if told := given or os.environ.get("MOLTBOT_ADDRESS", ""):
        look(told, workspace, trust)
        return told
    if trust is not None:
        text = "--tls is for a core elsewhere: name it with --address; ours on this machine is reached without."
        raise Failure(text, Exit.USAGE)
    began, told_so = time.monotonic(), False
    while True:
        running = Running.read(workspace)
        place = shown(workspace.folder)
        if running is not None and running.stopping:
            start = command("start", workspace)
            text = f"MoltBot in {place} is stopping and takes nothing new; answers under way may end first. "
            raise Failure(f"{text}When it has left, start it again with `{start}`.", Exit.UNAVAILABLE)
        if running is not None and connects(running.grpc):
            return running.grpc
        if not is_held(workspace):
            start = command("start", workspace)
            raise Failure(f"MoltBot is not running in {place}: start it with `{start}`.", Exit.UNAVAILABLE)
        waited = time.monotonic() - began
        text = (
            f"MoltBot in {place} is being {'started' if running is None else 'started again'} and does not answer yet"
        )
        if waited >= _PATIENCE:
            raise Failure(f"{text}: the output of `moltbot start` says why; try again in a moment.", Exit.UNAVAILABLE)
        if waited >= _SILENT and not told_so:
            told_so = True
            print(f"moltbot: {text}; waiting for it …", file=sys.stderr, flush=True)
        time.sleep(_LOOK)  # another process's doing, of which nothing tells us


def store_away(workspace: Workspace, address: str) -> str:
    """Return what a core cannot do, such as `reach its store (Redis at 127.0.0.1:6379)`; empty when it is not known.

    Only the cores of the workspace itself are asked.
    """
    from moltbot_server.cli import status  # late: it takes a while, and is needed where something is wrong

    running = Running.read(workspace)
    if running is None or running.grpc != address:
        return ""
    return status.store_away(status.ask_cores(running, timeout=_GLANCE))


def words_of(workspace: Workspace, address: str) -> Callable[[str], str]:
    """Return what puts a core's words as they are typed for the workspace; they stay if the core is another's."""

    def words(text: str) -> str:
        running = Running.read(workspace)
        return as_typed(text, workspace) if running is not None and running.grpc == address else text

    return words
