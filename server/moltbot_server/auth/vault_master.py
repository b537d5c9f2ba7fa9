"""The master key of the vault: a file of the workspace, or, from elsewhere, a variable or the file that it names."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from moltbot_server.auth.vault_file import VaultError, read_private, settle, write_private
from moltbot_server.workspace import Workspace

KEY, KEY_FILE, NEW_KEY = "MOLTBOT_VAULT_KEY", "MOLTBOT_VAULT_KEY_FILE", "MOLTBOT_VAULT_KEY_NEW"
_BYTES = 32
_HOW = "32 random bytes as base64, such as `openssl rand -base64 32` prints"


@dataclass(frozen=True, slots=True, kw_only=True)
class MasterKey:
    """A master key: 256 bits. `id` tells it from others and may be shown."""

    secret: bytes = field(repr=False)

    @property
    def id(self) -> str:
        """16 hexadecimal digits, which tell nothing of the secret."""
        return hashlib.sha256(b"moltbot vault master key\0" + self.secret).hexdigest()[:16]

    @property
    def text(self) -> str:
        """The secret as it is written down."""
        return base64.b64encode(self.secret).decode("ascii")


def parse_master(text: str, where: str) -> MasterKey:
    """Return the key that a text is.

    Raises:
        VaultError: it is not 32 bytes in base64 or hexadecimal digits; `where` is told, the text is not.
    """
    text = text.strip()
    try:
        if re.fullmatch(r"[0-9A-Fa-f]{64}", text):
            secret = bytes.fromhex(text)
        else:
            secret = base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True)
    except (binascii.Error, ValueError):
        secret = b""
    if len(secret) != _BYTES:
        raise VaultError(f"{where} holds no master key: expected {_HOW}.")
    return MasterKey(secret=secret)


class Master:
    """Where the master key of a workspace is kept."""

    def __init__(self, workspace: Workspace, environ: Mapping[str, str]) -> None:
        """`environ` may name another place than the workspace.

        Raises:
            VaultError: it names two.
        """
        self._told = environ.get(KEY, "").strip()
        self._new = environ.get(NEW_KEY, "").strip()
        elsewhere = environ.get(KEY_FILE, "").strip()
        if self._told and elsewhere:
            raise VaultError(f"{KEY} and {KEY_FILE} are both set; keep one.")
        self._elsewhere = bool(elsewhere)
        # A mounted secret is most often a link, which must stay what it is.
        self._file = Path(elsewhere).expanduser().resolve() if elsewhere else workspace.vault_key_file
        self._next = self._file.with_name(f"{self._file.name}.next")

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return f"the variable {KEY}" if self._told else str(self._file)

    @property
    def told(self) -> bool:
        """Whether it comes from a variable, which a process keeps as long as it lives."""
        return bool(self._told)

    def find(self, wanted: str) -> MasterKey:
        """Return the key with an id.

        Raises:
            VaultError: there is no key, or it is another one.
        """
        found = list(self._found())
        for key in found:
            if key.id == wanted:
                return key
        if found:
            raise VaultError(
                f"{self.place} holds another master key than the one that this vault was encrypted with ({wanted}): "
                "put the right one back. Without it the keys are lost: delete vault.json and add them again."
            )
        raise VaultError(
            f"the vault's master key is missing: there is no {self._file}. Put it back, or name where it is with "
            f"{KEY_FILE}. Without it the keys are lost: delete vault.json and add them again."
        )

    def make(self) -> MasterKey:
        """Return the key for a vault that begins, and make it where the workspace is to hold it.

        Raises:
            VaultError: it cannot be made, or a key from elsewhere is not there.
        """
        for key in self._found():
            return key
        if self._elsewhere:
            raise VaultError(f"{KEY_FILE} names {self._file}, and there is no such file; it needs {_HOW}.")
        key = MasterKey(secret=secrets.token_bytes(_BYTES))
        write_private(self._file, f"{key.text}\n".encode())
        return key

    def prepare(self) -> MasterKey:
        """Return the key that comes next, and keep it beside the one that holds now.

        Raises:
            VaultError: it cannot be kept, or is to be told by a variable and is not.
        """
        if self._told:
            if not self._new:
                raise VaultError(f"{KEY} is set: tell the new key with {NEW_KEY}, {_HOW}, and run the command again.")
            return parse_master(self._new, NEW_KEY)
        key = MasterKey(secret=secrets.token_bytes(_BYTES))
        write_private(self._next, f"{key.text}\n".encode())
        return key

    def take(self, used: str) -> None:
        """Let the prepared key take its place once it is the one that the vault is encrypted with.

        Raises:
            VaultError: the file cannot be renamed; the vault can still be opened.
        """
        if self._told:
            return
        text = read_private(self._next)
        if text is None or parse_master(text.decode("ascii", "replace"), str(self._next)).id != used:
            return
        try:
            self._next.replace(self._file)
            settle(self._file.parent)
        except OSError as error:
            raise VaultError(f"{self._next} cannot take the place of {self._file}: {error.strerror}.") from None

    def _found(self) -> Iterator[MasterKey]:
        """Yield what there is: the key, and the one that was to take its place when a rotation was broken off."""
        if self._told:
            yield parse_master(self._told, f"the variable {KEY}")
            return
        for path in (self._file, self._next):
            text = read_private(path)
            if text is not None:
                yield parse_master(text.decode("ascii", "replace"), str(path))
