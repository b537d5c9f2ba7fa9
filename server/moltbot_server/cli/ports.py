"""The ports of `moltbot start`: all are looked at before anything starts, and all that are taken are told at once."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from moltbot_server.cli.terminal import Exit, Failure
from moltbot_server.config import defaults, same_port


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A port to listen on, 0 for any; `key` is its setting and `what` says what it is for."""

    key: str
    host: str
    port: int
    what: str


def port_problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with the port of the HTTP adapter, which cores know nothing of: a key, and what to change."""
    ports: Mapping[str, Any] = {**defaults(), **values}
    for other in ("grpc_port", "metrics_port"):
        if ports["port"] and ports["port"] == ports[other]:
            wrong, right = (other, "port") if other in values else ("port", other)
            yield wrong, same_port(wrong, right, ports["port"])


def take_ports(ports: Sequence[Wanted], again: Callable[[Mapping[str, object]], str]) -> dict[str, int]:
    """Return a free port for each key: the one wanted, or a free one for 0.

    `again` returns the command line of this start with other values for some keys.

    Raises:
        Failure: something else has a port, or a host is none of this machine's.
    """
    found: dict[str, int] = {}
    named = {wanted.port for wanted in ports} - {0}
    for wanted in ports:
        port = _take(wanted)
        while not wanted.port and port in {*named, *found.values()}:
            port = _take(wanted)  # nobody listens yet, so the system may give one port twice
        found[wanted.key] = port
    taken = [wanted for wanted in ports if not found[wanted.key]]
    if taken:
        told = [f"port {wanted.port} ({wanted.what}) is in use by {_holder(wanted.port)}" for wanted in taken]
        used = {*found.values(), *(wanted.port for wanted in ports)}
        others: dict[str, object] = {}
        for wanted in taken:
            others[wanted.key] = near = _near(wanted, used)
            used.add(near)
        more = f"{'; '.join(told)}. Choose {'others' if len(taken) > 1 else 'another one'}: {again(others)}"
        raise Failure(more, Exit.UNAVAILABLE)
    return found


@contextmanager
def kept_port(host: str, port: int) -> Iterator[None]:
    """Keep a port for processes of ours that share it: while none of them listens, no stranger can have it.

    Raises:
        Failure: somebody has taken it since it was looked at.
    """
    with _socket(host) as keeper:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # Connections of a core that has just left linger for a minute, and would keep the port from us.
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            keeper.bind((host, port))  # and never listens: nothing that comes is given to it
        except OSError as error:
            raise Failure(f"cannot keep port {port} for several processes: {error.strerror}.") from None
        yield


def spare_ports(ports: Sequence[Wanted]) -> dict[str, object]:
    """Return for each key a free port above the one wanted, for another MoltBot beside this one; 0 stays 0."""
    found: dict[str, object] = {}
    used = {wanted.port for wanted in ports}
    for wanted in ports:
        found[wanted.key] = near = _near(wanted, used) if wanted.port else 0
        used.add(near)
    return found


def near_port(wanted: Wanted, used: Collection[int]) -> int:
    """Return a free port above the one wanted that is none of those used, the nearest; 0 where there is none."""
    return _near(wanted, used)


def _take(wanted: Wanted) -> int:
    """Return the port, or 0 when somebody has it."""
    with _socket(wanted.host) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((wanted.host, wanted.port))
        except PermissionError:
            flag = "--" + wanted.key.replace("_", "-")
            text = f"port {wanted.port} ({wanted.what}) is reserved for root: choose one above 1023, {flag} 8000."
            raise Failure(text) from None
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                text = f"cannot listen on {wanted.host} for {wanted.what}: {error.strerror}."
                raise Failure(text, Exit.CONFIG) from None
            return 0
        return int(probe.getsockname()[1])


def _near(wanted: Wanted, used: Collection[int]) -> int:
    for other in range(wanted.port + 1, min(wanted.port + 100, 65536)):
        if other not in used:
            with _socket(wanted.host) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((wanted.host, other))
                except OSError:
                    continue
                return other
    return 0


def _socket(host: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)


def _holder(port: int) -> str:
    """Return who listens on a port, as far as the system tells us."""
    import psutil  # late: only this message needs it

    try:
        listening = [
            connection.pid
            for connection in psutil.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:2] == (port,) and connection.pid
        ]
        for pid in listening:
            words = psutil.Process(pid).cmdline()
            if {"moltbot_server", "moltbot_adapters"} & set(words):
                return f"another MoltBot (process {pid})"
            return f"{psutil.Process(pid).name()} (process {pid})"
    except psutil.Error:
        pass  # another user's process, or one that has just left
    return f"another program (to see which: lsof -i :{port})"
