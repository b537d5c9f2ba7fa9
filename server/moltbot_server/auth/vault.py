"""The vault: the keys of providers, encrypted in a file of the workspace.

`vault.json` holds a data key, wrapped by the master key (`vault_master`), and the keys of providers, each encrypted
with the data key for its id, provider, label and time, so that none can be changed or put in the place of another.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from moltbot_server.auth.vault_document import VERSION, Document, Entry, Sealed, parse, written
from moltbot_server.auth.vault_file import VaultError, alone, read_private, write_private
from moltbot_server.auth.vault_master import Master, MasterKey
from moltbot_server.workspace import Workspace, parse_key

__all__ = ["StoredKey", "UnknownKey", "Vault", "VaultError", "check_text"]

_MOST = 1000
_SHOWN = 4
_NAMED = 20
_HIDDEN_WHOLE = 16  # of a shorter key four characters would be too much
_TEXT = re.compile(r"[\x21-\x7e]{8,4096}")
_Stamp = tuple[int, int, int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredKey:
    """A key of a provider as the vault has it; `created` in Unix seconds. `text` is the secret whole."""

    id: str
    provider: str
    label: str = ""
    created: int
    text: str = field(repr=False)

    @property
    def tail(self) -> str:
        """The last four characters, by which its owner knows it; nothing of a short key."""
        return tail(self.text)


class UnknownKey(VaultError):
    """The vault has no key of an id. The text has those that there are, and not what was given, which may be a key."""

    def __init__(self, known: Sequence[StoredKey]) -> None:
        ids = [f"{one.id} ({one.provider})" for one in known[:_NAMED]]
        more = [f"{len(known) - _NAMED} more"] if len(known) > _NAMED else []
        there = f"it has {', '.join([*ids, *more])}" if known else "it is empty"
        super().__init__(f"the vault has no key of this id: {there}; `moltbot key list` has all.")


def tail(text: str) -> str:
    """Return what may be shown of a secret."""
    return text[-_SHOWN:] if len(text) >= _HIDDEN_WHOLE else ""


def check_text(text: str) -> None:
    """Refuse what cannot be a provider's key.

    Raises:
        VaultError: it has blanks or other signs than keys have, is too short or long, or is a key of MoltBot itself.
    """
    if parse_key(text) is not None:
        raise VaultError("this is a key of MoltBot itself, which opens this core; give the one of the provider.")
    if not _TEXT.fullmatch(text):
        raise VaultError("this is no key: expected 8 to 4096 characters of ASCII without blanks, on one line.")


class Vault:
    """The keys of a workspace's providers. What was read stays at hand, decrypted, until `reload`.

    Reading is for one thread at a time; processes may change the file at the same time, one after the other.
    """

    def __init__(self, workspace: Workspace, environ: Mapping[str, str]) -> None:
        """`environ` may say where the master key is. Nothing is read yet.

        Raises:
            VaultError: it names two places for the master key.
        """
        self._file = workspace.vault_file
        self._lock = workspace.folder / "vault.lock"
        self._master = Master(workspace, environ)
        self._stamp: _Stamp | None = None
        self._keys: tuple[StoredKey, ...] = ()

    def __repr__(self) -> str:
        return f"Vault({str(self._file)!r}, {len(self._keys)} keys)"

    @property
    def master_place(self) -> str:
        """Where the master key is, for messages."""
        return self._master.place

    @property
    def master_told(self) -> bool:
        """Whether the master key comes from a variable, which a running core keeps until its next start."""
        return self._master.told

    @property
    def keys(self) -> Sequence[StoredKey]:
        """All keys, in the order in which they were added, as they were at the last `reload`."""
        return self._keys

    def reload(self) -> bool:
        """Read the file again if it has changed; return whether it had.

        Raises:
            VaultError: it cannot be opened. The keys at hand stay as they were.
        """
        stamp = _stamp(self._file)
        if stamp == self._stamp:
            return False
        if stamp is None:
            self._keys, self._stamp = (), None
            return True
        with alone(self._lock):  # no rotation is half done
            stamp = _stamp(self._file)
            document = self._read()
            self._keys = self._open(document) if document else ()
            self._stamp = stamp
        return True

    def add(self, provider: str, text: str, *, label: str = "") -> StoredKey:
        """Encrypt a key and keep it; return it as it was kept.

        Raises:
            VaultError: it is no key, the provider has it already, or the vault cannot be opened or written.
        """
        check_text(text)
        with alone(self._lock):
            document = self._read()
            master, known = self._unlocked(document) if document else (self._master.make(), ())
            for one in known:
                if one.provider == provider and one.text == text:
                    raise VaultError(f"{provider} has this key already, as {one.id}.")
            if len(known) >= _MOST:
                raise VaultError(f"the vault holds {_MOST} keys and takes no more; remove some.")
            new = StoredKey(id=_fresh_id(known), provider=provider, label=label, created=int(time.time()), text=text)
            self._write(master, (*known, new))
        return new

    def remove(self, name: str) -> StoredKey:
        """Forget a key by its id and return it.

        Raises:
            UnknownKey: there is none of this id.
            VaultError: the vault cannot be opened or written.
        """
        known: Sequence[StoredKey] = ()
        with alone(self._lock):
            if (document := self._read()) is not None:
                master, known = self._unlocked(document)
                for gone in known:
                    if gone.id == name:
                        self._write(master, tuple(one for one in known if one is not gone))
                        return gone
        raise UnknownKey(known)

    def rotate_master(self) -> str:
        """Encrypt everything under a new master key; return the new key's id.

        It may be broken off anywhere: what opens the vault is kept until the vault is encrypted with the new one.

        Raises:
            VaultError: there is no vault, it cannot be opened, or something cannot be written.
        """
        with alone(self._lock):
            document = self._read()
            if document is None:
                raise VaultError("there is no vault yet; `moltbot key add PROVIDER` makes one.")
            _, known = self._unlocked(document)
            master = self._master.prepare()
            self._write(master, known)
            self._master.take(master.id)
        return master.id

    def _read(self) -> Document | None:
        content = read_private(self._file)
        return None if content is None else parse(content, self._file)

    def _unlocked(self, document: Document) -> tuple[MasterKey, tuple[StoredKey, ...]]:
        """Return the master key and the keys, to write them again."""
        self._master.take(document.master)  # a rotation may have been broken off before its last step
        return self._master.find(document.master), self._open(document)

    def _open(self, document: Document) -> tuple[StoredKey, ...]:
        # Late: native code of several MB, which a core without keys does not need.
        from moltbot_server.auth.vault_cipher import Tampered, place_of, place_of_data_key, unseal

        master = self._master.find(document.master)
        found: dict[str, StoredKey] = {}
        what = "its data key"
        try:
            data_key = unseal(master.secret, document.data_key, place_of_data_key(document))
            for entry in document.entries:
                what = f"the key {entry.id!r}"
                text = unseal(data_key, entry.key, place_of(entry)).decode("ascii")
                found[entry.id] = StoredKey(
                    id=entry.id, provider=entry.provider, label=entry.label, created=entry.created, text=text
                )
        except (Tampered, UnicodeDecodeError):
            raise VaultError(
                f"{self._file} was changed by another hand: {what} does not open. Put a copy back, or delete the file "
                "and add the keys again."
            ) from None
        return tuple(found.values())

    def _write(self, master: MasterKey, keys: tuple[StoredKey, ...]) -> None:
        """Write the vault whole, encrypted with a data key of its own."""
        from moltbot_server.auth.vault_cipher import fresh_key, place_of, place_of_data_key, seal  # late, as above

        data_key, nothing = fresh_key(), Sealed(nonce=b"", ciphertext=b"")
        entries = []
        for key in keys:
            entry = Entry(id=key.id, provider=key.provider, label=key.label, created=key.created, key=nothing)
            sealed = seal(data_key, key.text.encode("ascii"), place_of(entry))
            entries.append(msgspec.structs.replace(entry, key=sealed))
        document = Document(version=VERSION, master=master.id, data_key=nothing, entries=tuple(entries))
        wrapped = seal(master.secret, data_key, place_of_data_key(document))
        write_private(self._file, written(msgspec.structs.replace(document, data_key=wrapped)))
        self._keys, self._stamp = keys, _stamp(self._file)


def _fresh_id(known: Sequence[StoredKey]) -> str:
    taken = {one.id for one in known}
    while (name := secrets.token_hex(4)) in taken:
        pass
    return name


def _stamp(file: Path) -> _Stamp | None:
    """Return what changes when a file is replaced, or opened to others; None when there is none."""
    try:
        found = file.lstat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size, found.st_mode, found.st_uid
