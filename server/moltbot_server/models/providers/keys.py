"""The keys that open providers: where they come from, and how they stay out of every text."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

_SHORTEST = 6
_LIKE_A_KEY = re.compile(
    r"(?i)\b(?:bearer\s+\S{4,}|(?:sk|pk|rk|ak|gsk|xai|key|api[-_]?key|token)[-_=][^\s'\"<>,;]{6,})"
)
HIDDEN = "[key]"
"""What stands where a key stood."""
_PIECE = 10
_BETWEEN = "[^A-Za-z0-9&%\\\\]{0,3}"
_HIDDEN_LETTER = "\x00"
_HIDDEN_RUN = re.compile("\x00+")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderKey:
    """A key of a provider: `id` tells it from others and may be shown, `text` opens the provider and never is."""

    id: str
    text: str = field(repr=False)


class KeyRing(Protocol):
    """Who has the keys. What it answers may change at any time: a key that was added is used by the next turn."""

    def keys(self, provider: str) -> Sequence[ProviderKey]:
        """Return the keys of a provider in the order in which they are to be tried; none is no mistake."""


class NoKeys:
    """A key ring without a key, for providers that need none."""

    def keys(self, provider: str) -> Sequence[ProviderKey]:
        """Return nothing."""
        return ()


def scrubbed(text: str, secrets: Iterable[str]) -> str:
    """Return a text without these secrets, and without anything that has the form of a key."""
    for secret in secrets:
        if len(secret) >= _SHORTEST:
            for form in _forms(secret):
                text = form.sub(HIDDEN, text)
            text = _without_pieces(text, secret)
    return _LIKE_A_KEY.sub(HIDDEN, text)


@lru_cache(maxsize=256)
def _forms(secret: str) -> Sequence[re.Pattern[str]]:
    """Return the forms in which a secret may come back: spaced, quoted, reversed, as bytes, as base64 with others."""
    if sum(map(str.isalnum, secret)) < _SHORTEST:
        return (re.compile(re.escape(secret)),)
    spelled = [_spelled(order) for order in (secret, secret[::-1])]
    octets = "[^0-9a-f]?".join(f"{octet:02x}" for octet in secret.encode())
    return (
        re.compile("|".join((*spelled, octets)), re.IGNORECASE),
        re.compile("|".join(_in_base64(secret.encode(), at) for at in range(3))),
    )


def _spelled(letters: str) -> str:
    """Return a pattern of letters with little between them; signs may be missing, or another one in their place."""
    pattern = ""
    begun = False
    for letter in letters:
        form = _quoted(letter)
        if letter.isalnum():
            pattern += f"{_BETWEEN}{form}" if begun else form
            begun = True
        else:
            pattern += f"(?:{_BETWEEN}{form})?" if begun else f"(?:{form})?"
    return pattern


def _quoted(letter: str) -> str:
    """Return a pattern of a letter as itself, in an address, in HTML and in a string of a program."""
    number = ord(letter)
    octets = "".join(f"%{octet:02x}" for octet in letter.encode())
    forms = (re.escape(letter), octets, f"&#0*{number};", f"&#x0*{number:x};", rf"\\u{number:04x}", rf"\\x{number:02x}")
    return f"(?:{'|'.join(forms)})"


def _in_base64(secret: bytes, at: int) -> str:
    """Return a pattern of a secret in base64 of a longer text, in which so many octets of three come before it."""
    whole = b64encode(bytes(at) + secret).decode()
    own = whole[-(-at * 8 // 6) : (at + len(secret)) * 8 // 6]
    return "".join({"+": "[+-]", "/": "[/_]"}.get(each, each) for each in own)


def _without_pieces(text: str, secret: str) -> str:
    """Return a text without any longer piece of a secret, as whoever cuts or quotes it leaves one behind."""
    size = min(_PIECE, len(secret))
    starts = {secret[at : at + size] for at in range(len(secret) - size + 1)}
    found = [at for at in range(len(text) - size + 1) if text[at : at + size] in starts]
    for at in reversed(found):
        text = text[:at] + _HIDDEN_LETTER * size + text[at + size :]
    return _HIDDEN_RUN.sub(HIDDEN, text)
