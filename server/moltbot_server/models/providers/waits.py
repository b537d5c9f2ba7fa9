"""How long a provider asks to be left alone, out of the headers of its refusal."""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Mapping

from moltbot_server.models.providers.cooldowns import LONGEST_REST

_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_KINDS = ("requests", "tokens")


def asked_wait(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Return the seconds that a refusal asks to wait, or None where it does not say.

    `Retry-After` is a number or a date (RFC 9110, 10.2.3), `retry-after-ms` is more exact where it is there, and
    `x-ratelimit-reset-*` tells of the limits that are used up. `now` is in Unix seconds.
    """
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name, "").strip()
        if value:
            seconds = _number(value)
            if seconds is not None:
                return min(seconds * unit, LONGEST_REST)
            if unit == 1.0 and (at := _date(value)) is not None:
                return min(max(0.0, at - (time.time() if now is None else now)), LONGEST_REST)
    resets = {kind: _span(headers.get(f"x-ratelimit-reset-{kind}", "")) for kind in _KINDS}
    used_up = [resets[kind] for kind in _KINDS if headers.get(f"x-ratelimit-remaining-{kind}", "").strip() == "0"]
    known = [seconds for seconds in used_up or resets.values() if seconds is not None]
    if not known:
        return None
    return min(max(known) if used_up else min(known), LONGEST_REST)


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\d{1,12}(\.\d{1,9})?", text) else None


def _date(text: str) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None


def _span(text: str) -> float | None:
    """Return the seconds of a span such as `1m30.5s`, `200ms` or `12`."""
    text = text.strip()
    if not text or len(text) > 64:
        return None
    if (seconds := _number(text)) is not None:
        return seconds
    if not re.fullmatch(f"({_PART.pattern})+", text):
        return None
    return sum(float(amount) * _UNITS[unit] for amount, unit in _PART.findall(text))
