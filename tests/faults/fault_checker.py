"""Reads a history and says what it breaks of what must hold: I1 to I8 of docs/faults.md."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from fault_history import (
    Cancelled,
    Closed,
    Counted,
    Entry,
    Kept,
    KeptEvent,
    Left,
    Listed,
    Opened,
    Read,
    Told,
    ordinal_of,
)

LOST, DUPLICATED, MIXED, OUT_OF_ORDER, LATE, BROKEN = (
    "lost",
    "duplicated",
    "mixed",
    "out_of_order",
    "late",
    "broken",
)
SLACK = 0.5
"""Seconds after its deadline within which a turn has to have ended."""
_ENDS = frozenset({"completed", "failed"})
_SAYS = frozenset({"text_delta", "reset"})
_EPOCH = 1_000_000
_QUESTION = re.compile(r"q\d+\.\d+")
"""A question is its request_id too, and looks like nothing that a model says: wherever it is found, it is that one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """Something that must not be: what kind of promise it breaks, of which turn or request, and how."""

    kind: str
    subject: str
    problem: str


@dataclass(slots=True)
class _View:
    """What a follower shows of one turn."""

    text: str = ""
    sequence: int = 0


@dataclass(slots=True)
class _Request:
    """What is known of one request_id."""

    session: str
    answer: str = ""
    deadline: float = 0.0
    floor: int = 0
    turns: dict[str, None] = field(default_factory=dict)
    followers: dict[str, bool] = field(default_factory=dict)
    """Whether each of them needs no end: it was told one, was refused for good, or left."""


class Checker:
    """Goes through a history once, then compares it with what was kept."""

    def __init__(self, history: Iterable[Entry], *, power_failed: bool = False) -> None:
        """`power_failed`: what was told may be missing in the store, if a reset came after it."""
        self.violations: list[Violation] = []
        self._power_failed = power_failed
        self._requests: dict[str, _Request] = {}
        self._streams: dict[int, tuple[Opened, str]] = {}
        self._over: set[int] = set()
        self._views: dict[tuple[str, str], _View] = {}
        self._ends: dict[str, dict[tuple[str, int, str], Told]] = defaultdict(dict)
        self._shown: list[tuple[str, int, str]] = []
        self._highest: Counter[str] = Counter()
        self._cancelled: set[str] = set()
        self._reused: set[str] = set()
        self._unstored: set[str] = set()
        self._reads: dict[str, list[Read]] = defaultdict(list)
        self._kept: dict[str, Kept] = {}
        self._listed: dict[str, Listed] = {}
        self._counted: Counted | None = None
        steps: dict[type, Callable[..., None]] = {
            Opened: self._opened,
            Told: self._told,
            Closed: self._closed,
            Left: self._left,
            Cancelled: lambda entry: self._cancelled.add(entry.turn),
            Read: lambda entry: self._reads[entry.question].append(entry),
            Kept: lambda entry: self._kept.__setitem__(entry.turn, entry),
            Listed: lambda entry: self._listed.__setitem__(entry.session, entry),
            Counted: lambda entry: setattr(self, "_counted", entry),
        }
        for entry in history:
            if (step := steps.get(type(entry))) is not None:
                step(entry)
        self._compare()

    def _break(self, kind: str, subject: str, problem: str) -> None:
        self.violations.append(Violation(kind=kind, subject=subject, problem=problem))

    # --- what followers were told ---------------------------------------------------------------------------------

    def _opened(self, entry: Opened) -> None:
        self._streams[entry.stream] = (entry, entry.turn)
        if entry.other:
            self._reused.add(entry.request)
            return
        request = self._requests.get(entry.request)
        if request is None:
            request = self._requests[entry.request] = _Request(
                entry.session, entry.answer, entry.deadline, self._highest[entry.session]
            )
        request.followers[entry.follower] = False
        if entry.turn:
            view = self._views.setdefault((entry.follower, entry.turn), _View())
            if not entry.after:
                view.text, view.sequence = "", 0
            elif view.sequence != entry.after:
                self._break(BROKEN, entry.turn, "the client resumed after something else than what it saw last")

    def _told(self, entry: Told) -> None:
        opened, turn = self._streams[entry.stream]
        if opened.other:
            self._break(DUPLICATED, opened.request, "a request_id with other content was answered")
            return
        request = self._requests[opened.request]
        if entry.turn:
            turn = self._accepted(entry, opened, request)
        if not turn:
            self._break(MIXED, opened.request, f"a {entry.kind} came before the turn was told")
            return
        view = self._views.setdefault((opened.follower, turn), _View())
        if entry.sequence <= view.sequence:
            self._break(MIXED, turn, f"the sequence {entry.sequence} came after {view.sequence}")
        if entry.stream in self._over:
            self._break(MIXED, turn, f"a {entry.kind} came after the end")
        view.sequence = entry.sequence
        if entry.kind == "text_delta":
            view.text += entry.text
            self._shown.append((turn, entry.sequence, view.text))
        elif entry.kind == "reset":
            view.text = entry.text
        elif entry.kind in _ENDS:
            self._over.add(entry.stream)
            request.followers[opened.follower] = True
            self._ends[turn].setdefault((entry.kind, entry.sequence, entry.text), entry)
            if entry.kind == "completed" and view.text != entry.text:
                self._break(MIXED, turn, f"shown was {view.text!r}, and the end says {entry.text!r}")

    def _accepted(self, entry: Told, opened: Opened, request: _Request) -> str:
        turn = entry.turn
        self._streams[entry.stream] = (opened, turn)
        if not opened.turn:
            self._views[(opened.follower, turn)] = _View()
        if turn not in request.turns:
            request.turns[turn] = None
            number = ordinal_of(turn)
            if number <= request.floor:
                self._break(OUT_OF_ORDER, turn, f"it was asked after turn {request.floor} was accepted")
            self._highest[request.session] = max(self._highest[request.session], number)
        return turn

    def _closed(self, entry: Closed) -> None:
        opened, turn = self._streams[entry.stream]
        if not entry.code:
            if entry.stream not in self._over:
                # A reader that has seen the end is told nothing when it comes again.
                view = self._views.get((opened.follower, turn))
                told = view and any(sequence <= view.sequence for _, sequence, _ in self._ends.get(turn, ()))
                if not (opened.after and told):
                    self._break(LOST, turn or opened.request, "a stream ended without an end of its turn")
            return
        if entry.reason == "INTERNAL":
            self._break(BROKEN, turn or opened.request, "a stream ended with INTERNAL")
        if opened.other:
            return
        request = self._requests[opened.request]
        if entry.reason == "STORAGE_UNAVAILABLE" and not turn:
            self._unstored.add(opened.request)
        if entry.reason == "TURN_NOT_FOUND":
            self._break(LOST, turn, "a turn that was accepted is not found")
        elif entry.reason == "REQUEST_ID_REUSED" and opened.request in self._reused:
            request.followers[opened.follower] = True  # both calls were under way, and neither was the first
        elif entry.reason == "REQUEST_ID_REUSED":
            self._break(LOST, opened.request, "a repeated call was taken for one with other content")
        elif entry.code not in ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "CANCELLED") and not request.turns:
            request.followers[opened.follower] = True  # refused for good, before anything was accepted

    def _left(self, entry: Left) -> None:
        for request in self._requests.values():
            if entry.follower in request.followers:
                request.followers[entry.follower] = True

    # --- and what was kept ----------------------------------------------------------------------------------------

    def _compare(self) -> None:
        for name, request in self._requests.items():
            self._compare_request(name, request)
        for turn, ends in self._ends.items():
            self._compare_ends(turn, ends)
        for kept in self._kept.values():
            self._check_kept(kept)
        self._check_shown()
        self._check_sessions()
        self._check_isolation()
        self._check_count()
        for turn in self._cancelled:
            kept_turn = self._kept.get(turn)
            if kept_turn is not None and kept_turn.state != "cancelled":
                self._break(MIXED, turn, f"it was told to be cancelled, and is {kept_turn.state}")

    def _compare_request(self, name: str, request: _Request) -> None:
        for follower, served in request.followers.items():
            if not served:
                self._break(LOST, name, f"{follower} was never told an end")
        good = [turn for turn in request.turns if any(end[0] == "completed" for end in self._ends.get(turn, ()))]
        if len(good) > 1:
            self._break(DUPLICATED, name, f"it was answered as {' and '.join(good)}")
        # By number: a reader may hear of the earlier one later.
        for earlier, later in pairwise(sorted(request.turns, key=ordinal_of)):
            if not all(end.kind == "failed" and end.retryable for end in self._ends[earlier].values()):
                self._break(DUPLICATED, name, f"{later} was begun beside {earlier}")
        standing = [kept.turn for kept in self._kept.values() if kept.request == name and not kept.gave_way]
        if len(standing) > 1:
            self._break(DUPLICATED, name, f"it is kept as {' and '.join(standing)}")
        for turn in good:
            end = next(end for end in self._ends[turn].values() if end.kind == "completed")
            if request.answer and end.text != request.answer and end.code != "cancelled":
                self._break(MIXED, turn, f"the answer is {end.text!r} instead of {request.answer!r}")

    def _compare_ends(self, turn: str, ends: dict[tuple[str, int, str], Told]) -> None:
        if len(ends) > 1:
            self._break(DUPLICATED, turn, f"it ended in several ways: {sorted(ends)}")
        kept = self._kept.get(turn)
        if kept is None:
            self._break(LOST, turn, "it ended, and is not kept")
            return
        if kept.gave_way and not kept.events:
            return  # its end could not be stored, and another turn stands in its place
        last = kept.events[-1] if kept.events else None
        for kind, sequence, text in ends:
            if last is None or (last.kind, last.sequence, last.text) != (kind, sequence, text):
                what = DUPLICATED if last is not None and last.kind in _ENDS else LOST
                self._break(what, turn, f"it was told {kind} as {sequence}, and kept is {last}")

    def _check_kept(self, kept: Kept) -> None:
        turn, events = kept.turn, kept.events
        if kept.state == "running":
            self._break(LOST, turn, "it never ended")
        if kept.journal and kept.state != "running":
            self._break(BROKEN, turn, f"it has ended, and {kept.journal} entries of its journal are left")
        for earlier, later in pairwise(events):
            if later.sequence <= earlier.sequence:
                self._break(MIXED, turn, f"{later.sequence} is kept after {earlier.sequence}")
        self._check_epochs(turn, events)
        request = self._requests.get(kept.request)
        if request is not None and request.deadline and events and events[-1].kind == "completed":
            late = events[-1].at - request.deadline
            if late > SLACK:
                self._break(LATE, turn, f"it was completed {late:.2f} s after its deadline")
        if events and events[-1].kind == "completed":
            self._check_answer(kept)

    def _check_epochs(self, turn: str, events: tuple[KeptEvent, ...]) -> None:
        """What one core has shown is void when another one goes on."""
        shown, epoch = False, 0
        for event in events:
            now = (event.sequence - 1) // _EPOCH
            if now != epoch and shown and event.kind == "text_delta":
                self._break(MIXED, turn, f"the core of epoch {now} went on with the text of epoch {epoch}")
            if event.kind in _SAYS:
                shown, epoch = event.kind == "text_delta" or bool(event.text), now

    def _check_answer(self, kept: Kept) -> None:
        """The answer is what its deltas say since the last reset, and what one model said, who read all before."""
        text = ""
        for event in kept.events[:-1]:
            text = event.text if event.kind == "reset" else text + event.text if event.kind == "text_delta" else text
        end = kept.events[-1]
        if text != end.text:
            self._break(MIXED, kept.turn, f"the kept text is {text!r}, and the kept answer {end.text!r}")
        reads = [read for reads in self._reads.values() for read in reads if read.question == kept.request]
        if not reads or end.code == "joined" or (not end.text and kept.state == "cancelled"):
            return
        saying = [read for read in reads if _says(read, end.text, cut=kept.state == "cancelled")]
        if not saying:
            self._break(MIXED, kept.turn, f"no model said {end.text!r}")
        elif (session := self._listed.get(kept.turn.split("/")[1])) is not None:
            before = _history(session, kept.request, self._joined)
            if all(read.history != before for read in saying):
                self._break(OUT_OF_ORDER, kept.turn, f"the model read {saying[0].history} where {before} was said")

    @property
    def _joined(self) -> set[str]:
        """The questions of turns that later ones answer too."""
        return {kept.request for kept in self._kept.values() if kept.events and kept.events[-1].code == "joined"}

    def _check_shown(self) -> None:
        """What a follower saw can be read again."""
        texts: dict[str, dict[int, str]] = {}
        for turn, sequence, shown in self._shown:
            kept = self._kept.get(turn)
            if kept is None or kept.state == "running" or (kept.gave_way and not kept.events):
                continue
            if turn not in texts:
                texts[turn] = _texts(kept.events)
            if texts[turn].get(sequence) != shown and not (self._power_failed and sequence not in texts[turn]):
                self._break(MIXED, turn, f"{sequence} showed {shown!r}, and kept is {texts[turn].get(sequence)!r}")

    def _check_sessions(self) -> None:
        by_session: dict[str, list[Kept]] = defaultdict(list)
        for kept in self._kept.values():
            by_session[kept.turn.split("/")[1]].append(kept)
        for session, turns in by_session.items():
            turns.sort(key=lambda kept: ordinal_of(kept.turn))
            ended = 0.0
            for kept in turns:
                began = _began(kept.events)
                if began is not None and began < ended:
                    self._break(OUT_OF_ORDER, kept.turn, "it was answered before the turn in front of it had ended")
                if began is not None and kept.events:
                    ended = max(ended, kept.events[-1].at)
            self._check_listed(session, turns)
            if turns[-1].request in self._joined:
                self._break(LOST, turns[-1].turn, "it was joined, and no later turn answers it")

    def _check_isolation(self) -> None:
        """What was said in one session is in no other: not shown, not kept, not listed, not read by a model."""
        for turn, _, shown in self._shown:
            self._only_of(turn, turn.split("/")[1], shown)
        for turn, ends in self._ends.items():
            for _, _, text in ends:
                self._only_of(turn, turn.split("/")[1], text)
        for kept in self._kept.values():
            self._only_of(kept.turn, kept.turn.split("/")[1], *(event.text for event in kept.events))
        for listed in self._listed.values():
            self._only_of(listed.session, listed.session, *listed.texts)
        for question, reads in self._reads.items():
            if (request := self._requests.get(question)) is not None:
                self._only_of(question, request.session, *(text for read in reads for text in read.history))

    def _only_of(self, subject: str, session: str, *texts: str) -> None:
        for text in texts:
            for question in _QUESTION.findall(text):
                request = self._requests.get(question)
                if request is not None and request.session not in ("", session):
                    self._break(MIXED, subject, f"it has {question}, which was said in {request.session}: {text!r}")

    def _check_count(self) -> None:
        """Each end that is kept was counted once.

        One may be missing whose caller was told that the turn is not stored, because the store broke off its answer:
        where it was stored all the same, the caller finds it when the call is repeated.
        """
        if self._counted is None:
            return
        ended = [kept.request for kept in self._kept.values() if kept.state != "running" and kept.events]
        least = len(ended) - sum(request in self._unstored for request in ended)
        if not least <= self._counted.turns <= len(ended):
            self._break(
                BROKEN, "metrics", f"the cores have counted {self._counted.turns} turns, and {len(ended)} ended"
            )

    def _check_listed(self, session: str, turns: list[Kept]) -> None:
        listed = self._listed.get(session)
        if listed is None:
            return
        counts = Counter(listed.texts)
        for kept in turns:
            if kept.gave_way:
                continue
            if counts[kept.request] != 1:
                what = DUPLICATED if counts[kept.request] > 1 else LOST
                self._break(what, kept.turn, f"its question is listed {counts[kept.request]} times")
            elif kept.events and kept.events[-1].kind == "completed" and kept.events[-1].text:
                place = listed.texts.index(kept.request) + 1
                if place >= len(listed.texts) or listed.texts[place] != kept.events[-1].text:
                    self._break(LOST, kept.turn, "its answer is not listed behind its question")


def check(history: Iterable[Entry], *, power_failed: bool = False) -> list[Violation]:
    """Return what a history breaks; see `Checker`."""
    return Checker(history, power_failed=power_failed).violations


def _says(read: Read, text: str, *, cut: bool) -> bool:
    return read.answer.startswith(text) if cut else read.answer == text


def _history(session: Listed, question: str, joined: Collection[str]) -> tuple[str, ...]:
    """Return what was said in a session before a question: questions that were answered or joined, and answers."""
    place = session.texts.index(question) if question in session.texts else 0
    before = session.texts[:place]
    said: list[str] = []
    for index, text in enumerate(before):
        if _is_question(text) and index + 1 < len(session.texts) and not _is_question(session.texts[index + 1]):
            said += (text, session.texts[index + 1])
        elif text in joined:
            said.append(text)
    return tuple(said)


def _is_question(text: str) -> bool:
    return _QUESTION.match(text) is not None


def _texts(events: tuple[KeptEvent, ...]) -> dict[int, str]:
    """Return the text that is shown after each delta."""
    text, texts = "", {}
    for event in events:
        if event.kind == "reset":
            text = event.text
        elif event.kind == "text_delta":
            text += event.text
            texts[event.sequence] = text
    return texts


def _began(events: tuple[KeptEvent, ...]) -> float | None:
    """Return when the text that stands in the end began."""
    began = None
    for event in events:
        if event.kind == "reset":
            began = None
        elif event.kind == "text_delta" and began is None:
            began = event.at
    return began
