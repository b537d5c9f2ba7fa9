"""Fitting conversations into a context."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moltbot_server.errors import ContextLengthExceeded
from moltbot_server.models.context import MARGIN, ContextWindow, answer_reserve
from moltbot_server.turns import GenerationOptions, Message, Role, TextPart

ASK = GenerationOptions()


def said(role: Role, size: int, turn: int = 0) -> Message:
    return Message(role=role, parts=(TextPart(text="x" * size),), turn=turn)


def count(message: Message) -> int:
    return len(message.text)


def turns(sizes: list[int]) -> list[Message]:
    return [said(role, size, turn) for turn, size in enumerate(sizes) for role in (Role.USER, Role.ASSISTANT)]


def test_a_history_that_fits_is_sent_whole() -> None:
    history = turns([10, 20])
    window = ContextWindow.of(history, count, 400)
    system, newest = said(Role.SYSTEM, 5), said(Role.USER, 7)
    fitted = window.fit(newest, ASK, [system])
    assert fitted == ([system, *history, newest], 72, 0, 4)


def test_the_oldest_turns_go_first_and_only_whole() -> None:
    history = turns([50, 50, 50])
    system, newest = said(Role.SYSTEM, 20), said(Role.USER, 30)
    fitted = ContextWindow.of(history, count, 400).fit(newest, ASK, [system])
    room = 400 - 100 - MARGIN - 50
    assert 200 <= room < 300
    assert fitted == ([system, *history[2:], newest], 250, 2, 4)


def test_the_answers_room_is_what_was_asked_for_up_to_half() -> None:
    assert answer_reserve(400, ASK) == 100
    assert answer_reserve(400, GenerationOptions(max_output_tokens=10)) == 10
    assert answer_reserve(400, GenerationOptions(max_output_tokens=100_000)) == 200


def test_a_message_that_leaves_no_room_for_an_answer_is_refused() -> None:
    window = ContextWindow(count, 400)
    window.fit(said(Role.USER, 300 - MARGIN), ASK)
    with pytest.raises(ContextLengthExceeded, match="takes 285 tokens with the system prompt; the model reads 400"):
        window.fit(said(Role.USER, 300 - MARGIN + 1), ASK)
    window.fit(said(Role.USER, 300 - MARGIN + 1), GenerationOptions(max_output_tokens=20))
    with pytest.raises(ContextLengthExceeded):
        window.fit(said(Role.USER, 200), ASK, [said(Role.SYSTEM, 200)])


def test_one_long_message_does_not_cost_the_history_for_good() -> None:
    history = turns([40, 40])
    window = ContextWindow.of(history, count, 400)
    assert window.fit(said(Role.USER, 200), ASK).trimmed_messages == 2
    assert window.fit(said(Role.USER, 2), ASK).trimmed_messages == 0


def test_a_turn_counts_its_own_messages_only() -> None:
    counted: list[Message] = []

    def noting(message: Message) -> int:
        counted.append(message)
        return len(message.text)

    window = ContextWindow.of(turns([9] * 5000), noting, 2000)
    assert len(counted) < 240
    counted.clear()
    for turn in range(500):
        newest = said(Role.USER, 9, turn)
        window.fit(newest, ASK)
        window.extend([newest, said(Role.ASSISTANT, 9, turn)])
    assert len(counted) == 1500
    assert window.tokens <= 2000
    assert window.fit(newest, ASK).trimmed_messages + window.fit(newest, ASK).history_messages == 11_000


sizes = st.integers(1, 60)


@given(history=st.lists(sizes, max_size=30), new=sizes, system=st.none() | sizes, asked=st.none() | st.integers(1, 500))
def test_whatever_is_sent_fits_and_is_the_end_of_the_history(
    history: list[int], new: int, system: int | None, asked: int | None
) -> None:
    options = GenerationOptions(max_output_tokens=asked)
    messages = turns(history)
    at_once = ContextWindow.of(messages, count, 300)
    grown = ContextWindow(count, 300)
    for index in range(0, len(messages), 2):
        grown.extend(messages[index : index + 2])
    newest = said(Role.USER, new)
    systems = [] if system is None else [said(Role.SYSTEM, system)]
    try:
        fitted = at_once.fit(newest, options, systems)
    except ContextLengthExceeded:
        assert new + (system or 0) + answer_reserve(300, options) + MARGIN > 300
        return
    assert fitted == grown.fit(newest, options, systems)
    assert sum(map(count, fitted.messages)) == fitted.tokens
    assert fitted.tokens + answer_reserve(300, options) + MARGIN <= 300
    kept = fitted.messages[len(systems) : -1]
    assert kept == messages[len(messages) - len(kept) :]
    assert not kept or kept[0].role is Role.USER
    assert (fitted.history_messages, fitted.trimmed_messages) == (len(kept), len(messages) - len(kept))
    if fitted.trimmed_messages:
        more = count(messages[-len(kept) - 1]) + count(messages[-len(kept) - 2])
        assert sum(map(count, fitted.messages)) + more + answer_reserve(300, options) + MARGIN > 300


def test_system_messages_at_the_head_of_a_conversation_stay() -> None:
    head = [said(Role.SYSTEM, 5), said(Role.SYSTEM, 6)]
    history = turns([60, 60, 60])
    system, newest = said(Role.SYSTEM, 1), said(Role.USER, 7)
    window = ContextWindow.of([*head, *history], count, 400)
    assert window.fit(newest, ASK, [system]) == ([system, *head, *history[2:], newest], 259, 2, 6)
    assert window.messages == [*head, *history]
    assert ContextWindow.of(head, count, 400).fit(newest, ASK) == ([*head, newest], 18, 0, 2)
    with pytest.raises(ContextLengthExceeded):
        ContextWindow.of([said(Role.SYSTEM, 500)], count, 400).fit(newest, ASK)


def test_what_a_prompt_takes_beside_its_messages_is_kept_free() -> None:
    window = ContextWindow.of(turns([10] * 20), count, 400)
    options = GenerationOptions(max_output_tokens=10)
    usual = window.fit(said(Role.USER, 10), options)
    laden = window.fit(said(Role.USER, 10), options, overhead=300)

    assert laden.tokens <= 400 - 10 - 300 < usual.tokens <= 400 - 10 - 16
