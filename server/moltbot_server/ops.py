"""A small HTTP port for operators: `/health` for people and load balancers, `/metrics` for Prometheus."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Callable, Mapping
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

log = logging.getLogger(__name__)


class OpsServer:
    """Serves two pages from a thread, so that they answer even when the event loop is busy."""

    def __init__(
        self, *, host: str, port: int, metrics: Callable[[], bytes], health: Callable[[], Mapping[str, Any]]
    ) -> None:
        """Listen on an address; port 0 takes any free one. `health` holds `status`: `ok`, or why not.

        Raises:
            OSError: the address cannot be bound.
        """
        kind = _Server6 if ":" in host else ThreadingHTTPServer
        try:
            self._server = kind((host.strip("[]"), port), _handler(metrics, health))
        except OSError as error:
            raise OSError(f"{host}:{port} cannot be bound; another program may listen there") from error
        self._server.daemon_threads = True
        # It looks this often whether it is to end.
        serve = partial(self._server.serve_forever, poll_interval=0.05)
        self._thread = threading.Thread(target=serve, name="moltbot-ops", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """The address to open, such as `127.0.0.1:9464`."""
        host, port = self._server.server_address[:2]
        return f"[{host!s}]:{port}" if ":" in str(host) else f"{host!s}:{port}"

    def close(self) -> None:
        """Close the port and end the thread."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server6(ThreadingHTTPServer):
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
