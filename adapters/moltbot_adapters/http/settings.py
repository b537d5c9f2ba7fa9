"""What the HTTP adapter is started with, checked at birth."""

import argparse
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moltbot_adapters.logs import LEVELS

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class UnsafeSettings(ValueError):
    """The settings would open the adapter to people who must not reach it; the text says what to do instead."""


def is_loopback(host: str) -> bool:
    """Tells whether a host name or address can only be reached from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of one adapter process. Times are in seconds."""

    host: str
    port: int
    core: str
    key_file: Path
    state: Path
    pulse: Path | None = None
    log_level: str = "info"
    log_json: bool = False
    reuse_port: bool = False
    trusted_proxies: tuple[Network, ...] = ()
    public_metrics: bool = False
    max_body_bytes: int = 2 * 1024 * 1024
    body_limit_s: float = 30.0
    turn_limit_s: float = 600.0
    drain_s: float = 10.0
    ping_s: float = 15.0
    stalled_s: float = 60.0
    hold_s: float = 3.0

    def __post_init__(self) -> None:
        """Refuses to exist when the port would be open to others without TLS in front. Raises `UnsafeSettings`."""
        if not is_loopback(self.host) and not self.trusted_proxies:
            raise UnsafeSettings(
                f"refusing to listen on {self.host}: the adapter speaks no TLS, so keys would travel in the clear. "
                "Listen on 127.0.0.1, or put a TLS proxy in front and name its address with --trusted-proxy CIDR"
            )

    @property
    def loopback_only(self) -> bool:
        """True when only programs on this machine can reach the port and no proxy forwards to it."""
        return is_loopback(self.host) and not self.trusted_proxies


def parse(arguments: Sequence[str]) -> Settings:
    """Reads the command line. Leaves with status 2 on a bad argument; raises `UnsafeSettings`."""
    parser = argparse.ArgumentParser(prog="python -m moltbot_adapters http", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one")
    parser.add_argument("--core", default="127.0.0.1:50051", help="the core's gRPC address")
    parser.add_argument("--key-file", type=Path, required=True, help="file with the workspace key")
    parser.add_argument("--state", type=Path, required=True, help="folder for sign-in links and the cookie key")
    parser.add_argument(
        "--pulse", type=Path, help="Unix socket on which this process says that it does not stand still"
    )
    parser.add_argument("--log-level", choices=sorted(LEVELS), default="info")
    parser.add_argument("--log-json", action="store_true", help="write logs as JSON lines")
    parser.add_argument("--reuse-port", action="store_true", help="let several workers share the port")
    parser.add_argument(
        "--trusted-proxy",
        type=_network,
        nargs="+",
        action="extend",
        default=[],
        metavar="CIDR",
        help="proxies whose X-Forwarded-* headers are believed",
    )
    parser.add_argument(
        "--drain-grace",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="how long answers under way may take to end when it leaves (default: %(default)g)",
    )
    parser.add_argument("--public-metrics", action="store_true", help="answer /metrics to callers on other machines")
    given = parser.parse_args(arguments)
    return Settings(
        host=given.host,
        port=given.port,
        core=given.core,
        key_file=given.key_file,
        state=given.state,
        pulse=given.pulse,
        log_level=given.log_level,
        log_json=given.log_json,
        reuse_port=given.reuse_port,
        trusted_proxies=tuple(given.trusted_proxy),
        public_metrics=given.public_metrics,
        drain_s=given.drain_grace,
    )


def _network(text: str) -> Network:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an address or a network such as 10.0.0.0/8") from None
