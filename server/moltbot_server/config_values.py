"""How written values become typed ones: numbers, durations, sizes, percentages, addresses, paths."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moltbot_server.config_sources import Given, Problem

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE = re.compile(r"(\d+)\s*(B|KB|KiB|MB|MiB|GB|GiB)?", re.IGNORECASE)
_BYTES = {"b": 1, "kb": 10**3, "kib": 1 << 10, "mb": 10**6, "mib": 1 << 20, "gb": 10**9, "gib": 1 << 30}
_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of value: `read` turns what was written into it or raises ValueError; `expected` says what is right.

    What was found of a `secret` one is not told. One that is not `flat` is written in YAML alone.
    """

    read: Callable[[Given], Any]
    expected: str
    secret: bool = False
    flat: bool = True


class Unfit(ValueError):
    """A value has the right form and may not be, for a reason that the text tells after the key's name."""


class Misread(ValueError):
    """A value with parts is wrong, and `problems` tells each of its mistakes at its own place."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


def _text_of(given: Given) -> str:
    if not isinstance(given.value, str):
        raise ValueError
    return given.value.strip()


def whole(lowest: int, highest: int, meaning: str = "a whole number") -> Kind:
    """A whole number within limits, both included."""

    def read(given: Given) -> int:
        text = _text_of(given)
        if not re.fullmatch(r"-?[0-9]{1,15}", text) or not lowest <= int(text) <= highest:
            raise ValueError
        return int(text)

    return Kind(read=read, expected=f"{meaning} from {lowest} to {highest}")


def duration(lowest: float, highest: float, *, bare: bool = True, never: bool = False) -> Kind:
    """A duration in seconds: `3000ms`, `2s`, `5m`, `1h`; a bare number is seconds where `bare` allows it.

    With `never`, it may be 0 as well, below the lowest.
    """

    def read(given: Given) -> float:
        match = _DURATION.fullmatch(_text_of(given))
        if match is None or not (match[2] or bare):
            raise ValueError
        seconds = float(match[1]) * _SECONDS[match[2] or "s"]
        if not lowest <= seconds <= highest and not (never and seconds == 0):
            raise ValueError
        return seconds

    example = "a duration such as 20ms, 3s or 5m" if bare else "a duration with its unit, such as 3000ms or 3s"
    rest = ", or 0 for never" if never else ""
    return Kind(read=read, expected=f"{example}, from {lowest:g} to {highest:g} seconds{rest}")


def size(lowest: int, highest: int) -> Kind:
    """A number of bytes: `4MiB`, `512KiB`, `4194304`."""

    def read(given: Given) -> int:
        match = _SIZE.fullmatch(_text_of(given))
        if match is None:
            raise ValueError
        count = int(match[1]) * _BYTES[(match[2] or "B").lower()]
        if not lowest <= count <= highest:
            raise ValueError
        return count

    return Kind(read=read, expected=f"a size such as 4MiB, from {lowest} to {highest} bytes")


def _share(given: Given) -> float:
    match = re.fullmatch(r"(\d{1,3}(?:\.\d+)?)\s*%", _text_of(given))
    if match is None or float(match[1]) > 100:
        raise ValueError
    return float(match[1]) / 100


def _percent(given: Given) -> float:
    share = _share(given)
    if not share:
        raise ValueError
    return share


def amount(highest: float) -> Kind:
    """A number that may have decimals, from 0."""

    def read(given: Given) -> float:
        found = _text_of(given)
        if not re.fullmatch(r"\d{1,15}(?:\.\d{1,15})?", found) or float(found) > highest:
            raise ValueError
        return float(found)

    return Kind(read=read, expected=f"a number such as 2.5, from 0 to {highest:g}")


def _truth(given: Given) -> bool:
    try:
        return _WORDS[_text_of(given).lower()]
    except KeyError:
        raise ValueError from None


def _path(given: Given) -> Path | None:
    text = _text_of(given)
    if "\0" in text:
        raise ValueError
    return given.folder / Path(text).expanduser() if text else None


def _network(given: Given) -> str:
    network = ipaddress.ip_network(_text_of(given), strict=False)
    if network.prefixlen == 0:  # trusting everybody would make every caller whoever it says it is
        raise ValueError
    return str(network)


def _host(given: Given) -> str:
    text = _text_of(given)
    if not re.fullmatch(r"[A-Za-z0-9.:_-]{1,253}", text):
        raise ValueError
    return text


PERCENT = Kind(read=_percent, expected="a percentage such as 5%, above 0% and up to 100%")
SHARE = Kind(read=_share, expected="a percentage such as 20%, from 0% to 100%")
TRUTH = Kind(read=_truth, expected="true or false")
PATH = Kind(read=_path, expected="a path")
NETWORK = Kind(read=_network, expected="an address or network such as 10.0.0.5 or 10.0.0.0/8, not every address")
HOST = Kind(read=_host, expected="an address or host name such as 127.0.0.1")
PORT = whole(0, 65535, "a port (0 takes any free one)")


def text(longest: int, *, blank: bool = True, secret: bool = False) -> Kind:
    """Free text up to a number of characters."""

    def read(given: Given) -> str:
        found = _text_of(given)
        if len(found) > longest or "\0" in found or not (blank or found):
            raise ValueError
        return found

    return Kind(read=read, expected=f"text of {0 if blank else 1} to {longest} characters", secret=secret)


def shaped(pattern: str, expected: str) -> Kind:
    """Text that a regular expression matches whole."""

    def read(given: Given) -> str:
        found = _text_of(given)
        if not re.fullmatch(pattern, found):
            raise ValueError
        return found

    return Kind(read=read, expected=expected)


def choice(*words: str) -> Kind:
    """One of some words."""

    def read(given: Given) -> str:
        found = _text_of(given).lower()
        if found not in words:
            raise ValueError
        return found

    return Kind(read=read, expected="one of " + ", ".join(words))


def several(kind: Kind) -> Kind:
    """A list of values, or one text with commas between them."""

    def read(given: Given) -> tuple[Any, ...]:
        items: Sequence[Given]
        if isinstance(given.value, str):
            words = [word.strip() for word in given.value.split(",")]
            items = [Given(value=word, where=given.where, folder=given.folder) for word in words if word]
        elif isinstance(given.value, tuple):
            items = given.value
        else:
            raise ValueError
        return tuple(kind.read(item) for item in items)

    return Kind(read=read, expected=f"a list, each item {kind.expected}")


def records(kinds: Mapping[str, Kind]) -> Kind:
    """A list of mappings that have exactly these keys; each is read as a tuple of the values in this order."""

    def read(given: Given) -> tuple[tuple[Any, ...], ...]:
        if not isinstance(given.value, tuple):
            raise ValueError
        rows = []
        for item in given.value:
            if not isinstance(item.value, Mapping) or item.value.keys() != kinds.keys():
                raise ValueError
            rows.append(tuple(kind.read(item.value[key]) for key, kind in kinds.items()))
        return tuple(rows)

    shape = "; ".join(f"`{key}`: {kind.expected}" for key, kind in kinds.items())
    return Kind(read=read, expected=f"a list of mappings with exactly {shape}", flat=False)


def unproving(path: Path) -> str:
    """Return why a file proves no certificates of others; empty where it holds certificates in PEM."""
    if not path.is_file():
        return f"there is no file {path}"
    import ssl  # late: few name such a file

    try:
        text = path.read_text("ascii", "ignore")
    except OSError as problem:
        return f"{path} cannot be read ({problem.strerror})"
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
    except (ssl.SSLError, ValueError):
        return f"{path} holds no certificates; expected those that have signed the other's, in PEM"
    return ""
