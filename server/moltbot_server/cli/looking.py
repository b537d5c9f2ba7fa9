"""Who listens at an address: a core, one that speaks TLS, something else, or nobody; told before gRPC is tried."""

from __future__ import annotations

import re
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from moltbot_server.cli.terminal import Exit, Failure, command
from moltbot_server.workspace import Workspace

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")
_WITHIN = 5.0
_MOMENT = 0.5  # for who answers at once, or else may be anything
_FRAME_TYPE, _SETTINGS = 3, 4
_PREFACE = (
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + bytes([_SETTINGS]) + bytes(5)
)  # with an empty SETTINGS frame


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """Whose certificates are believed: those that these in PEM have signed, or the usual authorities' without any."""

    pem: str = ""

    @classmethod
    def of(cls, given: bool, path: str) -> Trust | None:
        """Return whom `--tls` and `--tls-ca FILE` name; None where nothing is to be encrypted.

        Raises:
            Failure: there are no certificates in the file.
        """
        if not path:
            return cls() if given else None
        try:
            found = cls(pem=Path(path).read_text("ascii"))
            found.context()
        except (ssl.SSLError, ValueError):
            raise Failure(f"{path} has no certificates in PEM.", Exit.USAGE) from None
        except OSError as problem:
            raise Failure(f"{path} cannot be read ({problem.strerror}).", Exit.USAGE) from None
        return found

    def context(self) -> ssl.SSLContext:
        """Return what a connection is made with that believes them."""
        context = ssl.create_default_context(cadata=self.pem or None)
        context.set_alpn_protocols(["h2"])
        return context


def connects(address: str) -> bool:
    """Return whether somebody listens at `HOST:PORT`."""
    try:
        _connected(address).close()
    except OSError:
        return False
    return True


def look(told: str, workspace: Workspace, trust: Trust | None) -> None:
    """Refuse an address that a person gave by mistake; `trust` is whom they believe, None where they speak no TLS.

    Raises:
        Failure: it is no address, nobody is there, or somebody who speaks otherwise or is not believed.
    """
    match = _ADDRESS.fullmatch(told)
    if match is None or not 0 < int(match[2]) < 65536:
        raise Failure(f"{told!r} is no HOST:PORT, such as 127.0.0.1:50051.", Exit.USAGE)
    try:
        said = _said(told, trust)
    except ssl.SSLCertVerificationError as problem:
        text = f"{told} has a certificate that is not believed ({problem.verify_message})"
        raise Failure(f"{text}: name the one that signed it with --tls-ca FILE.", Exit.UNAVAILABLE) from None
    except ssl.SSLError:
        raise Failure(f"{told} does not speak TLS: leave --tls out.", Exit.UNAVAILABLE) from None
    except OSError:
        start = command("start", workspace)
        text = f"MoltBot is not running (nothing answers at {told}): start it with `{start}`."
        raise Failure(text, Exit.UNAVAILABLE) from None
    if said is None or said[_FRAME_TYPE : _FRAME_TYPE + 1] == bytes([_SETTINGS]):
        return  # a core: HTTP/2 begins with this frame, nothing else does; or a slow one, which the channel will see
    if trust is None and _speaks_tls(told):
        text = f"{told} speaks TLS: add --tls, or --tls-ca FILE with the certificate that signed its own."
        raise Failure(text, Exit.UNAVAILABLE)
    if said:
        status = command("status", workspace)
        text = f"{told} does not speak gRPC: give the core's address, which `{status}` calls gRPC."
        raise Failure(text, Exit.UNAVAILABLE)


def _said(address: str, trust: Trust | None) -> bytes | None:
    """Return how somebody answers the beginning of HTTP/2: nothing by hanging up, None where that takes long.

    Raises:
        OSError: nobody is there, or TLS cannot be spoken.
    """
    with _connected(address) as connection:
        try:
            with _encrypted(connection, trust, address) if trust else connection as line:
                line.settimeout(_MOMENT)
                line.sendall(_PREFACE)
                return line.recv(8)
        except TimeoutError:
            return None
        except ConnectionError:
            return b""


def _encrypted(connection: socket.socket, trust: Trust, address: str) -> ssl.SSLSocket:
    return trust.context().wrap_socket(connection, server_hostname=_host(address))


def _speaks_tls(address: str) -> bool:
    """Return whether somebody speaks TLS, whoever it is; nothing is told to them."""
    anybody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anybody.check_hostname, anybody.verify_mode = False, ssl.CERT_NONE
    anybody.set_alpn_protocols(["h2"])
    try:
        with _connected(address) as connection, anybody.wrap_socket(connection, server_hostname=_host(address)):
            return True
    except OSError:
        return False


def _connected(address: str) -> socket.socket:
    return socket.create_connection((_host(address), int(address.rpartition(":")[2])), timeout=_WITHIN)


def _host(address: str) -> str:
    return address.rpartition(":")[0].strip("[]")
