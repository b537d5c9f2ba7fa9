"""A small HTTP port for operators: `/health` for people and load balancers, `/metrics` for Prometheus."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from moltbot_server.errors import AddressTaken

log = logging.getLogger(__name__)


class OpsServer:
    """Serves two pages from a thread, so that they answer even when the event loop is busy."""

    def __init__(
        self, *, host: str, port: int, metrics: Callable[[], bytes], health: Callable[[], Mapping[str, Any]]
    ) -> None:
        """Listen on an address; port 0 takes any free one. `health` holds `status`: `ok`, or why not.

        Raises:
            AddressTaken: another program listens there.
            OSError: the address cannot be bound.
        """
        try:
            self._server = (_Server6 if ":" in host else _Server)((host.strip("[]"), port), _handler(metrics, health))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise OSError(f"{host}:{port} cannot be bound: {error.strerror}") from error
            text = f"{host}:{port} (metrics) is in use by another program: choose another port with --metrics-port"
            raise AddressTaken(text) from error
        self._thread = threading.Thread(target=self._server.serve, name="moltbot-ops", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """The address to open, such as `127.0.0.1:9464`."""
        host, port = self._server.server_address[:2]
        return f"[{host!s}]:{port}" if ":" in str(host) else f"{host!s}:{port}"

    def close(self) -> None:
        """Close the port and end the thread."""
        self._server.closing = True
        host, port = self._server.server_address[:2]
        # The thread waits for a caller, however long; this one wakes it.
        with contextlib.suppress(OSError), socket.create_connection((str(host), port), timeout=1.0):
            self._thread.join(1.0)
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    closing = False

    def server_bind(self) -> None:
        """Bind without asking a name server what this machine is called, as `HTTPServer` does."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def serve(self) -> None:
        """Answer callers, each on a thread of its own, until the server is closing."""
        while not self.closing:
            self.handle_request()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return not self.closing

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say in the log, and not as `socketserver` does, that a caller got no answer; one that left is no error."""
        problem = sys.exception()
        if isinstance(problem, ConnectionError | TimeoutError):
            log.debug("an operator's request was given up", extra={"problem": str(problem)})
        else:
            log.error("an operator's request failed", exc_info=problem)


class _Server6(_Server):
    address_family = socket.AF_INET6


def _handler(metrics: Callable[[], bytes], health: Callable[[], Mapping[str, Any]]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10
        server_version = "moltbot"
        sys_version = ""

        def do_GET(self) -> None:  # the name that http.server calls
            path = self.path.partition("?")[0]
            if path == "/metrics":
                self._send(200, "text/plain; version=0.0.4; charset=utf-8", metrics())
            elif path == "/health":
                report = health()
                status = 200 if report.get("status") == "ok" else 503
                self._send(status, "application/json", json.dumps(report).encode() + b"\n")
            else:
                self._send(404, "text/plain; charset=utf-8", b"There is /health and /metrics here.\n")

        def _send(self, status: int, content_type: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            log.debug("an operator's request", extra={"request": format % args})

    return Handler
