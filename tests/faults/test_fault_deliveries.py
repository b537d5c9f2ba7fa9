"""The checker of deliveries notices each way to break a promise, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from fault_deliveries import Given, Note, Owed, Posted, Row, check_deliveries
from msgspec.structs import replace

GIVEN = Given(at=1.0, adapter="a", key="k1", attempt=1)
POSTED = Posted(at=2.0, adapter="a", key="k1", turn="t1", place="p", text="one", shown=True)
OWED = Owed(turn="t1", place="p", text="one")
ROW = Row(key="k1", turn="t1", place="p", state="delivered")
SECOND = (
    replace(GIVEN, key="k2"),
    replace(POSTED, key="k2", turn="t2", text="two"),
    replace(OWED, turn="t2", text="two"),
    replace(ROW, key="k2", turn="t2"),
)


def kinds(*notes: Note) -> list[str]:
    return [violation.kind for violation in check_deliveries(notes)]


def test_what_is_posted_once_in_order_breaks_nothing() -> None:
    again = (replace(GIVEN, attempt=2, adapter="b"), replace(POSTED, adapter="b", shown=False))

    assert kinds(GIVEN, POSTED, *again, *SECOND[:2], OWED, SECOND[2], ROW, SECOND[3]) == []


@pytest.mark.parametrize(
    "notes",
    [
        (replace(OWED, silent=True),),
        (replace(OWED, gave_way=True),),
        (OWED, replace(ROW, state="dead")),
    ],
)
def test_what_need_not_be_posted_may_be_missing(notes: tuple[Note, ...]) -> None:
    assert kinds(*notes) == []


@pytest.mark.parametrize(
    ("kind", "notes"),
    [
        ("lost", (OWED, ROW)),
        ("lost", (OWED, POSTED, replace(ROW, state="open"))),
        ("duplicated", (GIVEN, replace(GIVEN, adapter="b"), POSTED, OWED, ROW)),
        ("duplicated", (POSTED, replace(POSTED, key="k9"), OWED, ROW)),
        ("mixed", (replace(POSTED, text="other"), OWED, ROW)),
        ("mixed", (replace(POSTED, place="q"), OWED, ROW)),
        ("mixed", (POSTED, replace(OWED, silent=True), ROW)),
        ("mixed", (POSTED, ROW)),
        ("out_of_order", (SECOND[1], POSTED, OWED, SECOND[2], ROW, SECOND[3])),
    ],
)
def test_each_way_to_break_a_promise_is_noticed(kind: str, notes: tuple[Any, ...]) -> None:
    assert kinds(*notes) == [kind]
