"""Where the core of a workspace is, and whether somebody is there; asked before anything of gRPC is tried."""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from collections.abc import Callable

from moltbot_server.cli.running import Running, is_held
from moltbot_server.cli.terminal import Exit, Failure, as_typed, command, shown
from moltbot_server.workspace import Workspace

_PATIENCE = 10.0  # as long as a turn waits for an engine that died; a killed core is there again within two, most often
_SILENT = 1.0  # after which somebody at a terminal wonders
_LOOK = 0.05
_GLANCE = 0.5  # seconds that a core may take to say how it is
_FRAME_TYPE, _SETTINGS = 3, 4
_PREFACE = (
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + bytes([_SETTINGS]) + bytes(5)
)  # with an empty SETTINGS frame
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")


def find_core(workspace: Workspace, given: str) -> str:
    """Return the address of a core that answers: as told, as the environment tells, or the one of the workspace.

    Without an address told, the key of a workspace goes to the core of that workspace alone, never to whoever else
    listens where it would.

    Raises:
        Failure: nobody is there, it is no core, or what was told is no address.
    """
    if told := given or os.environ.get("MOLTBOT_ADDRESS", ""):
        _look(told, workspace)
        return told
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


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def connects(address: str) -> bool:
    """Return whether somebody listens at `HOST:PORT`."""
    try:
        socket.create_connection(_split(address), timeout=5).close()
    except OSError:
        return False
    return True


def _look(told: str, workspace: Workspace) -> None:
    """Refuse an address that a person gave by mistake."""
    match = _ADDRESS.fullmatch(told)
    if match is None or not 0 < int(match[2]) < 65536:
        raise Failure(f"{told!r} is no HOST:PORT, such as 127.0.0.1:50051.", Exit.USAGE)
    try:
        with socket.create_connection(_split(told), timeout=5) as connection:
            connection.settimeout(0.5)
            connection.sendall(_PREFACE)
            try:
                said = connection.recv(8)
            except TimeoutError:  # a slow one: the channel will see
                said = b""
    except OSError:
        start = command("start", workspace)
        text = f"MoltBot is not running (nothing answers at {told}): start it with `{start}`."
        raise Failure(text, Exit.UNAVAILABLE) from None
    if len(said) > _FRAME_TYPE and said[_FRAME_TYPE] != _SETTINGS:  # HTTP/2 begins with this frame, nothing else does
        status = command("status", workspace)
        text = f"{told} does not speak gRPC: give the core's address, which `{status}` calls gRPC."
        raise Failure(text, Exit.UNAVAILABLE)
