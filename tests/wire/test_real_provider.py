"""The official OpenAI client through the adapter and the real core to a provider of either dialect, and back."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from moltbot_adapters.http.settings import Settings
from moltbot_server.config_models import Provider, ProviderModel
from moltbot_server.models.providers.engine import ProviderEngine
from moltbot_server.models.providers.keys import ProviderKey
from moltbot_server.testing import running_server
from moltbot_server.testing_provider import MockProvider, Script
from running_adapter import RunningAdapter

HELLO: list[Any] = [{"role": "user", "content": "How is the weather?"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "examples": ["Paris"]}}, "required": ["city"]}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
DOT = "data:image/png;base64,iVBORw0KGgo="


class OneKey:
    """A ring with one key, the same for each provider."""

    def keys(self, provider: str) -> Sequence[ProviderKey]:
        """Return the key."""
        return (ProviderKey(id="k", text="a-good-key"),)


@asynccontextmanager
async def site(
    folder: Path, script: dict[str, Any], dialect: str
) -> AsyncIterator[tuple[openai.AsyncOpenAI, MockProvider]]:
    """Run a mock provider, a core that asks it, and an adapter; give the official client of the adapter."""
    async with MockProvider(Script.read(script)).running() as mock:
        where = Provider(name="mock", dialect=dialect, base_url=f"{mock.address}/v1")
        model = ProviderModel(name="mock-model", context_length=8000, tools=True, vision=True, reasoning=True)
        engine = ProviderEngine(where, model, keys=OneKey())
        async with running_server(folder / "workspace", engine=engine, grace=0.2) as server:
            key_file = folder / "key"
            key_file.write_text(server.key)
            settings = Settings(
                host="127.0.0.1", port=0, core=server.address, key_file=key_file, state=folder / "state"
            )
            async with (
                RunningAdapter(settings, drain_s=1.0) as adapter,
                openai.AsyncOpenAI(base_url=adapter.api, api_key=server.key, max_retries=0) as client,
            ):
                yield client, mock


@pytest.fixture(params=["openai", "anthropic"])
def dialect(request: pytest.FixtureRequest) -> str:
    """What the provider speaks."""
    return str(request.param)


async def _streamed(client: openai.AsyncOpenAI, **asked: Any) -> Any:
    async with client.chat.completions.stream(**asked) as stream:
        return await stream.get_final_completion()


async def _whole(client: openai.AsyncOpenAI, **asked: Any) -> Any:
    return await client.chat.completions.create(**asked)


@pytest.mark.parametrize("ask", [_whole, _streamed])
async def test_a_tool_is_asked_for_called_and_its_answer_told(tmp_path, dialect, ask):
    async with site(tmp_path, {"use_tools": True, "reasoning": "Let me look."}, dialect) as (client, _):
        first = (await ask(client, model="mock-model", messages=HELLO, tools=[WEATHER])).choices[0]
        assert first.finish_reason == "tool_calls"
        assert first.message.model_extra["reasoning_content"] == "Let me look."
        (call,) = first.message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Paris"})
        said = {"role": "assistant", "tool_calls": [call.model_dump(include={"id", "type", "function"})]}
        answered = {"role": "tool", "tool_call_id": call.id, "content": "sun"}
        second = (await ask(client, model="mock-model", messages=[*HELLO, said, answered], tools=[WEATHER])).choices[0]
        assert (second.finish_reason, second.message.content) == ("stop", "The tool answered: sun")


async def test_a_session_keeps_the_calls_that_its_tools_answer(tmp_path, dialect):
    async with site(tmp_path, {"use_tools": True}, dialect) as (client, _):
        asked = {"model": "mock-model", "tools": [WEATHER], "extra_headers": {"X-Session-Id": "trip"}}
        (call,) = (await client.chat.completions.create(messages=HELLO, **asked)).choices[0].message.tool_calls
        answered = [{"role": "tool", "tool_call_id": call.id, "content": "sun"}]
        second = (await client.chat.completions.create(messages=answered, **asked)).choices[0]
        assert second.message.content == "The tool answered: sun"
        third = (await client.chat.completions.create(messages=HELLO, **asked)).choices[0]
        assert third.finish_reason == "tool_calls"


async def test_pictures_by_value_and_by_reference_reach_the_provider(tmp_path, dialect):
    parts = [
        {"type": "text", "text": "Look at these"},
        {"type": "image_url", "image_url": {"url": DOT}},
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
    ]
    async with site(tmp_path, {"echo": True}, dialect) as (client, mock):
        answer = await client.chat.completions.create(model="mock-model", messages=[{"role": "user", "content": parts}])
        assert answer.choices[0].message.content == "Look at these"
        assert [call["pictures"] for call in mock.calls.shown()["calls"]] == [2]


async def test_tokens_that_the_provider_had_kept_are_told(tmp_path, dialect):
    async with site(tmp_path, {"usage": {"input": 10, "output": 2, "cached": 7}}, dialect) as (client, _):
        used = (await client.chat.completions.create(model="mock-model", messages=HELLO)).usage
        assert (used.prompt_tokens, used.completion_tokens) == (10, 2)
        assert used.prompt_tokens_details.cached_tokens == 7


async def test_thoughts_stream_before_the_words(tmp_path, dialect):
    async with site(tmp_path, {"reasoning": "One two three", "text": "Four five"}, dialect) as (client, _):
        stream = await client.chat.completions.create(model="mock-model", messages=HELLO, stream=True)
        deltas = [chunk.choices[0].delta async for chunk in stream]
    thoughts = [(delta.model_extra or {}).get("reasoning_content", "") for delta in deltas]
    assert "".join(thoughts) == "One two three"
    assert "".join(delta.content or "" for delta in deltas) == "Four five"
    last = max(at for at, thought in enumerate(thoughts) if thought)
    assert last < min(at for at, delta in enumerate(deltas) if delta.content)


async def test_a_key_that_the_provider_refuses_is_the_servers_fault(tmp_path, dialect):
    async with site(tmp_path, {"keys": ["another-key"]}, dialect) as (client, _):
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(model="mock-model", messages=HELLO)
    assert (caught.value.status_code, caught.value.code) == (503, "model_credential")
    assert "a-good-key" not in str(caught.value)


async def test_a_stream_that_is_cut_is_an_error_of_the_stream(tmp_path, dialect):
    fault = {"kind": "cut", "after": 2}
    async with site(tmp_path, {"text": "one two three four", "faults": [fault]}, dialect) as (client, _):
        heard: list[str] = []

        async def listen() -> None:
            async for chunk in await client.chat.completions.create(model="mock-model", messages=HELLO, stream=True):
                heard.append(chunk.choices[0].delta.content or "")

        async with asyncio.timeout(10):
            with pytest.raises(openai.APIError) as caught:
                await listen()
    assert "".join(heard) == "one two"
    assert caught.value.code in ("model_unavailable", "turn_interrupted")
