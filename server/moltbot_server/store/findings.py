"""What is found when a store is looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Weight = Literal["grave", "warning", "note"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something about a store that its keeper should know. `weight`: it must not be, it may do harm, or just a note."""

    text: str
    weight: Weight = "grave"


def dead_letters(number: int) -> str:
    """Return what is told of answers that were given up."""
    answers = "1 answer" if number == 1 else f"{number} answers"
    return f"{answers} could not be delivered: `moltbot deadletters list` tells which"
