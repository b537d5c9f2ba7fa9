"""Who is signed in: the workspace key, one-time links and the signed cookie. Nothing here is kept in memory."""

import base64
import binascii
import hashlib
import hmac
import os
import secrets
import time
from pathlib import Path

COOKIE = "moltbot_session"
COOKIE_LIFE_S = 30 * 24 * 3600
OWNER = "owner"
_LONGEST = 1024


class KeyFile:
    """The file with the workspace key; read again when it is replaced."""

    def __init__(self, path: Path) -> None:
        """Reads the key. Raises `OSError` when there is no such file and `ValueError` when it holds no key."""
        self._path = path
        self._stamp = (0, 0, 0)
        self._key = ""
        self.key()

    def key(self) -> str:
        """Returns the key."""
        status = self._path.stat()
        stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
        if stamp != self._stamp:
            with self._path.open("rb") as file:
                key = file.read(_LONGEST).decode("ascii", "replace").strip()
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ValueError(f"{self._path} holds no key")
            self._key, self._stamp = key, stamp
        return self._key

    def readable_by_others(self) -> bool:
        """Tells whether the file's mode lets other users read it."""
        return bool(self._path.stat().st_mode & 0o077)

    def matches(self, candidate: str) -> bool:
        """Compares in a time that tells nothing of the key."""
        return hmac.compare_digest(
            hashlib.sha256(candidate.encode("utf-8", "replace")).digest(), hashlib.sha256(self.key().encode()).digest()
        )


class SignIn:
    """Gives and checks sign-in cookies, and redeems one-time links of a state folder."""

    def __init__(self, state: Path, key_file: KeyFile) -> None:
        """Makes the folder and the cookie key where they are missing."""
        self._links = state / "links"
        self._links.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._secret = _cookie_key(state / "cookie.key")
        self._key_file = key_file

    def cookie(self, user: str = OWNER) -> str:
        """Returns a fresh cookie value for a user."""
        body = f"v1.{_encode(user.encode())}.{int(time.time()) + COOKIE_LIFE_S}"
        return f"{body}.{self._mac(body)}"

    def user(self, cookie: str | None) -> str | None:
        """Returns the user of a cookie, or None when it is missing, forged, cut or too old."""
        if not cookie or len(cookie) > _LONGEST or not cookie.isascii():
            return None
        body, _, mac = cookie.rpartition(".")
        if not hmac.compare_digest(mac, self._mac(body)):
            return None
        _, user, expiry = body.split(".")  # signed by us, so it has this form
        return _decode(user).decode() if int(expiry) > time.time() else None

    def redeem(self, code: str) -> bool:
        """Uses up a one-time link; True the first time, in one process of all that share the folder."""
        link = self._links / hashlib.sha256(code.encode("utf-8", "surrogatepass")).hexdigest()
        try:
            with link.open("rb") as file:
                written = file.read(32)
            link.unlink()  # of several who try, one succeeds
        except OSError:
            return False
        try:
            return float(written) > time.time()
        except ValueError:
            return False

    def _mac(self, body: str) -> str:
        # The workspace key is part of it: a new key signs every browser out.
        key = hmac.digest(self._secret, self._key_file.key().encode(), "sha256")
        return _encode(hmac.digest(key, body.encode(), "sha256"))


def _cookie_key(path: Path) -> bytes:
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    if not path.exists():
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)  # unlike a rename, it never replaces the key that another worker made
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    key = path.read_bytes()
    if len(key) != 32:
        raise ValueError(f"{path} is not a cookie key of 32 bytes; delete it and every browser signs in anew")
    return key


def _encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def _decode(text: str) -> bytes:
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except binascii.Error as error:
        raise ValueError(text) from error
