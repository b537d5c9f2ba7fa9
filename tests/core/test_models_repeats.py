"""Cutting down what is said over and over: only what repeats too often goes, and the rest stays in its order."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moltbot_server.models.repeats import without_repeats


@pytest.mark.parametrize(
    ("said", "most", "kept"),
    [
        ("a b c", 2, "a b c"),
        ("a a b", 2, "a a b"),
        ("a a a b", 2, "a a b"),
        ("a a a b a a a", 2, "a a b a a"),
        ("a b a b a b c", 2, "a b a b c"),
        ("x a b c a b c a b c a b c y", 3, "x a b c a b c a b c y"),
        ("a a b b a a b b a a b b a a b b", 2, "a a b b a a b b"),
        ("", 2, ""),
    ],
)
def test_what_stands_too_often_in_a_row_is_kept_as_often_as_it_may(said: str, most: int, kept: str) -> None:
    assert without_repeats(said.split(), most) == tuple(kept.split())


def test_a_long_run_of_many_tokens_is_found_and_one_of_more_than_can_be_looked_for_stays() -> None:
    sentence, longer = [f"w{n}" for n in range(32)], [f"w{n}" for n in range(33)]

    assert without_repeats(sentence * 9, 2) == tuple(sentence * 2)
    assert without_repeats(longer * 9, 2) == tuple(longer * 9)


@given(st.lists(st.sampled_from("abc"), max_size=60), st.integers(1, 4))
def test_no_single_token_is_left_too_often_in_a_row_and_what_needs_no_cut_stays(tokens: list[str], most: int) -> None:
    kept = without_repeats(tokens, most)

    assert all(any(kept[at] != token for token in kept[at : at + most + 1]) for at in range(len(kept) - most))
    assert set(kept) == set(tokens)
    assert len(kept) == len(tokens) or max(map(tokens.count, tokens)) > most


def test_a_text_without_repeats_costs_next_to_nothing() -> None:
    tokens = [str(number) for number in random.Random(1).sample(range(100_000), 20_000)]

    assert without_repeats(tokens, 2) == tuple(tokens)
