"""The checker finds what it is there to find: a good history passes, and each broken promise is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fault_history
import pytest
from fault_checker import BROKEN, DUPLICATED, LATE, LOST, MIXED, OUT_OF_ORDER, check
from fault_history import Cancelled, Closed, Counted, Entry, Kept, KeptEvent, Left, Listed, Opened, Read, Told, name_of

FIRST, SECOND = name_of("s", 1), name_of("s", 2)


def opened(stream: int, request: str = "q1.1", **fields: object) -> Opened:
    values: dict[str, object] = {"follower": f"f{request}", "session": "s", "question": request, **fields}
    return Opened(stream=stream, request=request, **values)  # type: ignore[arg-type]


def accepted(stream: int, turn: str = FIRST, sequence: int = 1) -> Told:
    return Told(stream=stream, sequence=sequence, kind="accepted", turn=turn)


def said(stream: int, sequence: int, text: str) -> Told:
    return Told(stream=stream, sequence=sequence, kind="text_delta", text=text)


def completed(stream: int, sequence: int, text: str) -> Told:
    return Told(stream=stream, sequence=sequence, kind="completed", text=text, code="stop")


def failed(stream: int, sequence: int, *, retryable: bool = True) -> Told:
    return Told(stream=stream, sequence=sequence, kind="failed", code="TURN_INTERRUPTED", retryable=retryable)


def kept(turn: str = FIRST, request: str = "q1.1", *events: KeptEvent, state: str = "completed") -> Kept:
    return Kept(turn=turn, request=request, state=state, events=events)


def event(sequence: int, kind: str, text: str = "", at: float = 0.0) -> KeptEvent:
    return KeptEvent(sequence=sequence, kind=kind, text=text, at=at or float(sequence))


BEGIN = event(1, "accepted")


def good() -> list[Entry]:
    """A turn that is told, broken off, taken over and told to its end; and another one behind it."""
    return [
        opened(1, answer="one two"),
        accepted(1),
        said(1, 2, "one"),
        Closed(stream=1, code="UNAVAILABLE"),
        opened(2, turn=FIRST, after=2, answer="one two"),
        Told(stream=2, sequence=1_000_003, kind="reset"),
        said(2, 1_000_004, "one "),
        said(2, 1_000_005, "two"),
        completed(2, 1_000_006, "one two"),
        Closed(stream=2),
        opened(3, "q1.2"),
        accepted(3, SECOND),
        said(3, 2, "three"),
        completed(3, 3, "three"),
        Closed(stream=3),
        Read(generation="a", question="q1.2", history=("q1.1", "one two"), answer="three"),
        kept(
            FIRST,
            "q1.1",
            BEGIN,
            event(2, "text_delta", "one"),
            event(1_000_003, "reset", at=3),
            event(1_000_004, "text_delta", "one ", at=4),
            event(1_000_005, "text_delta", "two", at=5),
            event(1_000_006, "completed", "one two", at=6),
        ),
        kept(
            SECOND,
            "q1.2",
            BEGIN,
            event(2, "text_delta", "three", at=7),
            event(3, "completed", "three", at=8),
        ),
        Listed(session="s", texts=("q1.1", "one two", "q1.2", "three")),
    ]


def without(*kinds: type) -> list[Entry]:
    return [entry for entry in good() if not isinstance(entry, kinds)]


def replaced(old: Callable[[Entry], bool], *new: Entry) -> list[Entry]:
    """The good history with other entries in the place of those chosen."""
    places = [place for place, entry in enumerate(good()) if old(entry)]
    assert places
    history = [entry for place, entry in enumerate(good()) if place not in places]
    return [*history[: places[0]], *new, *history[places[0] :]]


def end_of_first(entry: Entry) -> bool:
    return isinstance(entry, Told) and entry.sequence == 1_000_006


def row_of(turn: str) -> Callable[[Entry], bool]:
    return lambda entry: isinstance(entry, Kept) and entry.turn == turn


def row(turn: str, *events: KeptEvent, state: str = "completed") -> list[Entry]:
    """The good history with another row for a turn."""
    request = "q1.1" if turn == FIRST else "q1.2"
    return replaced(row_of(turn), kept(turn, request, *events, state=state))


FIRST_ENDS_WELL = (event(1_000_004, "text_delta", "one "), event(1_000_005, "text_delta", "two"))


def test_a_good_history_breaks_nothing() -> None:
    assert check(good()) == []


def test_a_history_is_the_same_when_it_was_written_and_read(tmp_path: Path) -> None:
    fault_history.write(tmp_path / "history.jsonl", good())

    assert fault_history.read(tmp_path / "history.jsonl") == good()


BROKEN_HISTORIES: dict[str, tuple[str, list[Entry]]] = {
    "nobody is told an end": (LOST, replaced(end_of_first)),
    "a stream ends without an end": (LOST, [opened(1), accepted(1), Closed(stream=1), *without(Opened, Told, Closed)]),
    "a turn that was accepted is not found": (
        LOST,
        replaced(end_of_first, Closed(stream=2, code="NOT_FOUND", reason="TURN_NOT_FOUND")),
    ),
    "a repeated call is refused": (
        LOST,
        replaced(end_of_first, Closed(stream=2, code="ALREADY_EXISTS", reason="REQUEST_ID_REUSED")),
    ),
    "the row runs for ever": (LOST, row(SECOND, state="running")),
    "the row is gone": (LOST, replaced(row_of(SECOND))),
    "the end that was told is not kept": (LOST, row(SECOND, BEGIN, event(2, "text_delta", "three", at=7))),
    "the question is not listed": (
        LOST,
        replaced(lambda entry: isinstance(entry, Listed), Listed(session="s", texts=("q1.1", "one two"))),
    ),
    "the answer is not listed": (
        LOST,
        replaced(lambda entry: isinstance(entry, Listed), Listed(session="s", texts=("q1.1", "q1.2", "three"))),
    ),
    "a question is listed twice": (
        DUPLICATED,
        replaced(
            lambda entry: isinstance(entry, Listed),
            Listed(session="s", texts=("q1.1", "one two", "q1.2", "three", "q1.1", "one two")),
        ),
    ),
    "one request is answered twice": (
        DUPLICATED,
        [*good(), opened(4), accepted(4, name_of("s", 3)), completed(4, 2, ""), Closed(stream=4)],
    ),
    "one request is kept twice": (
        DUPLICATED,
        [*good(), kept(name_of("s", 3), "q1.1", BEGIN, event(2, "failed"), state="failed")],
    ),
    "a turn ends in two ways": (DUPLICATED, [*good(), opened(4), accepted(4), failed(4, 1_000_000)]),
    "a turn is told to have failed and has not": (DUPLICATED, replaced(end_of_first, failed(2, 1_000_006))),
    "a request_id with other content is answered": (DUPLICATED, [*good(), opened(4, other=True), accepted(4)]),
    "a second turn is begun beside the first": (
        DUPLICATED,
        [*good(), opened(4, "q1.2"), accepted(4, name_of("s", 3)), Left(follower="fq1.2")],
    ),
    "the text goes on after a take-over": (
        MIXED,
        replaced(lambda entry: isinstance(entry, Told) and entry.kind == "reset"),
    ),
    "the kept text goes on after a take-over": (
        MIXED,
        row(FIRST, BEGIN, event(2, "text_delta", "one"), *FIRST_ENDS_WELL, event(1_000_006, "completed", "oneone two")),
    ),
    "a piece is missing": (MIXED, replaced(lambda entry: entry == said(2, 1_000_004, "one "))),
    "a piece comes twice": (
        MIXED,
        replaced(lambda entry: entry == said(2, 1_000_005, "two"), *[said(2, 1_000_005, "two")] * 2),
    ),
    "sequences fall": (
        MIXED,
        replaced(lambda entry: entry == said(2, 1_000_005, "two"), said(2, 4, "two")),
    ),
    "something comes after the end": (
        MIXED,
        replaced(end_of_first, completed(2, 1_000_006, "one two"), said(2, 1_000_007, "more")),
    ),
    "the answer is another one": (
        MIXED,
        [
            entry
            if not isinstance(entry, Opened) or entry.request == "q1.2"
            else opened(entry.stream, answer="else", turn=entry.turn, after=entry.after)
            for entry in good()
        ],
    ),
    "no model said it": (
        MIXED,
        replaced(
            lambda entry: isinstance(entry, Read),
            Read(generation="a", question="q1.2", history=("q1.1", "one two"), answer="thr"),
        ),
    ),
    "the kept answer is not the kept text": (
        MIXED,
        row(SECOND, BEGIN, event(2, "text_delta", "thr", at=7), event(3, "completed", "three", at=8)),
    ),
    "what was shown is not kept": (
        MIXED,
        row(FIRST, BEGIN, event(1_000_003, "reset", at=3), *FIRST_ENDS_WELL, event(1_000_006, "completed", "one two")),
    ),
    "a cancelled turn was answered": (MIXED, [*good(), Cancelled(turn=SECOND)]),
    "a later turn has a lower number": (
        OUT_OF_ORDER,
        [opened(9, "q1.9"), accepted(9, name_of("s", 5)), Left(follower="fq1.9"), *good()],
    ),
    "a turn is answered before the one in front of it has ended": (
        OUT_OF_ORDER,
        row(SECOND, BEGIN, event(2, "text_delta", "three", at=5.5), event(3, "completed", "three", at=8)),
    ),
    "a model read what was not said": (
        OUT_OF_ORDER,
        replaced(
            lambda entry: isinstance(entry, Read), Read(generation="a", question="q1.2", history=(), answer="three")
        ),
    ),
    "an answer comes after its deadline": (
        LATE,
        [opened(0, "q1.2", deadline=7.0), Closed(stream=0, code="UNAVAILABLE"), *good()],
    ),
    "a stream ends with INTERNAL": (BROKEN, [opened(0), Closed(stream=0, code="INTERNAL", reason="INTERNAL"), *good()]),
    "the journal of an ended turn is left": (
        BROKEN,
        replaced(
            row_of(SECOND),
            Kept(
                turn=SECOND,
                request="q1.2",
                state="completed",
                events=(BEGIN, event(2, "text_delta", "three", at=7), event(3, "completed", "three", at=8)),
                journal=2,
            ),
        ),
    ),
}


@pytest.mark.parametrize(("kind", "history"), BROKEN_HISTORIES.values(), ids=BROKEN_HISTORIES)
def test_what_must_not_be_is_found(kind: str, history: list[Entry]) -> None:
    assert kind in {violation.kind for violation in check(history)}


def test_what_a_power_failure_took_may_be_missing_when_a_reset_came() -> None:
    history = row(
        FIRST, BEGIN, event(1_000_003, "reset", at=3), *FIRST_ENDS_WELL, event(1_000_006, "completed", "one two", at=6)
    )

    assert check(history, power_failed=True) == []
    assert check(history) != []


def test_a_failed_turn_that_was_asked_again_is_no_duplicate() -> None:
    history: list[Entry] = [
        opened(1),
        accepted(1),
        failed(1, 2),
        Closed(stream=1),
        opened(2, follower="again"),
        accepted(2, SECOND),
        completed(2, 2, ""),
        Closed(stream=2),
        Kept(turn=FIRST, request="q1.1", state="failed", events=(BEGIN, event(2, "failed")), gave_way=True),
        kept(SECOND, "q1.1", BEGIN, event(2, "completed", at=3)),
        Listed(session="s", texts=("q1.1",)),
    ]

    assert check(history) == []


def test_a_failed_turn_whose_reader_hears_of_it_late_is_no_duplicate() -> None:
    history: list[Entry] = [
        opened(1, follower="slow"),
        opened(2, follower="quick"),
        accepted(2, SECOND),  # the first one has failed by now, and its reader is not told yet
        accepted(1, FIRST),
        failed(1, 2),
        Closed(stream=1),
        said(2, 2, "one"),
        completed(2, 3, "one"),
        Closed(stream=2),
        Kept(turn=FIRST, request="q1.1", state="failed", gave_way=True, events=(BEGIN, event(2, "failed"))),
        kept(SECOND, "q1.1", BEGIN, event(2, "text_delta", "one"), event(3, "completed", "one")),
    ]

    assert check(history) == []


def test_words_of_another_session_are_found_wherever_they_are() -> None:
    other = [
        opened(8, "q2.1", session="other"),
        accepted(8, name_of("other", 1)),
        completed(8, 2, ""),
        Closed(stream=8),
        kept(name_of("other", 1), "q2.1", BEGIN, event(2, "completed")),
    ]
    assert check([*good(), *other]) == []
    for found in (
        Listed(session="s", texts=("q1.1", "one two", "q2.1")),
        Read(generation="g", question="q1.1", history=("said q2.1",), answer="one two"),
    ):
        broken = check([*good(), *other, found])
        assert (MIXED, "which was said in other") in [
            (violation.kind, "which was said in other" if "said in other" in violation.problem else "")
            for violation in broken
        ]


def test_ends_that_were_not_counted_or_counted_twice_are_found() -> None:
    turns = len([entry for entry in good() if isinstance(entry, Kept)])
    assert check([*good(), Counted(turns=turns)]) == []
    for wrong in (turns - 1, turns + 1):
        (violation,) = check([*good(), Counted(turns=wrong)])
        assert (violation.kind, violation.subject) == (BROKEN, "metrics")
    refused = [opened(9), Closed(stream=9, code="UNAVAILABLE", reason="STORAGE_UNAVAILABLE")]
    assert check([*refused, *good(), Counted(turns=turns - 1)]) == []
