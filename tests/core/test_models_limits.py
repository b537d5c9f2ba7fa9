"""What a model may be asked for."""

from __future__ import annotations

import pytest
from moltbot_server.errors import InvalidField, UnsupportedContent, UnsupportedOption
from moltbot_server.models.engine import Capabilities
from moltbot_server.models.limits import check_content, check_options
from moltbot_server.turns import GenerationOptions, MediaPart, Part, TextPart, ToolCallPart

ALL = Capabilities(context_length=64, sampling=True, stop=True, seed=True, repetition_penalty=True, tools=True)
NONE = Capabilities(context_length=64)


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("max_output_tokens", [1, 10**6], [0, -1]),
        ("temperature", [0.0, 2.0], [-0.1, 2.1, float("nan")]),
        ("top_p", [0.01, 1.0], [0.0, 1.1, float("nan")]),
        ("top_k", [0, 40], [-1]),
        ("repetition_penalty", [0.5, 1.5], [0.0, -1.0, float("inf")]),
        ("stop", [("a",), ("x" * 64,) * 8], [("a",) * 9]),
    ],
)
def test_options_keep_to_their_ranges(field: str, good: list[object], bad: list[object]) -> None:
    for value in good:
        check_options(GenerationOptions(**{field: value}), ALL)  # type: ignore[arg-type]
    for value in bad:
        with pytest.raises(InvalidField, match=f"options.{field}: must be"):
            check_options(GenerationOptions(**{field: value}), ALL)  # type: ignore[arg-type]


@pytest.mark.parametrize("stop", ["", "x" * 65])
def test_a_stop_text_has_1_to_64_characters(stop: str) -> None:
    with pytest.raises(InvalidField, match=r"options\.stop\[1\]: must be 1 to 64 characters"):
        check_options(GenerationOptions(stop=("ok", stop)), ALL)


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", 0.5), ("top_p", 0.5), ("top_k", 1), ("stop", ("a",)), ("seed", 7), ("repetition_penalty", 1.1)],
)
def test_what_a_model_cannot_honour_is_refused_and_never_ignored(field: str, value: object) -> None:
    options = GenerationOptions(**{field: value})  # type: ignore[arg-type]
    check_options(options, ALL)
    with pytest.raises(UnsupportedOption) as caught:
        check_options(options, NONE)
    assert list(caught.value.fields) == [f"options.{field}"]


def test_a_text_model_reads_nothing_but_text() -> None:
    text = TextPart(text="look")
    parts: list[Part] = [MediaPart(kind=kind) for kind in ("image", "audio", "file")]
    parts.append(ToolCallPart(call_id="1", tool="t"))
    check_content((text, text), NONE)
    for part in parts:
        with pytest.raises(UnsupportedContent) as caught:
            check_content((text, part), NONE)
        assert list(caught.value.fields) == ["parts[1]"]


def test_what_the_capabilities_name_may_be_sent() -> None:
    able = Capabilities(context_length=64, image_input=True, tools=True)
    check_content((MediaPart(kind="image"), ToolCallPart(call_id="1", tool="t")), able)
    with pytest.raises(UnsupportedContent, match="reads no audio content"):
        check_content((MediaPart(kind="audio"),), able)
