"""What the reader of a streamed answer is given when the answer behind it is begun anew."""

import json

import pytest
from moltbot.v1 import chat_pb2, message_pb2
from moltbot_adapters.http.openai_progress import Progress, Said

STOP = message_pb2.FINISH_REASON_STOP


def heard(data: bytes) -> tuple[str, str]:
    """The text and the thoughts in the chunks of a stream."""
    chunks = [json.loads(line.removeprefix("data: ")) for line in data.decode().split("\n\n") if line[6:7] == "{"]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    texts = (delta.get("content") or "" for delta in deltas)
    return "".join(texts), "".join(delta.get("reasoning_content", "") for delta in deltas)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_an_answer_that_says_the_same_once_more_is_told_once(size: int) -> None:
    whole = "The quick brown fox jumps over the lazy dog."
    for cut in range(len(whole)):
        progress = Progress("m", id="chatcmpl-1", with_usage=False)
        data = progress.add(whole[:cut]) or b""
        data += progress.replace("") or b""
        for start in range(0, len(whole), size):
            data += progress.add(whole[start : start + size]) or b""
        ended = progress.end(chat_pb2.Completed(text=whole, finish_reason=STOP), [])
        assert ended is not None
        assert heard(data + ended) == (whole, "")


def test_an_answer_that_says_something_else_contradicts_as_soon_as_it_does() -> None:
    said = Said()
    assert said.add("Half an") == "Half an"
    assert said.anew("") == ""
    assert [said.add("Ha"), said.add("l"), said.add("ve")] == ["", "", None]


def test_an_answer_that_ends_before_it_has_said_what_the_reader_has_contradicts() -> None:
    for text in ("Half", "", "Other words, and more of them"):
        progress = Progress("m", id="chatcmpl-1", with_usage=False)
        progress.add("Half an")
        assert progress.replace("") == b""
        assert progress.end(chat_pb2.Completed(text=text, finish_reason=STOP), []) is None


def test_a_second_cut_while_the_reader_is_ahead_is_no_more_than_the_first() -> None:
    said = Said()
    pieces = [said.add("one two"), said.anew(""), said.add("one"), said.anew("one t"), said.add("wo three")]
    assert "".join(piece or "" for piece in pieces) == "one two three"
    assert said.whole("one two three") == ""


def test_a_text_that_comes_with_the_end_alone_is_told_in_full() -> None:
    said = Said()
    assert [said.add("one"), said.anew(""), said.whole("one two")] == ["one", "", " two"]
    assert Said().whole("all") == "all"


def test_thoughts_are_not_repeated_and_new_ones_of_a_new_answer_are_left_out() -> None:
    progress = Progress("m", id="chatcmpl-1", with_usage=False)
    data = progress.think("Hm, well") + (progress.replace("") or b"")
    data += progress.think("Hm") + progress.think(", well then.") + (progress.replace("") or b"")
    data += progress.think("No") + (progress.add("Yes") or b"")
    ended = progress.end(chat_pb2.Completed(text="Yes", reasoning="No", finish_reason=STOP), [])
    assert heard(data + (ended or b"")) == ("Yes", "Hm, well then.")
