"""The mock provider with tools: it calls what is offered and tells what the tool answered, in both dialects."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import openai
import pytest
from moltbot_server.testing_provider import MockProvider, Script, ScriptError

HELLO: list[Any] = [{"role": "user", "content": "How is the weather?"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "examples": ["Paris"]},
        "days": {"type": "integer", "minimum": 3},
        "unit": {"enum": ["C", "F"]},
        "note": {"type": "string"},
        "at": {"type": "array", "items": {"type": "boolean"}, "minItems": 1},
        "place": {"type": "object", "properties": {"zip": {"type": ["string", "null"]}}, "required": ["zip"]},
    },
    "required": ["city", "days", "unit", "at", "place"],
}
ARGUMENTS = {"city": "Paris", "days": 3, "unit": "C", "at": [True], "place": {"zip": "text"}}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
CLOCK: Any = {"type": "function", "function": {"name": "clock"}}
CLAUDE_TOOLS: Any = [{"name": "weather", "input_schema": SCHEMA}, {"name": "clock", "input_schema": {"type": "object"}}]


@pytest.fixture
async def provider() -> AsyncIterator[MockProvider]:
    """A provider that uses tools."""
    async with MockProvider(Script.read({"use_tools": True})).running() as running:
        yield running


@pytest.fixture
async def client(provider: MockProvider) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official OpenAI client, which does not try again."""
    async with openai.AsyncOpenAI(base_url=f"{provider.address}/v1", api_key="k", max_retries=0) as made:
        yield made


@pytest.fixture
async def claude(provider: MockProvider) -> AsyncIterator[anthropic.AsyncAnthropic]:
    """The official Anthropic client, which does not try again."""
    async with anthropic.AsyncAnthropic(base_url=provider.address, api_key="k", max_retries=0) as made:
        yield made


async def test_it_calls_a_tool_and_then_tells_what_it_answered(client: openai.AsyncOpenAI) -> None:
    first = (await client.chat.completions.create(model="m", messages=HELLO, tools=[WEATHER, CLOCK])).choices[0]
    assert (first.finish_reason, first.message.content) == ("tool_calls", None)
    assert first.message.tool_calls is not None
    (call,) = first.message.tool_calls
    assert isinstance(call, openai.types.chat.ChatCompletionMessageFunctionToolCall)
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", ARGUMENTS)
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "sun"}
    history: list[Any] = [*HELLO, first.message.model_dump(exclude_none=True), result]
    second = (await client.chat.completions.create(model="m", messages=history, tools=[WEATHER])).choices[0]
    assert (second.finish_reason, second.message.content) == ("stop", "The tool answered: sun")
    later = [*history, {"role": "assistant", "content": "It is sunny."}, *HELLO]
    third = (await client.chat.completions.create(model="m", messages=later, tools=[CLOCK])).choices[0]
    assert third.finish_reason == "tool_calls"


async def test_it_calls_a_tool_in_a_stream(client: openai.AsyncOpenAI) -> None:
    async with client.chat.completions.stream(model="m", messages=HELLO, tools=[CLOCK]) as stream:
        message = (await stream.get_final_completion()).choices[0].message
    assert message.tool_calls is not None
    assert [(call.function.name, call.function.arguments) for call in message.tool_calls] == [("clock", "{}")]


@pytest.mark.parametrize(
    ("choice", "called"),
    [
        ({"type": "function", "function": {"name": "clock"}}, "clock"),
        ("required", "weather"),
        ("auto", "weather"),
        ("none", ""),
    ],
)
async def test_it_minds_the_choice_among_tools(client: openai.AsyncOpenAI, choice: Any, called: str) -> None:
    asked: Any = {"model": "m", "messages": HELLO, "tools": [WEATHER, CLOCK], "tool_choice": choice}
    message = (await client.chat.completions.create(**asked)).choices[0].message
    assert [call.function.name for call in message.tool_calls or ()] == ([called] if called else [])
    assert bool(message.content) is not bool(called)


async def test_it_answers_in_words_where_no_tools_are_offered(client: openai.AsyncOpenAI) -> None:
    choice = (await client.chat.completions.create(model="m", messages=HELLO)).choices[0]
    assert (choice.finish_reason, choice.message.tool_calls) == ("stop", None)


async def test_a_message_calls_a_tool_and_then_tells_what_it_answered(claude: anthropic.AsyncAnthropic) -> None:
    asked: dict[str, Any] = {"model": "m", "max_tokens": 99, "tools": CLAUDE_TOOLS}
    first = await claude.messages.create(**asked, messages=HELLO)
    block = first.content[0]
    assert first.stop_reason == "tool_use"
    assert isinstance(block, anthropic.types.ToolUseBlock)
    assert (block.name, block.input) == ("weather", ARGUMENTS)
    result = {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "sun"}]}
    history: list[Any] = [
        *HELLO,
        {"role": "assistant", "content": [block.model_dump()]},
        {"role": "user", "content": [result]},
    ]
    async with claude.messages.stream(**asked, messages=history) as stream:
        assert await stream.get_final_text() == "The tool answered: sun"
    named = await claude.messages.create(**asked, messages=HELLO, tool_choice={"type": "tool", "name": "clock"})
    assert [each.name for each in named.content if each.type == "tool_use"] == ["clock"]
    none = await claude.messages.create(**asked, messages=HELLO, tool_choice={"type": "none"})
    assert none.stop_reason == "end_turn"


async def test_the_scripts_text_is_what_it_says_when_the_tool_has_answered(
    provider: MockProvider, client: openai.AsyncOpenAI
) -> None:
    provider.follow(Script.read({"use_tools": True, "text": "All is well."}))
    call = {"id": "c", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    history: list[Any] = [
        *HELLO,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "noon"},
    ]
    answer = await client.chat.completions.create(model="m", messages=history, tools=[CLOCK])
    assert answer.choices[0].message.content == "All is well."


async def test_tokens_that_a_cache_served_are_told_as_each_dialect_counts_them(
    provider: MockProvider, client: openai.AsyncOpenAI, claude: anthropic.AsyncAnthropic
) -> None:
    provider.follow(Script.read({"usage": {"input": 10, "output": 2, "cached": 7}}))
    used = (await client.chat.completions.create(model="m", messages=HELLO)).usage
    assert used is not None
    assert used.prompt_tokens_details is not None
    assert (used.prompt_tokens, used.prompt_tokens_details.cached_tokens) == (10, 7)
    told = (await claude.messages.create(model="m", max_tokens=99, messages=HELLO)).usage
    assert (told.input_tokens, told.cache_read_input_tokens, told.output_tokens) == (3, 7, 2)
    with pytest.raises(ScriptError, match=r"usage\.cached"):
        Script.read({"usage": {"input": 1, "output": 2, "cached": 7}})
