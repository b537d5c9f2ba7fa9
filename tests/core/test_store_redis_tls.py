"""The shared store over TLS: encrypted, and only with whom the certificate proves to be right."""

from __future__ import annotations

import ipaddress
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from kept_turns import keep, new, texts
from moltbot_server.errors import StorageUnavailable
from moltbot_server.store.redis import RedisStore
from moltbot_server.testing import free_port
from redis_process import RedisProcess


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """The files of a certificate for 127.0.0.1 that vouches for itself, and of its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "redis of a test")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    files = tmp_path / "tls.crt", tmp_path / "tls.key"
    files[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.PKCS8
    files[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    return files


@pytest.fixture
async def port(certificate: tuple[Path, Path], tmp_path: Path) -> AsyncIterator[int]:
    """The port of a Redis that speaks TLS."""
    port = free_port()
    files = ("--tls-cert-file", str(certificate[0]), "--tls-key-file", str(certificate[1]))
    process = RedisProcess("", "--tls-port", str(port), *files, "--tls-auth-clients", "no", "--dir", str(tmp_path))
    try:
        await process.start()
    except TimeoutError:
        pytest.skip("this redis-server was built without TLS")
    yield port
    await process.kill()


async def test_what_passes_to_redis_is_encrypted_and_its_certificate_is_checked(
    port: int, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moltbot_server.store.redis._START", 0.2)
    with pytest.raises(StorageUnavailable, match="certificate verify failed"):
        await RedisStore(host="127.0.0.1", port=port, tls=True).open()
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    store = RedisStore(host="127.0.0.1", port=port, tls=True)
    await store.open()
    await keep(store, new())
    assert await texts(store) == ["question", "answer"]
    await store.close()
    with pytest.raises(StorageUnavailable):
        await RedisStore(host="127.0.0.1", port=port).open()
