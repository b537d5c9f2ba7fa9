"""What to say of a name that is not known: the one that was probably meant, or those that there are."""

from __future__ import annotations

from collections.abc import Iterable

from moltbot_server.config_sources import Problem

_LISTED = 8  # more names than these are not told in a message


def unknown(name: str, where: str, known: Iterable[str], section: str = "") -> Problem:
    """Return what is wrong with a key that is not known, in a section such as `models` or at the top."""
    known = list(known)
    near = nearest(name, known)
    if near:
        hint = f"did you mean `{near}`?"
    elif len(known) > _LISTED:
        hint = "docs/configuration.md has all that are known"
    else:
        hint = f"known are {', '.join(sorted(known))}"
    inside = f" in `{section}`" if section else ""
    return Problem(where=where, text=f"unknown key `{name}`{inside}; {hint}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name that was probably meant, or nothing. The prefix of variables makes no likeness."""
    import difflib  # late: only a message about a mistake needs it

    known = list(known)
    if (prefixed := f"MOLTBOT_{name.upper()}") in known:
        return prefixed
    prefix = "MOLTBOT_" if name.startswith("MOLTBOT_") else ""
    by_lower = {word.removeprefix(prefix).lower(): word for word in known if word.startswith(prefix)}
    wanted = name.removeprefix(prefix).lower().replace("-", "_")
    found = difflib.get_close_matches(wanted, by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else ""


def slips(one: str, other: str) -> int:
    """Return how many slips of the hand lie between two words: a letter more, less, another, or two exchanged."""
    before: list[int] = []
    row = list(range(len(other) + 1))
    for at, letter in enumerate(one, 1):
        earlier, before, row = before, row, [at]
        for end, wanted in enumerate(other, 1):
            fewest = min(before[end] + 1, row[-1] + 1, before[end - 1] + (letter != wanted))
            if at > 1 and end > 1 and letter == other[end - 2] and one[at - 2] == wanted:
                fewest = min(fewest, earlier[end - 2] + 1)
            row.append(fewest)
    return row[-1]
