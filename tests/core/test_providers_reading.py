"""Answers of remote models as they come, in the ways in which providers differ."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moltbot_server.config_models import ProviderModel
from moltbot_server.errors import ModelUnavailable, QueueFull
from moltbot_server.models.engine import Finished
from moltbot_server.models.providers.anthropic_reading import AnthropicReading
from moltbot_server.models.providers.drafts import Draft, Reading, Refused
from moltbot_server.models.providers.events import Broken
from moltbot_server.models.providers.openai_reading import OpenAIReading
from moltbot_server.models.providers.thoughts import InlineThoughts
from moltbot_server.turns import FinishReason, GenerationOptions, Notice, Reset, Routed, Tool, ToolCallPart, Usage
from provider_kit import DONE, STOP, Wire, answered, provider, said, started, stream, word

TOOL = Tool(name="t")


class Pieces:
    """A listener of a reading alone."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str]] = []

    def wrote(self, text: str, tokens: int) -> None:
        self.heard.append(("text", text))

    def thought(self, text: str) -> None:
        self.heard.append(("thought", text))

    def queued(self, position: int) -> None:
        raise AssertionError

    def noted(self, what: Routed | Notice | Reset) -> None:
        raise AssertionError

    def ended(self, end: Finished | Exception) -> None:
        raise AssertionError

    def joined(self, kind: str) -> str:
        return "".join(text for each, text in self.heard if each == kind)


def chunk(finish: str | None = None, usage: dict[str, Any] | None = None, **delta: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return json.dumps({"choices": [choice], **({"usage": usage} if usage else {})}).encode()


def gpt(*payloads: bytes, tools: tuple[Tool, ...] = (TOOL,)) -> tuple[Pieces, Draft]:
    pieces = Pieces()
    reading = OpenAIReading(pieces, tools)
    assert reading.read([*payloads, b"[DONE]"])
    return pieces, reading.draft


def claude(*events: dict[str, Any]) -> tuple[Pieces, Draft]:
    pieces = Pieces()
    reading = AnthropicReading(pieces, (TOOL,))
    assert reading.read([json.dumps(event).encode() for event in events])
    return pieces, reading.draft


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_thoughts_have_either_name(field: str) -> None:
    pieces, _ = gpt(chunk(**{field: "hm "}), chunk(**{field: "so"}), chunk(content="yes"), chunk("stop"))
    assert pieces.heard == [("thought", "hm so"), ("text", "yes")]


def test_what_comes_together_is_told_together_and_in_order() -> None:
    pieces = Pieces()
    reading = OpenAIReading(pieces, ())
    reading.read([chunk(content="a"), chunk(content="b"), chunk(reasoning="c"), chunk(content="d")])
    reading.read([chunk(content="e")])
    assert pieces.heard == [("text", "ab"), ("thought", "c"), ("text", "d"), ("text", "e")]


def test_contents_may_be_lists() -> None:
    thinking = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]
    pieces, _ = gpt(chunk(content=thinking), chunk(content=[{"type": "text", "text": "yes"}]), chunk("stop"))
    assert pieces.heard == [("thought", "hm"), ("text", "yes")]


def test_a_refusal_by_the_model_is_text() -> None:
    pieces, _ = gpt(chunk(refusal="I will not."), chunk("stop"))
    assert pieces.joined("text") == "I will not."


@pytest.mark.parametrize(
    ("reason", "finish"),
    [
        ("stop", FinishReason.STOP),
        ("length", FinishReason.LENGTH),
        ("content_filter", FinishReason.CONTENT_FILTER),
        ("sensitive", FinishReason.CONTENT_FILTER),
        ("eos_token", FinishReason.STOP),
        ("tool_calls", FinishReason.STOP),
    ],
)
def test_ends_are_told_in_our_words(reason: str, finish: FinishReason) -> None:
    assert gpt(chunk(content="x"), chunk(reason))[1].finish is finish


@pytest.mark.parametrize("reason", ["error", "network_error", "insufficient_system_resource"])
def test_an_end_that_is_a_failure_is_one_and_what_came_with_it_is_not_told(reason: str) -> None:
    pieces = Pieces()
    with pytest.raises(Broken, match="gave up"):
        OpenAIReading(pieces, ()).read([chunk(content="x"), chunk(reason), b"[DONE]"])
    assert pieces.heard == []


@pytest.mark.parametrize(
    ("usage", "read"),
    [
        ({"prompt_tokens": 9, "completion_tokens": 3}, Usage(input_tokens=9, output_tokens=3)),
        (
            {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}},
            Usage(input_tokens=9, output_tokens=3, cached_input_tokens=4),
        ),
        ({"prompt_tokens": 9, "prompt_cache_hit_tokens": 5}, Usage(input_tokens=9, cached_input_tokens=5)),
        ({"prompt_tokens": 9, "cached_tokens": 6}, Usage(input_tokens=9, cached_input_tokens=6)),
        ({"prompt_tokens": -1, "completion_tokens": None}, Usage()),
        ({"prompt_tokens": 5, "completion_tokens": 3_000_000_000}, Usage(input_tokens=5)),
        ({"prompt_tokens": 2**64 - 1, "completion_tokens": 10**20, "cached_tokens": 10**20}, Usage()),
    ],
)
def test_usage_is_read_in_each_form(usage: dict[str, Any], read: Usage) -> None:
    assert gpt(chunk("stop", usage=usage))[1].usage == read
    alone = json.dumps({"choices": [], "usage": usage}).encode()
    assert gpt(chunk("stop"), alone)[1].usage == read
    inside = json.dumps({"choices": [{"delta": {}, "finish_reason": "stop", "usage": usage}]}).encode()
    assert gpt(inside)[1].usage == read


def call(index: int | None, id: str | None = None, name: str | None = None, arguments: str | None = None) -> bytes:
    return chunk(tool_calls=[{"index": index, "id": id, "function": {"name": name, "arguments": arguments}}])


def test_calls_are_put_together_from_pieces() -> None:
    _, draft = gpt(
        call(0, "a", "t", ""),
        call(0, arguments='{"x"'),
        call(1, "b", "t", '{"y":2}'),
        call(0, arguments=":1}"),
        chunk("stop"),
    )
    assert draft.finish is FinishReason.TOOL_CALLS
    assert draft.attachments() == (
        ToolCallPart(call_id="a", tool="t", arguments_json='{"x":1}'),
        ToolCallPart(call_id="b", tool="t", arguments_json='{"y":2}'),
    )


def test_calls_without_an_index_are_told_apart_by_their_names() -> None:
    _, draft = gpt(
        call(None, "a", "t", '{"x":1}'), call(None, "b", "t", '{"y"'), call(None, arguments=":2}"), chunk("tool_calls")
    )
    assert [part.arguments_json for part in draft.attachments()] == ['{"x":1}', '{"y":2}']


def test_a_call_without_an_id_gets_one() -> None:
    _, draft = gpt(call(0, None, "t", ""), chunk("tool_calls"))
    assert draft.attachments() == (ToolCallPart(call_id="call_0", tool="t", arguments_json="{}"),)


@pytest.mark.parametrize("arguments", ["{", "[1]", '"x"', "{" * 50_000])
def test_arguments_that_are_no_object_are_no_call(arguments: str) -> None:
    _, draft = gpt(call(0, "a", "t", arguments), chunk("tool_calls"))
    with pytest.raises(Broken, match="no JSON object"):
        draft.attachments()


async def test_a_call_that_the_limit_cuts_is_left_out_of_an_answer() -> None:
    cut = (call(0, "a", "t", '{"x'), chunk("length"))
    answer = stream(*(each.decode() for each in cut), DONE)
    async with Wire(answer).running() as wire, started(provider(wire.address)) as engine:
        _, end = await answered(engine, options=GenerationOptions(tools=(TOOL,)))
    assert (end.finish_reason, end.attachments) == (FinishReason.LENGTH, ())


def test_too_many_calls_are_no_answer() -> None:
    with pytest.raises(Broken, match="too many tools"):
        gpt(*(call(index, "a", "t", "{}") for index in range(200)))


async def test_an_answer_whose_usage_is_not_told_counts_what_came() -> None:
    answer = stream(word("a "), word("b "), word("c"), STOP, DONE)
    async with Wire(answer).running() as wire, started(provider(wire.address)) as engine:
        _, end = await answered(engine)
    assert end.usage == Usage(output_tokens=3)  # what was read, the caller counts


async def test_a_conversation_that_the_provider_finds_unfit_ends_as_filtered() -> None:
    body = b'{"error":{"code":"data_inspection_failed","message":"..."}}'
    for answer in (
        b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body),
        stream(body.decode()),
        stream('{"choices":[{"delta":{},"finish_reason":"content_filter"}]}', DONE),
    ):
        async with Wire(answer).running() as wire, started(provider(wire.address)) as engine:
            heard, end = await answered(engine)
            assert (heard.text, end.finish_reason) == ("", FinishReason.CONTENT_FILTER)


async def test_a_limit_that_is_told_inside_a_stream_lets_the_key_rest() -> None:
    limited = stream('{"error":{"message":"slow down","code":429}}')
    async with Wire(limited).running() as wire, started(provider(wire.address)) as engine:
        with pytest.raises(QueueFull):
            await answered(engine)
        assert engine.rest > 0


# --- the Anthropic dialect -------------------------------------------------------------------------------------------

START = {
    "type": "message_start",
    "message": {"usage": {"input_tokens": 5, "cache_read_input_tokens": 3, "output_tokens": 1}},
}


def delta(index: int, **fields: Any) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": index, "delta": fields}


def ended(reason: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"type": "message_delta", "delta": {"stop_reason": reason}, "usage": {"output_tokens": 7}}, {
        "type": "message_stop"
    }


def test_blocks_are_read_each_as_what_it_is() -> None:
    pieces, draft = claude(
        START,
        {"type": "ping"},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": ""}},
        delta(0, type="thinking_delta", thinking="hm"),
        delta(0, type="signature_delta", signature="abc"),
        {"type": "content_block_stop", "index": 0},
        {"type": "content_block_start", "index": 1, "content_block": {"type": "redacted_thinking", "data": "x"}},
        {"type": "content_block_start", "index": 2, "content_block": {"type": "text", "text": "So "}},
        delta(2, type="text_delta", text="yes"),
        delta(2, type="citations_delta", citation={}),
        {
            "type": "content_block_start",
            "index": 3,
            "content_block": {"type": "tool_use", "id": "a", "name": "t", "input": {}},
        },
        delta(3, type="input_json_delta", partial_json=""),
        delta(3, type="input_json_delta", partial_json='{"x":'),
        delta(3, type="input_json_delta", partial_json="1}"),
        {
            "type": "content_block_start",
            "index": 4,
            "content_block": {"type": "server_tool_use", "id": "s", "name": "web"},
        },
        delta(4, type="input_json_delta", partial_json="{}"),
        {"type": "something_new", "index": 9},
        *ended("tool_use"),
    )
    assert pieces.heard == [("thought", "hm"), ("text", "So yes")]
    assert draft.finish is FinishReason.TOOL_CALLS
    assert draft.attachments() == (ToolCallPart(call_id="a", tool="t", arguments_json='{"x":1}'),)
    assert draft.usage == Usage(input_tokens=8, output_tokens=7, cached_input_tokens=3)


@pytest.mark.parametrize(
    ("reason", "finish"),
    [
        ("end_turn", FinishReason.STOP),
        ("max_tokens", FinishReason.LENGTH),
        ("stop_sequence", FinishReason.STOP_TEXT),
        ("refusal", FinishReason.CONTENT_FILTER),
        ("model_context_window_exceeded", FinishReason.LENGTH),
    ],
)
def test_stop_reasons_are_told_in_our_words(reason: str, finish: FinishReason) -> None:
    assert claude(START, *ended(reason))[1].finish is finish


async def test_an_overload_that_is_told_inside_a_stream_is_told_as_such() -> None:
    events = [json.dumps(START), '{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}']
    async with Wire(stream(*events)).running() as wire, started(provider(wire.address, "anthropic")) as engine:
        with pytest.raises(ModelUnavailable, match=r"failed \(500\)"):
            await answered(engine)


# --- thoughts inside the text ----------------------------------------------------------------------------------------


@given(st.integers(0, 2**32))
@pytest.mark.parametrize(
    ("text", "thought", "rest"),
    [
        ("<think>a < b</think>\n\nyes", "a < b", "yes"),
        ("\n<think>hm</thin</think>y", "hm</thin", "y"),
        ("no thoughts <think>here</think>", "", "no thoughts <think>here</think>"),
        ("<thin", "", "<thin"),
        ("<think>never ends</thi", "never ends</thi", ""),
        ("<think></think>", "", ""),
    ],
)
def test_thoughts_in_the_text_are_told_apart_however_they_are_cut(
    text: str, thought: str, rest: str, seed: int
) -> None:
    pieces = Pieces()
    draft = Draft(pieces, ())
    inline = InlineThoughts(draft)
    dice = random.Random(seed)
    while text:
        size = dice.randint(1, 9)
        inline.say(text[:size])
        draft.flush()
        text = text[size:]
    inline.end()
    draft.flush()
    assert (pieces.joined("thought"), pieces.joined("text")) == (thought, rest)


async def test_a_model_that_is_known_to_think_has_its_thoughts_taken_out_of_the_text() -> None:
    answer = stream(word("<think>hm"), word("</think>yes"), STOP, DONE)
    async with Wire(answer).running() as wire:
        async with started(provider(wire.address), model=ProviderModel(name="m", reasoning=True)) as engine:
            heard, _ = await answered(engine)
            assert (heard.thoughts, heard.text) == ("hm", "yes")
        async with started(provider(wire.address)) as engine:
            heard, _ = await answered(engine)
            assert (heard.thoughts, heard.text) == ("", "<think>hm</think>yes")


# --- anything --------------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "choices",
                    "delta",
                    "content",
                    "error",
                    "usage",
                    "type",
                    "index",
                    "tool_calls",
                    "function",
                    "name",
                    "message",
                    "content_block",
                    "text",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.lists(st.binary(max_size=60) | json_values.map(lambda value: json.dumps(value).encode()), max_size=6))
@pytest.mark.parametrize("kind", [OpenAIReading, AnthropicReading])
def test_nothing_that_a_provider_sends_raises_anything_unforeseen(kind: type[Reading], payloads: list[bytes]) -> None:
    reading = kind(Pieces(), (TOOL,))  # type: ignore[call-arg]
    try:
        if reading.read(payloads):
            reading.draft.attachments()
    except (Broken, Refused):
        return
    assert reading.missing()


@given(st.binary(max_size=200))
async def test_no_answer_leaves_anybody_waiting(body: bytes) -> None:
    answer = b"HTTP/1.1 200 OK\r\n\r\n" + body
    async with Wire(answer, close=True).running() as wire, started(provider(wire.address)) as engine:
        with pytest.raises(ModelUnavailable):
            async with asyncio.timeout(5):
                await answered(engine, (said("x"),))
