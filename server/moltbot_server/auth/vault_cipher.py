"""AES-256-GCM: the master key wraps a random data key, which encrypts each key of a provider for its own place.

What must not change places goes with each ciphertext as associated data. A data key is made for one writing of the
file, so that 96 random bits are plenty for a nonce (NIST SP 800-38D).
"""

from __future__ import annotations

import secrets

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from moltbot_server.auth.vault_document import Document, Entry, Sealed

_NONCE = 12


class Tampered(Exception):
    """A ciphertext was changed, moved, or encrypted with another key."""


def fresh_key() -> bytes:
    """Return 256 random bits."""
    return secrets.token_bytes(32)


def place_of(entry: Entry) -> tuple[str | int, ...]:
    """Return what a provider's key is bound to."""
    return "key", entry.id, entry.provider, entry.label, entry.created


def place_of_data_key(document: Document) -> tuple[str | int, ...]:
    """Return what the data key is bound to."""
    return "data key", document.version, document.master


def seal(key: bytes, secret: bytes, place: tuple[str | int, ...]) -> Sealed:
    """Encrypt a secret for a place."""
    nonce = secrets.token_bytes(_NONCE)
    return Sealed(nonce=nonce, ciphertext=AESGCM(key).encrypt(nonce, secret, _associated(place)))


def unseal(key: bytes, sealed: Sealed, place: tuple[str | int, ...]) -> bytes:
    """Decrypt what was encrypted for this place.

    Raises:
        Tampered: it was changed, is for another place, or the key is another one.
    """
    try:
        return AESGCM(key).decrypt(sealed.nonce, sealed.ciphertext, _associated(place))
    except (InvalidTag, ValueError):  # ValueError: a nonce of a length that we never write
        raise Tampered from None


def _associated(place: tuple[str | int, ...]) -> bytes:
    return msgspec.json.encode(("moltbot vault", *place))
