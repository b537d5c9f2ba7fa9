"""What adapters posted, compared with what turns owed: each answer once, in the order of its place, and as it is kept.

A platform knows a post by its dedupe key and shows it once; what counts is what it shows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import msgspec
from fault_checker import DUPLICATED, LOST, MIXED, OUT_OF_ORDER, Violation


class Given(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="given"):
    """An adapter was given a delivery."""

    at: float
    adapter: str
    key: str
    attempt: int


class Posted(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="posted"):
    """A platform was given a post; `shown` is False for one whose key it knew."""

    at: float
    adapter: str
    key: str
    turn: str
    place: str
    text: str
    shown: bool


class Owed(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="owed"):
    """A turn that ended owes its place an answer, or its failure; a `silent` one has nothing to show."""

    turn: str
    place: str
    text: str
    silent: bool = False
    gave_way: bool = False


class Row(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="row"):
    """A delivery as the store has it in the end, in the order of its rows."""

    key: str
    turn: str
    place: str
    state: str


Note = Given | Posted | Owed | Row


def check_deliveries(notes: Iterable[Note]) -> list[Violation]:
    """Return what was broken."""
    broken: list[Violation] = []
    shown: dict[str, Posted] = {}
    given: set[tuple[str, int]] = set()
    owed: list[Owed] = []
    rows: list[Row] = []
    for note in notes:
        if isinstance(note, Given):
            if (note.key, note.attempt) in given:
                broken.append(_violation(DUPLICATED, note.key, f"attempt {note.attempt} was given to two"))
            given.add((note.key, note.attempt))
        elif isinstance(note, Posted):
            if note.shown and note.turn in shown:
                broken.append(_violation(DUPLICATED, note.turn, "it was posted under two keys"))
            if note.shown:
                shown[note.turn] = note
        elif isinstance(note, Owed):
            owed.append(note)
        else:
            rows.append(note)
    dead = {row.turn for row in rows if row.state == "dead"}
    broken += [problem for debt in owed for problem in _paid(debt, shown.get(debt.turn), debt.turn in dead)]
    turns = {debt.turn for debt in owed}
    strange = [turn for turn in shown if turn not in turns]
    broken += [_violation(MIXED, turn, "it was posted, and no such turn has ended") for turn in strange]
    broken += [_violation(LOST, row.turn, "it still waits to be delivered") for row in rows if row.state == "open"]
    return broken + _order(rows, list(shown.values()))


def _paid(debt: Owed, post: Posted | None, dead: bool) -> Iterable[Violation]:
    if post is None:
        if not (debt.silent or debt.gave_way or dead):
            yield _violation(LOST, debt.turn, "its answer was never posted")
        return
    if debt.silent:
        yield _violation(MIXED, debt.turn, f"it has nothing to say, and {post.text!r} was posted")
    elif post.text != debt.text:
        yield _violation(MIXED, debt.turn, f"{post.text!r} was posted where {debt.text!r} is kept")
    if post.place != debt.place:
        yield _violation(MIXED, debt.turn, f"it was posted to {post.place} instead of {debt.place}")


def _order(rows: list[Row], posts: list[Posted]) -> Iterable[Violation]:
    """Yield the places whose posts are not in the order in which the store took them in."""
    number = {row.key: place for place, row in enumerate(rows)}
    by_place: dict[str, list[Posted]] = defaultdict(list)
    for post in posts:
        if post.key in number:
            by_place[post.place].append(post)
    return [
        _violation(OUT_OF_ORDER, place, "its posts are not in the order of the turns' ends")
        for place, there in by_place.items()
        if [post.key for post in there] != sorted((post.key for post in there), key=number.__getitem__)
    ]


def _violation(kind: str, subject: str, problem: str) -> Violation:
    return Violation(kind=kind, subject=subject, problem=problem)
