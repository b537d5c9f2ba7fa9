"""What runs in a workspace: one `moltbot start` at a time, told to other commands by a file that a lock vouches for."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import count
from typing import Any, Self

import psutil

from moltbot_server.cli.terminal import Exit, Failure, command, shown
from moltbot_server.workspace import Workspace

_LATE = 5.0
"""Seconds that processes may take to leave after their grace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A MoltBot that serves: addresses, process ids by name, and when it started (Unix seconds).

    `cores`: where each of several cores tells how it does, by the name of its process; `metrics` is the first of them.

    `adapters`: the Unix socket on which each process that serves HTTP says that it does not stand still, by its name.

    `stopping`: somebody has asked it to leave, and answers under way may still end. `engine_metrics`: where the engine
    that it runs tells how it does; empty where the models run elsewhere. `notices` are what is odd with its settings.
    `route`: the models that answer where `model` is a route.
    """

    pid: int
    started: float
    version: str
    http: str
    grpc: str
    metrics: str
    model: str
    processes: Mapping[str, int]
    cores: Mapping[str, str] = field(default_factory=dict)
    adapters: Mapping[str, str] = field(default_factory=dict)
    stopping: bool = False
    engine_metrics: str = ""
    notices: tuple[str, ...] = ()
    route: tuple[str, ...] = ()

    @classmethod
    def read(cls, workspace: Workspace) -> Self | None:
        """Return what runs in a workspace, or None when nothing does or it has not become ready."""
        try:
            with (workspace.run / "lock").open("rb") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    return None  # nobody holds it: a file that is still there was left by a crash
                except BlockingIOError:
                    found: Any = json.loads((workspace.run / "start.json").read_text("utf-8"))
                    return cls(**found)
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def write(self, workspace: Workspace) -> None:
        """Tell other commands, in one step: a reader finds the old text or the new one."""
        draft = workspace.run / ".start.json"
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            json.dump(asdict(self), file)
        draft.replace(workspace.run / "start.json")


def is_held(workspace: Workspace) -> bool:
    """Return whether a `moltbot start` holds the workspace, ready or not."""
    try:
        with (workspace.run / "lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True


@contextmanager
def only_one(workspace: Workspace, beside: Callable[[Workspace], str], *, grace: float) -> Iterator[None]:
    """Hold the workspace: a second `moltbot start` in it is refused. The kernel lets go when this process ends.

    `beside` returns the command line that starts another MoltBot in another workspace, for the message. What a killed
    one has left behind has `grace` seconds to end what is under way, and is waited for.
    """
    descriptor = os.open(workspace.run / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not _locked(descriptor):
            raise Failure(_runs_already(workspace, beside(_free_folder(workspace))), Exit.UNAVAILABLE)
        _wait_for(_left_behind(workspace), grace)
        (workspace.run / "start.json").unlink(missing_ok=True)
        yield
        (workspace.run / "start.json").unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _left_behind(workspace: Workspace) -> list[psutil.Process]:
    """Return the processes of a `moltbot start` that was killed: they leave when they have ended their answers."""
    try:
        told: Any = json.loads((workspace.run / "start.json").read_text("utf-8"))
        numbers = [int(number) for number in told["processes"].values()]
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        return []
    found = []
    for number in numbers:
        with suppress(psutil.Error):
            process = psutil.Process(number)
            if any(str(workspace.folder) in word for word in process.cmdline()):  # its number may be another's by now
                found.append(process)
    return found


def _wait_for(left: list[psutil.Process], grace: float) -> None:
    if left:
        numbers = ", ".join(str(process.pid) for process in left)
        print(
            f"The MoltBot that ran here was killed. Waiting for its processes ({numbers}), which end the answers under "
            f"way within {grace:g} s.",
            flush=True,
        )
        psutil.wait_procs(left, timeout=grace + _LATE)


def _runs_already(workspace: Workspace, beside: str) -> str:
    running = Running.read(workspace)
    kill = f" or with `kill {running.pid}`" if running else ""
    return (
        f"MoltBot runs in {shown(workspace.folder)} already: see `{command('status', workspace)}`. "
        f"Stop it with Ctrl-C where it runs{kill}, or start another one beside it: {beside}"
    )


def _free_folder(workspace: Workspace) -> Workspace:
    """Return a workspace beside this one that does not exist yet."""
    folder = workspace.folder
    names = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
    return Workspace(folder=next(name for name in names if not name.exists()))


def _locked(descriptor: int) -> bool:
    for pause in (0.02, 0.05, 0.1, None):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # `moltbot status` may hold it for the moment in which it looks whether somebody does.
            if pause is not None:
                time.sleep(pause)
        else:
            return True
    return False


def reachable(host: str) -> str:
    """Return the host that a client on this machine connects to for a listening address."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)


def joined(host: str, port: int) -> str:
    """Return `host:port`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
