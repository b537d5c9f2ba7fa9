"""Real nginx and real Envoy with the configurations that we ship, in front of two cores and two HTTP adapters."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
import shutil
import ssl
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from fault_http import Adapter
from fault_nodes import Node, Setup
from moltbot_server.testing import free_port
from redis_process import RedisProcess

ROOT = Path(__file__).parents[2]
WORDS = [f"word{number}" for number in range(40)]
TEXT = " ".join(WORDS)
TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
"""What nginx has temporary folders for."""
SILENCE = 31.0
"""Seconds for which the model says nothing."""
SCRIPT = f"""
rules:
  - {{match: '^Tell', template: '{TEXT}', pace: 0.03}}
  - {{match: '^Wait', template: 'at last', first_delay: {SILENCE}}}
  - {{match: '^Hi', template: 'hello'}}
"""


class Balancer:
    """A balancer that runs: its ports for gRPC with and without TLS, and for HTTPS."""

    def __init__(self, ports: tuple[int, int, int], folder: Path) -> None:
        secure, plain, web = ports
        self.secure, self.plain = f"127.0.0.1:{secure}", f"127.0.0.1:{plain}"
        self.web = f"https://127.0.0.1:{web}"
        self.certificate = folder / "tls" / "fullchain.pem"

    @property
    def context(self) -> ssl.SSLContext:
        """What trusts its certificate."""
        return ssl.create_default_context(cafile=str(self.certificate))


class Place:
    """Two cores on one Redis, two adapters that call both, and a balancer."""

    def __init__(self, setup: Setup, nodes: list[Node], adapters: list[Adapter], balancer: Balancer) -> None:
        self.setup, self.nodes, self.adapters, self.balancer = setup, nodes, adapters, balancer

    @property
    def key(self) -> str:
        """The key of the workspace."""
        return self.setup.key


def program(name: str) -> str:
    """Return the path of a program; skips the test where it is not."""
    path = os.pathsep.join([str(ROOT / ".tools" / "bin"), os.environ["PATH"], "/usr/sbin"])
    found = shutil.which(name, path=path)
    if found is None:
        pytest.skip(f"{name} is not installed: type  scripts/tools {name}")
    return found


@asynccontextmanager
async def balanced(name: str, folder: Path) -> AsyncIterator[Place]:
    """Run everything, with `nginx` or `envoy` in front; skips the test where that or Redis is not installed."""
    path = program(name)
    async with AsyncExitStack() as stack:
        redis = RedisProcess("", "--appendonly", "yes", "--appendfsync", "always", "--dir", str(folder))
        await redis.start()
        stack.push_async_callback(redis.kill)
        environ = {"MOLTBOT_STORE_TYPE": "redis", "MOLTBOT_STORE_PORT": str(redis.port), "MOLTBOT_CACHE_ANSWERS": "off"}
        setup = Setup(folder=folder / "home", grace=5.0, environ=environ)
        setup.prepare()
        (setup.folder / "script.yaml").write_text(SCRIPT)
        nodes = [Node(setup, f"core-{number}", lambda _: None) for number in (1, 2)]
        cores = ",".join(node.address for node in nodes)
        adapters = [
            Adapter(setup, f"http-{number}", lambda _: None, core=cores, proxy="127.0.0.1/32") for number in (1, 2)
        ]
        for each in (*nodes, *adapters):
            await each.start()
            stack.push_async_callback(each.end_all)
        await asyncio.gather(*(each.ready() for each in (*nodes, *adapters)))
        balancer = await stack.enter_async_context(_running(name, path, folder, nodes, adapters))
        yield Place(setup, nodes, adapters, balancer)


@asynccontextmanager
async def _running(
    name: str, path: str, folder: Path, nodes: list[Node], adapters: list[Adapter]
) -> AsyncIterator[Balancer]:
    ports = free_port(), free_port(), free_port()
    certify(folder / "tls")
    text = _CONFIGURATIONS[name](folder, ports)
    for each in (*nodes, *adapters):
        text = re.sub(_UPSTREAM[name].format(each.name), _OWN[name].format(each.port), text)
    configuration = folder / _FILES[name]
    configuration.write_text(text)
    log = (folder / "balancer.log").open("wb")
    process = await asyncio.create_subprocess_exec(
        *_command(name, path, configuration), stdin=DEVNULL, stdout=log, stderr=log, start_new_session=True
    )
    log.close()
    try:
        for port in ports:
            await _listens(port, process, lambda: (folder / "balancer.log").read_text()[-3000:])
        yield Balancer(ports, folder)
    finally:
        if process.returncode is None:
            process.terminate()
            await asyncio.wait_for(process.wait(), 20)


async def _listens(port: int, process: Process, told: Callable[[], str]) -> None:
    async with asyncio.timeout(30):
        while True:
            assert process.returncode is None, told()
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.05)  # it tells nobody
            else:
                writer.close()
                return


def _nginx(folder: Path, ports: tuple[int, int, int]) -> str:
    """Return the configuration that we ship, with ports and paths of the test's own."""
    text = (ROOT / "docker" / "nginx.conf").read_text()
    text = text.replace("/etc/nginx/tls", str(folder / "tls")).replace("/var/log/nginx", str(folder))
    for shipped, own in zip(("50443", "50080", "443"), ports, strict=True):
        text = re.sub(rf"listen {shipped}\b", f"listen 127.0.0.1:{own}", text)
    return text.replace("http {", "http {" + "".join(f"{kind}_temp_path {folder}/{kind};" for kind in TEMPORARY), 1)


def _envoy(folder: Path, ports: tuple[int, int, int]) -> str:
    text = (ROOT / "docker" / "envoy.yaml").read_text()
    text = text.replace("/etc/envoy/tls", str(folder / "tls")).replace("port_value: 9901", "port_value: 0")
    for shipped, own in zip(("50443", "50080", "443"), ports, strict=True):
        text = text.replace(f"address: 0.0.0.0, port_value: {shipped} ", f"address: 127.0.0.1, port_value: {own} ")
    return text


def _command(name: str, path: str, configuration: Path) -> list[str]:
    if name == "envoy":
        return [path, "-c", str(configuration), "--use-dynamic-base-id", "--log-level", "warning"]
    user = "user root; " if os.geteuid() == 0 else ""
    own = f"daemon off; {user}pid {configuration.parent}/nginx.pid;"
    return [path, "-e", "stderr", "-c", str(configuration), "-g", own]


_CONFIGURATIONS: dict[str, Callable[[Path, tuple[int, int, int]], str]] = {"nginx": _nginx, "envoy": _envoy}
_FILES = {"nginx": "nginx.conf", "envoy": "envoy.yaml"}
_UPSTREAM = {"nginx": r"server {}:\d+", "envoy": r"address: {}, port_value: \d+"}
_OWN = {"nginx": "server 127.0.0.1:{}", "envoy": "address: 127.0.0.1, port_value: {}"}


def certify(folder: Path) -> None:
    """Make a certificate for 127.0.0.1 that vouches for itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "balancer of a test")])
    now = datetime.now(UTC)
    own = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(own, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder.mkdir()
    (folder / "fullchain.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.PKCS8
    (folder / "privkey.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    )
