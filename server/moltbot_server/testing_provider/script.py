"""What a mock provider is told to do: how it answers, how fast, and what goes wrong how often."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from moltbot_server.config_sources import Given
from moltbot_server.config_values import TRUTH, Kind, choice, duration, size, text, whole

_DAY = 86_400.0
_SPAN = duration(0, _DAY)
_COUNTS = ("input", "output", "cached")
_MOST = 1_000_000_000

_OPTIONS: Mapping[str, Mapping[str, tuple[Kind, Any]]] = {
    "error": {"status": (choice("500", "502", "503", "529"), "500")},
    "rate_limit": {"retry_after": (_SPAN, 1.0)},
    "hang": {},
    "hang_after_first": {},
    "cut": {"after": (whole(0, 100_000), 0)},
    "broken_sse": {"how": (choice("not_json", "truncated", "no_done"), "not_json")},
    "split_utf8": {},
    "slow": {"by": (_SPAN, 5.0)},
    "empty": {},
    "endless": {},
    "huge": {"size": (size(1, 64 << 20), "10MiB")},
    "wrong_content_type": {},
    "unauthorized": {"status": (choice("401", "403"), "401")},
}
KINDS = tuple(_OPTIONS)
"""The kinds of faults."""


class ScriptError(ValueError):
    """A script cannot be followed: the message names the field, what it holds and what would be right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that goes wrong: in a `share` of the calls, in `every` so manieth, or `until` some calls or seconds."""

    kind: str
    share: float | None = None
    every: int | None = None
    until_calls: int | None = None
    until_seconds: float | None = None
    status: int = 500
    """Of `error` and `unauthorized`."""
    retry_after: float = 1.0
    """Of `rate_limit`, in seconds."""
    after: int = 0
    """Of `cut`: so many chunks of the answer go out before."""
    how: str = "not_json"
    """Of `broken_sse`: `not_json`, `truncated` or `no_done`."""
    by: float = 5.0
    """Of `slow`: so many seconds later than the script says."""
    size: int = 10 << 20
    """Of `huge`: so many bytes of text in one piece."""

    def shown(self) -> dict[str, Any]:
        """Return the fault as a script writes it."""
        written: dict[str, Any] = {"kind": self.kind}
        if self.until_calls is not None:
            written["until"] = f"{self.until_calls} calls"
        if self.until_seconds is not None:
            written["until"] = f"{self.until_seconds:g}s"
        for name in ("share", "every"):
            if getattr(self, name) is not None:
                written[name] = getattr(self, name)
        return written | {name: _written(kind, getattr(self, name)) for name, (kind, _) in _OPTIONS[self.kind].items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call of a tool that an answer holds; `arguments` is a JSON object as text."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """The tokens that an answer says it cost; `cached` of those of the input came from a cache."""

    input: int
    output: int
    cached: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """All that a provider is told. Durations are seconds; keys are accepted when `keys` is empty or names them."""

    text: str | None = None
    echo: bool = False
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    use_tools: bool = False
    chunks: int | None = None
    first_token: tuple[float, float] = (0.0, 0.0)
    pace: float = 0.0
    usage: Usage | None = None
    faults: tuple[Fault, ...] = ()
    keys: tuple[str, ...] = field(default=(), repr=False)
    out_of_quota: tuple[str, ...] = field(default=(), repr=False)
    context_length: int | None = None
    seed: int = 0

    @classmethod
    def read(cls, written: object) -> Script:
        """Return the script that a mapping from JSON, YAML or flags holds; what is not named has its default.

        Raises:
            ScriptError: a field is unknown, or holds what cannot be followed.
        """
        given = _mapping(written, "the script", [each.name for each in fields(cls)])
        script = cls(**{name: _READERS[name](value, name) for name, value in given.items() if value is not None})
        shares = sum(fault.share or 0 for fault in script.faults)
        if shares > 1 + 1e-9:
            raise ScriptError(f"faults: their shares add up to {shares:g}; together they can be 1 at most")
        if script.echo and script.text is not None:
            raise ScriptError("text: an answer that echoes has no text of its own; leave out one of them")
        return script

    def shown(self) -> dict[str, Any]:
        """Return the script as JSON that `read` understands."""
        low, high = self.first_token
        return {
            "text": self.text,
            "echo": self.echo,
            "reasoning": self.reasoning,
            "tool_calls": [{"name": call.name, "arguments": json.loads(call.arguments)} for call in self.tool_calls],
            "use_tools": self.use_tools,
            "chunks": self.chunks,
            "first_token": f"{low:g}s" if low == high else [f"{low:g}s", f"{high:g}s"],
            "pace": f"{self.pace:g}s",
            "usage": self.usage and {name: getattr(self.usage, name) for name in _COUNTS},
            "faults": [fault.shown() for fault in self.faults],
            "keys": list(self.keys),
            "out_of_quota": list(self.out_of_quota),
            "context_length": self.context_length,
            "seed": self.seed,
        }


def _written(kind: Kind, value: Any) -> Any:
    return f"{value:g}s" if kind is _SPAN else value


def _mapping(value: object, where: str, names: list[str]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ScriptError(f"{where}: must be a mapping with some of {', '.join(names)}")
    for name in value:
        if name not in names:
            raise ScriptError(f"{where}: there is no {str(name)[:60]!r}; known are {', '.join(names)}")
    return value


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise ScriptError(f"{where}: must be a list")
    return list(value)


def _value(kind: Kind, value: object, where: str) -> Any:
    scalar = isinstance(value, str | int | float)
    try:
        return kind.read(Given(value=str(value) if scalar else None, where=where, folder=Path()))
    except ValueError:
        raise ScriptError(f"{where}: must be {kind.expected}; it is {str(value)[:60]!r}") from None


def _of(kind: Kind) -> Callable[[object, str], Any]:
    return lambda value, where: _value(kind, value, where)


def _text(value: object, where: str) -> str:
    """Return text as it is, with the spaces around it."""
    if not isinstance(value, str) or len(value) > 1_000_000:
        raise ScriptError(f"{where}: must be text of at most 1000000 characters")
    return value


def _first_token(value: object, where: str) -> tuple[float, float]:
    if isinstance(value, str) and "-" in value:
        value = [part.strip() for part in value.split("-", 1)]
    ends = _list(value, where) if isinstance(value, list | tuple) else [value, value]
    if len(ends) != 2:
        raise ScriptError(f"{where}: must be one duration or a range of two, such as 200ms-2s")
    low, high = (_value(_SPAN, end, where) for end in ends)
    if low > high:
        raise ScriptError(f"{where}: the range ends before it begins")
    return low, high


def _usage(value: object, where: str) -> Usage:
    given = _mapping(value, where, list(_COUNTS))
    count = whole(0, _MOST)
    used = Usage(**{name: _value(count, given.get(name, 0), f"{where}.{name}") for name in _COUNTS})
    if used.cached > used.input:
        raise ScriptError(f"{where}.cached: a cache cannot serve more than the input")
    return used


def _tool_call(value: object, where: str) -> ToolCall:
    given = _mapping(value, where, ["name", "arguments"])
    arguments = given.get("arguments", {})
    if not isinstance(arguments, Mapping):
        raise ScriptError(f"{where}.arguments: must be a mapping")
    name = _value(text(64, blank=False), given.get("name"), f"{where}.name")
    return ToolCall(name=name, arguments=json.dumps(arguments, ensure_ascii=False))


def _share(value: object, where: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e-\d+)?)\s*(%?)", str(value))
    share = float(found[1]) / (100 if found[2] else 1) if found else -1.0
    if not 0 <= share <= 1:
        raise ScriptError(f"{where}: must be a share such as 0.05 or 5%; it is {str(value)[:60]!r}")
    return share


def _until(value: object, where: str) -> dict[str, Any]:
    calls = re.fullmatch(r"(\d{1,9})(\s*calls?)?", str(value).strip())
    return {"until_calls": int(calls[1])} if calls else {"until_seconds": _value(_SPAN, value, where)}


def _fault(value: object, where: str) -> Fault:
    """Read a mapping, or the text of a flag: `error status=503 share=10%`."""
    if isinstance(value, str):
        kind, *pairs = re.split(r"[\s,]+(?=\w+=|$)", value.strip())
        value = {"kind": kind, **{name: told for name, _, told in (pair.partition("=") for pair in pairs if pair)}}
    if not isinstance(value, Mapping) or value.get("kind") not in _OPTIONS:
        raise ScriptError(f"{where}.kind: must be one of {', '.join(KINDS)}")
    options = _OPTIONS[value["kind"]]
    given = _mapping(value, where, ["kind", "share", "every", "until", *options])
    when = [name for name in ("share", "every", "until") if given.get(name) is not None]
    if len(when) > 1:
        raise ScriptError(f"{where}: {' and '.join(when)} do not go together; without any it is every call")
    read: dict[str, Any] = {"kind": given["kind"]}
    for name in when:
        told, place = given[name], f"{where}.{name}"
        if name == "until":
            read |= _until(told, place)
        else:
            read[name] = _share(told, place) if name == "share" else _value(whole(1, _MOST), told, place)
    for name, (kind, default) in options.items():
        read[name] = _value(kind, given.get(name, default), f"{where}.{name}")
    return Fault(**read | ({"status": int(read["status"])} if "status" in read else {}))


def _each(read: Callable[[object, str], Any]) -> Callable[[object, str], tuple[Any, ...]]:
    return lambda value, where: tuple(read(item, f"{where}[{at}]") for at, item in enumerate(_list(value, where)))


_READERS: Mapping[str, Callable[[object, str], Any]] = {
    "text": _text,
    "echo": _of(TRUTH),
    "reasoning": _text,
    "tool_calls": _each(_tool_call),
    "use_tools": _of(TRUTH),
    "chunks": _of(whole(1, 100_000)),
    "first_token": _first_token,
    "pace": _of(_SPAN),
    "usage": _usage,
    "faults": _each(_fault),
    "keys": _each(_of(text(500, blank=False))),
    "out_of_quota": _each(_of(text(500, blank=False))),
    "context_length": _of(whole(1, _MOST)),
    "seed": _of(whole(0, _MOST)),
}
