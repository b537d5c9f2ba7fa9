"""Who is served next and who is refused, with a clock of the tests."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from time import perf_counter

import pytest
from moltbot_server.errors import QueueFull
from moltbot_server.models.engines.local.admission import PATIENCE, Admission
from moltbot_server.models.engines.local.batches import Batch
from moltbot_server.models.engines.local.costs import Costs, share
from moltbot_server.models.engines.local.fair_queue import FairQueue
from moltbot_server.models.engines.local.rows import Row, Sampling
from moltbot_server.models.engines.local.shares import Backlog, Shares
from moltbot_server.models.engines.local.waiting import Waiting


def row(workspace: str = "w", session: str = "", cost: float = 1.0, deadline: float | None = None) -> Row:
    made = Row(["<s>"], Sampling(), 10, workspace=workspace, session=session, deadline=deadline)
    made.cost = cost
    return made


def filled(rows: Sequence[Row], weights: dict[str, float] | None = None) -> FairQueue:
    queue = FairQueue(weights)
    for each in rows:
        queue.put(each)
    return queue


def serve(queue: FairQueue, count: int) -> list[Row]:
    """Serve one row after the other."""
    served = []
    for _ in range(count):
        first = next(queue.walk())
        queue.take([first])
        served.append(first)
    return served


def test_rows_of_one_session_are_served_in_their_order() -> None:
    rows = [row(session="s") for _ in range(5)]
    assert serve(filled(rows), 5) == rows


def test_rows_without_a_session_count_as_one_session_each() -> None:
    talker = [row(session="s") for _ in range(3)]
    newcomers = [row() for _ in range(3)]
    queue = filled([*talker, *newcomers])
    assert serve(queue, 4) == [talker[0], *newcomers]


def test_workspaces_that_wait_are_served_in_turns_however_much_one_asks() -> None:
    loud, quiet = [row("loud") for _ in range(500)], [row("quiet") for _ in range(3)]
    served = serve(filled([*loud, *quiet]), 6)
    assert Counter(each.workspace for each in served) == {"loud": 3, "quiet": 3}


def test_sessions_of_one_workspace_are_served_in_turns() -> None:
    rows = [row(session="loud") for _ in range(50)] + [row(session="a"), row(session="b")]
    assert [each.session for each in serve(filled(rows), 4)] == ["loud", "a", "b", "loud"]


def test_a_workspace_of_twice_the_weight_gets_twice_as_much() -> None:
    queue = filled([row(name) for name in ("a", "b") for _ in range(100)], {"a": 2.0})
    assert Counter(each.workspace for each in serve(queue, 60)) == {"a": 40, "b": 20}


@pytest.mark.parametrize("weight", [0.0, -1.0])
def test_a_weight_that_would_starve_a_workspace_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        FairQueue({"w": weight})


def test_what_is_shared_is_the_time_of_the_replicas_and_not_the_number_of_answers() -> None:
    queue = filled([row("long", cost=5.0) for _ in range(50)] + [row("short", cost=1.0) for _ in range(50)])
    served = Counter(each.workspace for each in serve(queue, 48))
    assert served == {"long": 8, "short": 40}


def test_an_answer_that_took_more_than_was_expected_is_paid_for_afterwards() -> None:
    queue = filled([row(name) for name in ("a", "b") for _ in range(10)])
    first, second = serve(queue, 2)
    assert [first.workspace, second.workspace] == ["a", "b"]
    queue.charge(first, 3.0)
    assert [each.workspace for each in serve(queue, 4)] == ["b", "b", "b", "a"]


def test_who_paused_has_saved_nothing_up() -> None:
    queue = filled([row("busy") for _ in range(100)] + [row("now and then")])
    serve(queue, 50)
    for _ in range(20):
        queue.put(row("now and then"))
    assert Counter(each.workspace for each in serve(queue, 20))["busy"] >= 9


def test_a_session_that_speaks_again_is_not_starved_by_ever_new_ones() -> None:
    queue = filled([row(session="again")])
    serve(queue, 1)
    for _ in range(3):
        queue.put(row())
    again = row(session="again")
    queue.put(again)
    served: list[Row] = []
    while again not in served and len(served) < 50:
        queue.put(row())
        served += serve(queue, 1)
    assert len(served) <= 8


def test_a_row_is_put_back_before_those_of_its_session() -> None:
    rows = [row(session="s") for _ in range(3)]
    queue = filled(rows)
    (first,) = serve(queue, 1)
    queue.put(first, first=True)
    assert serve(queue, 3) == rows


def test_walking_says_what_serving_does() -> None:
    chance = random.Random(3)
    rows = [row(chance.choice("abc"), chance.choice("123"), chance.uniform(0.1, 5)) for _ in range(200)]
    queue = filled(rows, {"b": 3.0})
    expected = list(queue.walk())
    assert serve(queue, 200) == expected
    assert len(queue) == 0
    assert set(expected) == set(rows)


def test_a_row_that_left_is_not_served() -> None:
    rows = [row(session="s"), row(session="s"), row("v")]
    queue = filled(rows)
    assert queue.remove(rows[0])
    assert not queue.remove(rows[0])
    assert (len(queue), queue.count("w"), queue.count("v"), queue.workspaces) == (2, 1, 1, 2)
    assert serve(queue, 2) == [rows[1], rows[2]]


def test_late_rows_are_dropped_unless_they_had_begun() -> None:
    late, begun, early, patient = row(deadline=5.0), row(deadline=5.0), row(deadline=9.0), row()
    begun.began = 1.0
    queue = filled([late, begun, early, patient])
    assert queue.expired(4.9, 100) == []
    assert queue.expired(5.0, 100) == [late]
    assert len(queue) == 3


def test_what_is_ahead_is_what_would_be_served_before() -> None:
    queue = filled([row("loud") for _ in range(100)])
    assert queue.ahead("loud", "") == pytest.approx(100)
    assert queue.ahead("quiet", "") <= 1.5
    for _ in range(10):
        queue.put(row("third"))
    queue.put(row("quiet"))
    assert 2 <= queue.ahead("quiet", "") <= 6
    assert queue.ahead("loud", "") == pytest.approx(111)


def test_the_memory_of_past_sessions_and_workspaces_is_bounded() -> None:
    queue = filled([row("w", "stays")])
    for index in range(3000):
        queue.put(row("w", f"s{index}"))
        queue.put(row(f"w{index}"))
        serve(queue, 2)
    assert len(queue._workspaces["w"].sessions) < 600
    serve(queue, len(queue))
    assert queue._workspaces == {}


def test_walking_a_long_queue_takes_no_longer_than_its_length_asks() -> None:
    def seconds(count: int) -> float:
        queue = filled([row(f"w{index % 50}", f"s{index % 400}") for index in range(count)])
        begun = perf_counter()
        assert len(list(queue.walk())) == count
        return perf_counter() - begun

    assert min(seconds(8000) for _ in range(3)) < 40 * min(seconds(800) for _ in range(3))


# --- admission ---------------------------------------------------------------------------------------------------


def admission(queue: FairQueue, limit: int = 100, replicas: int = 1) -> Admission:
    made = Admission(queue, limit=limit, replicas=replicas)
    made.measured(2.0, 2.0, crowded=True)  # a batch takes two seconds, as was expected
    return made


def refusal(gate: Admission, workspace: str = "w", deadline: float | None = None, now: float = 0.0) -> QueueFull:
    with pytest.raises(QueueFull) as caught:
        gate.check(workspace, "", deadline, now)
    return caught.value


def test_what_can_begin_before_its_deadline_is_let_in_and_what_cannot_is_not() -> None:
    gate = admission(filled([row() for _ in range(10)]), replicas=2)
    gate.check("w", "", 105.5, 100.0)
    error = refusal(gate, deadline=104.0, now=100.0)
    assert error.retry_after == pytest.approx(1.0)
    assert "after the deadline" in error.message


def test_a_newcomer_is_let_in_where_a_flood_could_not_begin_in_time() -> None:
    gate = admission(filled([row("loud") for _ in range(50)]))
    gate.check("quiet", "", 5.0, 0.0)
    refusal(gate, "loud", deadline=5.0)


def test_the_expected_wait_follows_what_was_measured() -> None:
    queue = filled([row() for _ in range(10)])
    gate = admission(queue)
    assert gate.wait("w", "") == pytest.approx(10)
    for _ in range(200):
        gate.measured(3.0, 1.0, crowded=True)
        gate.measured(9.0, 1.0, crowded=False)
    assert gate.wait("w", "") == pytest.approx(30, rel=0.01)


def test_without_a_deadline_nobody_has_to_wait_beyond_patience() -> None:
    queue = filled([row(cost=PATIENCE / 10) for _ in range(10)])
    gate = admission(queue)
    gate.check("w", "", None, 0.0)
    queue.put(row(cost=PATIENCE / 10))
    error = refusal(gate)
    assert error.retry_after == 30.0


def test_a_burst_may_fill_the_queue_and_a_flood_only_keeps_the_replicas_busy() -> None:
    queue = FairQueue()
    gate = admission(queue, limit=20)
    for _ in range(20):
        gate.check("w", "", None, 0.0)
        queue.put(row())
    assert refusal(gate).retry_after == pytest.approx(10)
    now = 0.0
    for _ in range(40):  # each second one row is served and three come
        serve(queue, 1)
        now += 1.0
        for _ in range(3):
            with suppress(QueueFull):
                gate.check("w", "", None, now)
                queue.put(row())
    assert len(queue) == 3, "a round of two seconds is waited for, and one row is in between"
    serve(queue, 3)
    now += 9.0
    for _ in range(20):
        gate.check("w", "", None, now)
        queue.put(row())
    refusal(gate, now=now)


def test_a_flood_of_one_workspace_is_none_of_another() -> None:
    queue = filled([row("loud") for _ in range(20)])
    gate = admission(queue, limit=20)
    refusal(gate, "loud")
    for _ in range(5):
        gate.check("quiet", "", None, 0.1)
        queue.put(row("quiet"))


def test_a_full_queue_has_room_for_who_has_less_than_a_share_of_it() -> None:
    queue = filled([row("loud") for _ in range(20)])
    gate = admission(queue, limit=20)
    refusal(gate, "loud")
    for _ in range(7):
        gate.check("quiet", "", None, 0.0)
        queue.put(row("quiet"))
    refusal(gate, "quiet")
    for name in ("c", "d", "e", "f", "g", "h"):
        for _ in range(20):
            try:
                gate.check(name, "", None, 0.0)
            except QueueFull:
                break
            queue.put(row(name))
    assert len(queue) <= 40
    assert queue.count("h") >= 1


def test_a_full_queue_has_room_for_a_session_that_has_nothing_waiting() -> None:
    queue = filled([row(session="loud", cost=0.1) for _ in range(20)])
    gate = admission(queue, limit=20)
    refusal(gate)
    with pytest.raises(QueueFull):
        gate.check("w", "loud", None, 0.1)
    for name in "abcde":
        gate.check("w", name, None, 0.1)
        queue.put(row(session=name, cost=0.1))
    with pytest.raises(QueueFull):
        gate.check("w", "f", None, 0.1)


def test_a_refusal_costs_next_to_nothing() -> None:
    queue = filled([row(f"w{index % 50}", f"s{index}") for index in range(256)])
    gate = admission(queue, limit=256)
    begun = perf_counter()
    for _ in range(1000):
        refusal(gate, "w1")
    assert perf_counter() - begun < 1.0


# --- shares ------------------------------------------------------------------------------------------------------


def backlogs(*askers: str | tuple[str, str]) -> Backlog:
    """Workspaces that have a backlog, and sessions, each with its workspace."""
    return lambda workspace, session: (workspace if session is None else (workspace, session)) in askers


LOUD = backlogs("loud", ("loud", "s"))


def active(*askers: tuple[str, str], at: float = 0.0, replicas: int = 2) -> Shares:
    shared = Shares(replicas)
    shared.remember(0.1)
    for workspace, session in askers:
        shared.asked(workspace, session, at)
    return shared


def test_a_workspace_alone_crowds_nobody() -> None:
    shared = active(("loud", "s"))
    assert not shared.crowds("loud", "s", 0.0, LOUD)


def test_who_has_a_backlog_beside_others_crowds_them_until_they_have_left() -> None:
    shared = active(("loud", "s"), ("quiet", "s"))
    assert shared.crowds("loud", "s", 0.1, LOUD)
    assert not shared.crowds("quiet", "s", 0.1, LOUD)
    assert not shared.crowds("loud", "s", 0.1, backlogs()), "a backlog of less than a batch hurts nobody"
    assert not shared.crowds("loud", "s", 0.9, LOUD), "eight batches later the others count as gone"


def test_those_who_all_have_a_backlog_crowd_nobody() -> None:
    shared = active(("a", "s"), ("b", "s"))
    assert not shared.crowds("a", "s", 0.0, backlogs("a", "b", ("a", "s"), ("b", "s")))


def test_a_session_crowds_the_others_of_its_workspace() -> None:
    shared = active(("w", "loud"), ("w", "quiet"))
    backlog = backlogs("w", ("w", "loud"))
    assert shared.crowds("w", "loud", 0.0, backlog)
    assert not shared.crowds("w", "quiet", 0.0, backlog)


def test_many_sessions_that_are_one_workspaces_backlog_crowd_other_workspaces_only() -> None:
    shared = active(("w", "a"), ("w", "b"))
    assert not shared.crowds("w", "a", 0.0, backlogs("w"))
    shared.asked("other", "s", 0.0)
    assert shared.crowds("w", "a", 0.0, backlogs("w"))


def test_who_crowds_begins_a_batch_only_beside_a_free_replica_and_while_the_others_are_quiet() -> None:
    shared = active(("quiet", "s"), ("loud", "s"))
    shared.took("loud", "s", 0.1)
    assert not shared.may_lead("loud", "s", 0.15, 2, LOUD), "somebody asked a moment ago"
    assert shared.may_lead("loud", "s", 0.3, 2, LOUD)
    assert not shared.may_lead("loud", "s", 0.3, 1, LOUD), "the last free replica is the others'"
    assert shared.may_lead("loud", "s", 1.2, 1, LOUD), "not served for a second"


def test_a_session_that_crowds_waits_for_no_longer_than_a_second_though_its_workspace_is_served() -> None:
    shared = active(("w", "quiet"), ("w", "loud"))
    backlog = backlogs("w", ("w", "loud"))
    shared.took("w", "loud", 0.0)
    for tenth in range(1, 11):
        shared.asked("w", "quiet", tenth / 10)
        shared.took("w", "quiet", tenth / 10)
    assert not shared.may_lead("w", "loud", 0.9, 1, backlog)
    assert shared.may_lead("w", "loud", 1.1, 1, backlog)


def test_with_one_replica_who_crowds_has_what_the_others_leave() -> None:
    shared = active(("quiet", "s"), ("loud", "s"), replicas=1)
    shared.took("loud", "s", 0.0)
    assert shared.may_lead("loud", "s", 0.0, 1, LOUD)


def test_who_asked_lately_is_known_and_the_memory_is_bounded() -> None:
    shared = active(("w", "s"))
    assert shared.knows("w", "s")
    assert not shared.knows("w", "other")
    for index in range(5000):
        shared.asked(f"w{index}", "s", index / 10)
        shared.asked("w", f"s{index}", index / 10)
    assert not shared.knows("w", "s")
    assert len(shared) <= 102


def test_the_rows_of_some_are_walked_in_their_order() -> None:
    rows = [row("loud", "one"), row("loud", "two"), row("quiet"), row("loud", "two")]
    queue = filled(rows)
    assert list(queue.walk(lambda workspace, session: (workspace, session) != ("loud", "two"))) == [rows[0], rows[2]]
    assert queue.count_of("loud", "two") == 2
    assert queue.count_of("loud", "none") == queue.count_of("none", "s") == 0


# --- how long an answer is ----------------------------------------------------------------------------------------


def expected(waiting: Waiting, limit: int = 1000) -> float:
    """Return what a row is expected to cost that comes now."""
    newcomer = Row(["p"] * 10, Sampling(), limit)
    waiting.put(newcomer)
    waiting.remove(newcomer)
    return newcomer.cost


def test_the_first_answers_tell_at_once_how_long_answers_are() -> None:
    waiting = Waiting(limit=10, replicas=1, batch=4)
    before = expected(waiting)
    for _ in range(3):
        waiting.answered(400, cut=False)
    assert expected(waiting) == pytest.approx(expected_of(400), rel=0.05)
    assert expected(waiting) > 3 * before
    for _ in range(20):
        waiting.answered(10, cut=False)
    assert expected(waiting) < 0.5 * expected_of(400)


def test_an_answer_that_was_cut_short_does_not_tell_that_answers_are_short() -> None:
    waiting = Waiting(limit=10, replicas=1, batch=4)
    before = expected(waiting)
    for _ in range(20):
        waiting.answered(8, cut=True)
    assert expected(waiting) == before
    for _ in range(20):
        waiting.answered(200, cut=True)
    assert expected(waiting) > 2 * before


def test_long_answers_under_way_are_reckoned_with_before_the_first_of_them_has_ended() -> None:
    waiting = Waiting(limit=10, replicas=1, batch=4)
    before = expected(waiting)
    waiting.under_way([200, 200, 3])
    assert expected(waiting) > 2 * before
    assert expected(waiting, limit=8) < before, "nobody gets more than he asked for"
    waiting.under_way([3, 3, 200])
    assert expected(waiting) > 2 * before


def test_what_a_model_took_to_wake_up_is_forgotten() -> None:
    waiting = Waiting(limit=10, replicas=1, batch=1)
    before = expected(waiting)
    batch = Batch(rows=[Row(["p"] * 10, Sampling(), 1)])
    waiting.ended(batch, 0.0, 30.0, 60.0)
    assert expected(waiting) > 10 * before
    waiting.forget()
    assert expected(waiting) == before


def expected_of(tokens: int) -> float:
    """Return what a row costs that writes so many tokens, with nothing known."""
    return Costs()(share(10, tokens, 4))
