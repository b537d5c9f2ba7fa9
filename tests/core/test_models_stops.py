"""Stop texts in a stream, however it is cut."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st
from moltbot_server.models.stops import StopTexts

TEXT = st.text("ab你🎉", max_size=30)


def run(stops: list[str], parts: list[str]) -> tuple[str, bool]:
    matcher = StopTexts(stops)
    shown = "".join(map(matcher.feed, parts))
    return shown + ("" if matcher.stopped else matcher.flush()), matcher.stopped


def first_complete(stops: list[str], text: str) -> tuple[str, bool]:
    for end in range(1, len(text) + 1):
        found = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: min(found)], True
    return text, False


@given(parts=st.lists(TEXT, max_size=8), stops=st.lists(st.text("ab你🎉", min_size=1, max_size=5), max_size=8))
@example(parts=["a", "ba", "b", "b"], stops=["abb"])
@example(parts=["aabb"], stops=["abba", "ab"])
def test_the_stop_text_that_is_complete_first_ends_the_text(parts: list[str], stops: list[str]) -> None:
    assert run(stops, parts) == first_complete(stops, "".join(parts))


def test_only_what_may_begin_a_stop_text_is_held_back() -> None:
    matcher = StopTexts(["<end>"])
    assert [matcher.feed(part) for part in ("hello", " <", "en", "ding> ", "<end", ">more", "x")] == [
        "hello", " ", "", "<ending> ", "", "", "",
    ]  # fmt: skip
    assert matcher.stopped
    assert matcher.flush() == ""
