"""The form of `vault.json`: what stands in it openly, and what is a ciphertext."""

from __future__ import annotations

from pathlib import Path

import msgspec

from moltbot_server.auth.vault_file import VaultError

VERSION = 1


class Sealed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A ciphertext with its tag, and the nonce that it was made with; base64 in the file."""

    nonce: bytes
    ciphertext: bytes


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key of a provider; `created` in Unix seconds."""

    id: str
    provider: str
    label: str
    created: int
    key: Sealed


class Document(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file: the data key, wrapped by the master key of the id `master`, and what it encrypts."""

    version: int
    master: str
    data_key: Sealed
    entries: tuple[Entry, ...]


class _Version(msgspec.Struct, frozen=True):
    version: int


def parse(content: bytes, path: Path) -> Document:
    """Return what a file holds; `path` is for messages.

    Raises:
        VaultError: it is of another version, or damaged.
    """
    try:
        version = msgspec.json.decode(content, type=_Version).version
        if version != VERSION:
            raise VaultError(
                f"{path} is of version {version} and this MoltBot reads version {VERSION}: use the release that "
                "wrote it."
            )
        return msgspec.json.decode(content, type=Document)
    except msgspec.MsgspecError:
        raise VaultError(f"{path} is damaged: put a copy back, or delete it and add the keys again.") from None


def written(document: Document) -> bytes:
    """Return the file of a document."""
    return msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n"
