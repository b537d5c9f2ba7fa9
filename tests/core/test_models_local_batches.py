"""Which rows are written together, what that costs, and which beginnings of prompts are kept."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from moltbot_server.demo_model import ARTIFACT
from moltbot_server.models.engines.local.batches import LOOKED_AT, SLOWER, Batch, joined_by, together
from moltbot_server.models.engines.local.costs import Costs, Shape, Terms, share
from moltbot_server.models.engines.local.leads import Leads
from moltbot_server.models.engines.local.rows import Row, Sampling
from moltbot_server.models.engines.local.weights import context_bytes
from moltbot_server.turns import Message, Role, TextPart

GREEDY = Sampling()


def row(size: int, sampling: Sampling = GREEDY, lead: tuple[str, ...] = (), limit: int = 64) -> Row:
    return Row([*lead, *["x"] * (size - len(lead))], sampling, limit, lead=lead)


def lengths(batch: Batch) -> list[int]:
    return [len(each.prompt) for each in batch.rows]


def gathered(sizes: Sequence[int], most: int = 8) -> list[int]:
    return lengths(together([row(size) for size in sizes], most, Costs(), 64))


def test_rows_of_one_length_share_a_batch() -> None:
    assert gathered([128] * 20) == [128] * 8


def test_a_batch_begins_with_who_is_next_and_passes_over_who_would_make_it_slow() -> None:
    assert gathered([100, 500, 104, 16, 98, 510, 110]) == [100, 104, 98, 110]


def test_a_short_prompt_is_not_written_with_a_long_one_even_when_nobody_else_waits() -> None:
    assert gathered([16, 500]) == [16]
    assert gathered([500, 16]) == [500]


def test_two_prompts_that_differ_little_are_written_together_when_nobody_else_waits() -> None:
    assert gathered([128, 160]) == [128, 160]


def test_rows_of_other_sampling_are_passed_over() -> None:
    warm = Sampling(topk=0, temperature=0.7)
    batch = together(
        [row(20, warm), row(20), row(20, warm), row(20, Sampling(topk=0, temperature=0.8))], 8, Costs(), 64
    )
    assert [each.sampling for each in batch.rows] == [warm, warm]


def test_a_repetition_penalty_is_shared_by_equal_lengths_only() -> None:
    penalty = Sampling(repetition_penalty=1.2)
    rows = [row(20, penalty), row(21, penalty), row(20, penalty), row(20)]
    assert together(rows, 8, Costs(), 64).rows == [rows[0], rows[2]]


def test_a_prompt_of_one_token_is_written_with_its_like_only() -> None:
    assert gathered([1, 2, 1, 3]) == [1, 1]
    assert gathered([2, 1, 2]) == [2, 2]


def test_of_a_long_queue_only_the_front_is_looked_at() -> None:
    assert gathered([100] + [500] * (LOOKED_AT - 1) + [100]) == [100]


def test_a_batch_reads_only_what_comes_after_a_beginning_that_all_share() -> None:
    lead = tuple(f"s{index}" for index in range(200))
    rows = [row(210, lead=lead), row(214, lead=lead), row(211, lead=lead)]
    batch = together(rows, 8, Costs(), 64)
    assert (batch.lead, batch.sizes, batch.rows) == (lead, [10, 14, 11], rows)


def test_a_kept_beginning_is_given_up_where_it_would_leave_the_batch_empty() -> None:
    leads = [tuple(f"{name}{index}" for index in range(12)) for name in "abcdefgh"]
    batch = together([row(30, lead=lead) for lead in leads], 8, Costs(), 64)
    assert (len(batch.rows), batch.lead, batch.sizes) == (8, (), [30] * 8)


# --- costs -------------------------------------------------------------------------------------------------------

TRUE: Terms = (0.1e-3, 0.9e-6, 4e-3, 0.4e-3, 0.03e-3)


def seconds_of(terms: Terms) -> float:
    return sum(term * second for term, second in zip(terms, TRUE, strict=True))


def learn(costs: Costs, shape: Shape, noise: random.Random) -> None:
    """Learn from a batch as the engine does: until its first token, and from there to its end."""
    first, terms = shape.first_terms, shape.terms
    rest = (0.0, 0.0, terms[2] - first[2], terms[3] - first[3], terms[4] - first[4])
    for part in (first, rest) if rest[2] > 3 else (first,):
        costs.learn(part, seconds_of(part) * noise.uniform(0.9, 1.1))


def test_costs_are_learned_from_batches_of_all_kinds() -> None:
    chance, costs = random.Random(5), Costs()
    for _ in range(400):
        shape = Shape(chance.choice([0, 0, 100]))
        for _ in range(chance.randint(1, 8)):
            shape.add(chance.randint(4, 500), chance.randint(1, 100))
        learn(costs, shape, chance)
    costs.fit()
    for terms in (share(prompt, 64, rows) for rows in (1, 8) for prompt in (16, 128, 500)):
        assert costs(terms) == pytest.approx(seconds_of(terms), rel=0.15)


def test_what_was_never_measured_is_guessed_within_reason() -> None:
    chance, costs = random.Random(6), Costs()
    for _ in range(400):
        shape = Shape()
        for _ in range(8):
            shape.add(128, 64)
        learn(costs, shape, chance)
    costs.fit()
    for terms in (share(prompt, 64, rows) for rows in (1, 8) for prompt in (16, 500)):
        assert 0.3 < costs(terms) / seconds_of(terms) < 3


def test_one_batch_is_enough_to_know_the_scale() -> None:
    costs, model = Costs(), Costs()
    shape = Shape()
    shape.add(20, 8)
    costs.learn(shape.terms, model(shape.terms) / 100)
    costs.fit()
    other = share(300, 64, 8)
    assert costs(other) == pytest.approx(model(other) / 100, rel=0.01)


def test_no_term_is_ever_free() -> None:
    costs = Costs()
    for _ in range(500):
        costs.learn((0, 0, 1, 8, 8 * 100), 0.001)
        costs.learn((0, 0, 1, 1, 100), 0.002)
    costs.fit()
    assert all(second > 0 for second in costs._seconds)


def test_a_shape_counts_what_a_ragged_batch_does() -> None:
    shape = Shape(lead=10)
    shape.add(5, 3)
    assert shape.with_row(9, 2).terms == (10, 10 * 12.5, 6, 3 + 6, 3 * (15 + 1.5) + 6 * (15 + 3))
    assert shape.terms == (5, 5 * 12.5, 3, 3, 3 * 16.5)


# --- kept beginnings ---------------------------------------------------------------------------------------------


def conversation(system: str, question: str = "hello") -> list[Message]:
    said = ((Role.SYSTEM, system), (Role.USER, question))
    return [Message(role=role, parts=(TextPart(text=text),)) for role, text in said]


def prompt(messages: Sequence[Message]) -> list[str]:
    """Cut a conversation into characters."""
    return ["<s>", *(part for each in messages for part in (f"<{each.role}>", *each.text)), "<bot>"]


def kept(leads: Leads, system: str, times: int) -> tuple[str, ...]:
    found: tuple[str, ...] = ()
    for index in range(times):
        messages = conversation(system, f"q{index}")
        found = leads.of(messages, prompt(messages))
    return found


def test_a_system_prompt_is_kept_when_it_was_asked_three_times() -> None:
    leads = Leads(prompt, 1000)
    assert kept(leads, "be helpful", 2) == ()
    lead = kept(leads, "be helpful", 1)
    assert lead == ("<s>", "<system>", *"be helpful", "<user>")
    assert kept(leads, "be helpful", 1) is lead
    assert len(leads) == 1


def test_a_conversation_without_a_system_prompt_keeps_nothing() -> None:
    leads = Leads(prompt, 1000)
    messages = [Message(role=Role.USER, parts=(TextPart(text="a question that is long enough"),))]
    assert {leads.of(messages, prompt(messages)) for _ in range(50)} == {()}


def test_a_beginning_too_short_to_matter_is_not_kept() -> None:
    assert kept(Leads(prompt, 1000), "be", 50) == ()


def test_the_number_of_kept_beginnings_is_bounded_and_the_last_places_are_hard_to_get() -> None:
    leads = Leads(prompt, 10_000, most=4)
    for index in range(30):
        kept(leads, f"system prompt {index}", 5)
    assert len(leads) == 1, "the second place asks for six times"
    for index in range(30):
        kept(leads, f"often asked {index}", 100)
    assert len(leads) == 4


def test_the_tokens_of_kept_beginnings_are_bounded_together() -> None:
    leads = Leads(prompt, 100)
    assert kept(leads, "a" * 60, 100)
    assert kept(leads, "b" * 60, 100) == ()
    assert kept(leads, "c" * 20, 100)
    assert kept(Leads(prompt, 0), "a" * 60, 100) == ()


def test_a_thousand_other_system_prompts_make_room_for_themselves_only() -> None:
    leads = Leads(prompt, 1000)
    lead = kept(leads, "be helpful", 3)
    for index in range(1000):
        kept(leads, f"written by a program, number {index}", 1)
    assert kept(leads, "be helpful", 1) is lead
    assert len(leads._seen) <= 256


def test_a_prompt_that_begins_otherwise_is_sent_as_it_is() -> None:
    leads = Leads(prompt, 1000)
    kept(leads, "be helpful", 3)
    assert leads.of(conversation("be helpful"), list("something else that the template made of it")) == ()


def test_after_a_kept_beginning_two_tokens_are_left_to_read() -> None:
    leads = Leads(prompt, 1000)
    lead = kept(leads, "be helpful", 3)
    assert leads.of(conversation("be helpful"), [*lead, "?"]) == ()
    assert leads.of(conversation("be helpful"), [*lead, "?", "<bot>"]) is lead


def test_the_weights_say_what_a_token_of_context_takes(tmp_path: Path) -> None:
    assert context_bytes(ARTIFACT / "model.bin") == 3 * 2 * 160 * 4
    (tmp_path / "model.bin").write_bytes((ARTIFACT / "model.bin").read_bytes()[:1000])
    assert context_bytes(tmp_path / "model.bin") is None
    assert context_bytes(tmp_path / "nothing.bin") is None


def test_those_who_crowd_ride_along_as_long_as_that_costs_the_others_little() -> None:
    costs = Costs()
    for_others = together([row(64), row(64)], 8, costs, 64)
    joined = joined_by([row(64) for _ in range(20)], for_others, 8, costs, 64)
    assert joined.rows[:2] == for_others.rows
    assert 2 < len(joined.rows) < 8
    alone, beside = (costs(shape_of(batch).terms) for batch in (for_others, joined))
    assert beside <= SLOWER * alone


def test_nobody_rides_along_who_could_not_be_written_in_the_batch() -> None:
    batch = together([row(64), row(64)], 8, Costs(), 64)
    strangers = [row(64, sampling=Sampling(topk=5)), row(900), row(64, lead=("a",))]
    assert [len(each.prompt) for each in joined_by(strangers, batch, 8, Costs(), 64).rows] == [64, 64, 64]
    full = together([row(64) for _ in range(8)], 8, Costs(), 64)
    assert joined_by([row(64)], full, 8, Costs(), 64) is full


def shape_of(batch: Batch) -> Shape:
    """Return the sizes of a batch whose answers have 64 tokens."""
    shape = Shape(len(batch.lead))
    for size in batch.sizes:
        shape.add(size, 64)
    return shape
