"""How the system spreads connections over processes that share a port."""

from __future__ import annotations

import contextlib
import socket
import statistics
from collections.abc import Sequence

import psutil

CONNECTIONS = (1, 2, 4, 8, 64)
_TRIALS = 40


def balance(port: int, pids: Sequence[int], *, trials: int = _TRIALS) -> dict[str, dict[str, float]]:
    """Open connections to a port of this machine, again and again, and see which process has how many.

    Return for each number of connections the share that the busiest process has: on average, and at worst.
    """
    found = {}
    for count in CONNECTIONS:
        shares = [max(_held(port, pids, count)) / count for _ in range(trials)]
        found[str(count)] = {"mean": round(statistics.mean(shares), 3), "worst": round(max(shares), 3)}
    return found


def _held(port: int, pids: Sequence[int], count: int) -> list[int]:
    """Return how many of some new connections each process has."""
    with contextlib.ExitStack() as stack:
        mine: set[int] = set()
        for _ in range(count):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            connection.settimeout(5.0)
            connection.recv(1)  # a gRPC server speaks first: it has taken the connection
            mine.add(connection.getsockname()[1])
        return [
            sum(1 for held in psutil.Process(pid).net_connections("tcp") if held.raddr and held.raddr.port in mine)
            for pid in pids
        ]
