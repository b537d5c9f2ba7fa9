"""`moltbot chat` with a core elsewhere that speaks TLS, and what is said where one does not trust the other."""

import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cli_process import Home
from moltbot_server.testing import RunningServer, running_server

OPENSSL = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=core")


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that vouches for itself, and its key."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    named = ("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate))
    try:
        subprocess.run([*OPENSSL, *named], capture_output=True, check=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed, so no certificate can be made")
    return certificate, key


@pytest.fixture
async def core(tmp_path: Path, certificate: tuple[Path, Path]) -> AsyncIterator[RunningServer]:
    """A core that speaks TLS."""
    async with running_server(tmp_path / "core", tls_cert=certificate[0], tls_key=certificate[1]) as server:
        yield server


@pytest.fixture
def home(tmp_path: Path, core: RunningServer) -> Home:
    """A person with the key of that core, and nothing else of it."""
    folder = tmp_path / "home"
    folder.mkdir()
    return Home(folder, variables={"MOLTBOT_KEY": core.key})


async def test_a_core_elsewhere_is_spoken_to_where_its_certificate_is_believed(
    home: Home, core: RunningServer, certificate: tuple[Path, Path]
) -> None:
    ended = await home.run("chat", "--address", core.address, "--tls-ca", str(certificate[0]), "Hi")
    assert (ended.status, ended.out, ended.err) == (0, "You said: Hi\n", "")
    home.variables["MOLTBOT_ADDRESS"] = core.address
    ended = await home.run("chat", "--tls", "--tls-ca", str(certificate[0]), "--json", "Hi")
    assert ended.json["text"] == "You said: Hi"


async def test_who_is_not_believed_or_speaks_otherwise_is_told_with_the_next_step(
    home: Home, core: RunningServer, certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    for options, status, told in (
        (("--tls",), 69, "has a certificate that is not believed (self-signed certificate): name the one that signed"),
        ((), 69, f"{core.address} speaks TLS: add --tls, or --tls-ca FILE"),
        (("--tls-ca", str(certificate[1])), 2, f"{certificate[1]} has no certificates in PEM"),
        (("--tls-ca", "nowhere.pem"), 2, "nowhere.pem cannot be read (No such file or directory)"),
    ):
        ended = await home.run("chat", "--address", core.address, *options, "Hi")
        assert (ended.status, ended.out) == (status, "")
        assert told in ended.err
    assert "name it with --address" in (await home.run("chat", "--tls", "Hi")).err
    async with running_server(tmp_path / "plain") as plain:
        ended = await home.run("chat", "--address", plain.address, "--tls", "Hi")
        assert f"{plain.address} does not speak TLS: leave --tls out." in ended.err
        assert ended.status == 69
