"""The port for operators: what it says to those who leave before they have their answer."""

from __future__ import annotations

import logging
import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
from moltbot_server.ops import OpsServer

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER of zero seconds: closing sends RST


@contextmanager
def serving(health: Any) -> Iterator[tuple[OpsServer, list[threading.Thread]]]:
    """Serve, and keep the threads that answer, so that a test can wait for them."""
    threads: list[threading.Thread] = []

    def told() -> Mapping[str, Any]:
        threads.append(threading.current_thread())
        found: Mapping[str, Any] = health()
        return found

    server = OpsServer(host="127.0.0.1", port=0, metrics=lambda: b"", health=told)
    try:
        yield server, threads
    finally:
        server.close()


def ask(server: OpsServer) -> socket.socket:
    """Ask for `/health` and read nothing."""
    host, _, port = server.address.rpartition(":")
    asked = socket.create_connection((host, int(port)), timeout=10)
    asked.sendall(b"GET /health HTTP/1.0\r\n\r\n")
    return asked


def test_who_resets_the_connection_before_the_answer_is_no_error(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG, "moltbot_server.ops")
    under_way, gone = threading.Event(), threading.Event()

    def health() -> Mapping[str, Any]:
        under_way.set()
        assert gone.wait(10)
        return {"status": "ok"}

    with serving(health) as (server, threads):
        asked = ask(server)
        assert under_way.wait(10)
        asked.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        asked.close()
        gone.set()
        threads[0].join(10)
    assert [record.levelname for record in caplog.records if "given up" in record.message] == ["DEBUG"]
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]
    assert "Traceback" not in capfd.readouterr().err


def test_a_fault_of_ours_is_told_in_the_log_once(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    def health() -> Mapping[str, Any]:
        raise ValueError("odd")

    with serving(health) as (server, threads), ask(server) as asked:
        assert asked.recv(100) == b""
        threads[0].join(10)
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("ERROR", "an operator's request failed")
    ]
    assert "Traceback" not in capfd.readouterr().err
