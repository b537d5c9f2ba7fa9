"""The keys that open providers: where they come from, and how they stay out of every text."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import quote

_SHORTEST = 6
_LIKE_A_KEY = re.compile(
    r"(?i)\b(?:bearer\s+\S{4,}|(?:sk|pk|rk|ak|gsk|xai|key|api[-_]?key|token)[-_=][^\s'\"<>,;]{6,})"
)
HIDDEN = "[key]"
"""What stands where a key stood."""
_PIECE = 10
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
            for form in (secret, quote(secret, safe=""), secret.encode().hex(), b64encode(secret.encode()).decode()):
                text = text.replace(form, HIDDEN)
            text = _without_pieces(text, secret)
    return _LIKE_A_KEY.sub(HIDDEN, text)


def _without_pieces(text: str, secret: str) -> str:
    """Return a text without any longer piece of a secret, as whoever cuts or quotes it leaves one behind."""
    size = min(_PIECE, len(secret))
    starts = {secret[at : at + size] for at in range(len(secret) - size + 1)}
    found = [at for at in range(len(text) - size + 1) if text[at : at + size] in starts]
    for at in reversed(found):
        text = text[:at] + _HIDDEN_LETTER * size + text[at + size :]
    return _HIDDEN_RUN.sub(HIDDEN, text)
