"""From what was written to values: sections become dotted keys, each key is read by its kind, all mistakes are told."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from moltbot_server.config_sources import Given, Problem
from moltbot_server.config_spelling import unknown
from moltbot_server.config_values import Kind, Misread, Unfit

_SECRETS = re.compile(r"(?<=//)[^/@\s]*(?=@)|(?<=\?)[^'\"\s]+")  # a name and a password in an address, and its query


def flat(
    level: Mapping[str, Given], keys: Mapping[str, Kind], problems: list[Problem], *, title: str = "", prefix: str = ""
) -> Iterator[tuple[str, Given]]:
    """Yield what stands in a mapping and the sections in it by dotted keys.

    `title` leads to the mapping itself in what is said of names that are not known, such as `providers.openai.`.
    """
    sections = sections_of(keys)
    for name, value in level.items():
        key = f"{prefix}{name}"
        if key in keys:
            yield key, value
        elif key not in sections:
            siblings = {k[len(prefix) :].split(".")[0] for k in keys if k.startswith(prefix)}
            problems.append(unknown(name, value.where, siblings, f"{title}{prefix}"[:-1]))
        elif isinstance(value.value, Mapping):
            yield from flat(value.value, keys, problems, title=title, prefix=f"{key}.")
        elif value.value is not None:
            inside = sorted(k.removeprefix(f"{key}.") for k in keys if k.startswith(f"{key}."))
            text = f"{title}{key}: found {value}, expected the keys {', '.join(inside)}"
            problems.append(Problem(where=value.where, text=text))


def sections_of(keys: Mapping[str, Kind]) -> frozenset[str]:
    """Return the sections that dotted keys lie in."""
    return frozenset(key[:end] for key in keys for end in range(len(key)) if key[end] == ".")


def read(
    given: Mapping[str, Given], keys: Mapping[str, Kind], problems: list[Problem], *, title: str = ""
) -> dict[str, Any]:
    """Return the values of dotted keys; what cannot be read is left out and told."""
    values: dict[str, Any] = {}
    for key, value in given.items():
        kind = keys[key]
        try:
            values[key] = kind.read(value)
        except Misread as wrong:
            problems.extend(wrong.problems)
        except ValueError as wrong:
            found = "a secret that does not fit" if kind.secret else _shown(value)
            told = str(wrong) if isinstance(wrong, Unfit) else f"found {found}, expected {kind.expected}"
            # A flag is the key's own name already.
            subject = "" if value.where.startswith("--") else f"{title}{key}: "
            problems.append(Problem(where=value.where, text=f"{subject}{told}"))
    return values


def _shown(value: Given) -> str:
    text = str(value)
    return _SECRETS.sub("…", text) if "://" in text else text


def read_mapping(given: Given, keys: Mapping[str, Kind], problems: list[Problem], *, title: str) -> dict[str, Any]:
    """Return the values of a mapping that stands somewhere in a list or under a name of its own; nothing is empty."""
    if given.value is None:
        return {}
    if not isinstance(given.value, Mapping):
        wanted = ", ".join(sorted({key.split(".")[0] for key in keys}))
        problems.append(Problem(where=given.where, text=f"{title}: found {given}, expected the keys {wanted}"))
        return {}
    inside = dict(flat(given.value, keys, problems, title=f"{title}."))
    return read(inside, keys, problems, title=f"{title}.")
