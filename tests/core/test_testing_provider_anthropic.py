"""The mock provider in the Anthropic dialect: what the official client reads from it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import anthropic
import pytest
from moltbot_server.testing_provider import MockProvider, Script

ASK: dict[str, Any] = {"model": "any", "messages": [{"role": "user", "content": "Say it"}]}
WORDS = "eins zwei drei"


@pytest.fixture
async def provider() -> AsyncIterator[MockProvider]:
    """A provider that says three words."""
    async with MockProvider(Script.read({"text": WORDS})).running() as running:
        yield running


@pytest.fixture
async def claude(provider: MockProvider) -> AsyncIterator[anthropic.AsyncAnthropic]:
    """The official Anthropic client, which does not try again."""
    async with anthropic.AsyncAnthropic(base_url=provider.address, api_key="a-good-key", max_retries=0) as made:
        yield made


async def test_a_message_comes_whole_and_in_words(provider: MockProvider, claude: anthropic.AsyncAnthropic) -> None:
    provider.follow(Script.read({"text": WORDS, "usage": {"input": 7, "output": 9}}))

    whole = await claude.messages.create(**ASK, max_tokens=9)
    async with claude.messages.stream(**ASK, max_tokens=9) as stream:
        words = [word async for word in stream.text_stream]
        streamed = await stream.get_final_message()

    assert [block.to_dict() for block in whole.content] == [{"type": "text", "text": WORDS}]
    assert words == ["eins", " zwei", " drei"]
    for message in (whole, streamed):
        assert (message.stop_reason, message.usage.input_tokens, message.usage.output_tokens) == ("end_turn", 7, 9)


async def test_a_message_thinks_and_uses_tools(provider: MockProvider, claude: anthropic.AsyncAnthropic) -> None:
    call = {"name": "weather", "arguments": {"city": "Zürich"}}
    provider.follow(Script.read({"reasoning": "hm hm", "text": "I look.", "tool_calls": [call, call]}))

    whole = await claude.messages.create(**ASK, max_tokens=9)
    async with claude.messages.stream(**ASK, max_tokens=9) as stream:
        kinds = [event.type async for event in stream]
        streamed = await stream.get_final_message()

    for message in (whole, streamed):
        thinking, text, *tools = message.content
        assert (thinking.type, text.type, message.stop_reason) == ("thinking", "text", "tool_use")
        assert (thinking.thinking, text.text) == ("hm hm", "I look.")
        assert [(tool.type, tool.name, tool.input) for tool in tools] == [("tool_use", *call.values())] * 2
        assert tools[0].id != tools[1].id
    assert kinds[0] == "message_start"
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 4
    assert kinds[-1] == "message_stop"


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("error status=529", "overloaded_error"),
        ("error status=502", "api_error"),
        ("rate_limit retry_after=3s", "rate_limit_error"),
        ("unauthorized", "authentication_error"),
        ("unauthorized status=403", "permission_error"),
    ],
)
async def test_a_message_is_refused_in_the_form_of_its_dialect(
    provider: MockProvider, claude: anthropic.AsyncAnthropic, fault: str, kind: str
) -> None:
    provider.follow(Script.read({"faults": [fault]}))

    with pytest.raises(anthropic.APIStatusError) as refused:
        await claude.messages.create(**ASK, max_tokens=9)

    assert isinstance(refused.value.body, dict)
    assert refused.value.body["type"] == "error"
    assert refused.value.body["error"].keys() == {"type", "message"}
    assert refused.value.body["error"]["type"] == kind
    assert refused.value.response.headers.get("Retry-After") == ("3" if kind == "rate_limit_error" else None)


async def test_a_message_needs_its_limit_of_tokens_and_its_version(provider: MockProvider) -> None:
    async with aiohttp.ClientSession(provider.address, headers={"x-api-key": "k"}) as session:
        told = []
        for headers, body in (({}, {**ASK, "max_tokens": 9}), ({"anthropic-version": "2023-06-01"}, ASK)):
            async with session.post("/v1/messages", json=body, headers=headers) as answer:
                told.append((answer.status, (await answer.json())["error"]["message"].partition(":")[0]))

    assert told == [(400, "anthropic-version"), (400, "max_tokens")]


async def test_a_stream_of_events_begins_with_a_ping_and_may_lack_its_end(provider: MockProvider) -> None:
    provider.follow(Script.read({"text": WORDS, "faults": [{"kind": "broken_sse", "how": "no_done"}]}))
    headers = {"x-api-key": "k", "anthropic-version": "2023-06-01"}

    body = {**ASK, "max_tokens": 9, "stream": True}
    async with (
        aiohttp.ClientSession(provider.address, headers=headers) as session,
        session.post("/v1/messages", json=body) as answer,
    ):
        lines = (await answer.text()).split("\n")

    events = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    block = ["content_block_start", *["content_block_delta"] * 3, "content_block_stop"]
    assert events == ["message_start", "ping", *block, "message_delta"]
    told = [json.loads(line.removeprefix("data: "))["type"] for line in lines if line.startswith("data: ")]
    assert told == events
