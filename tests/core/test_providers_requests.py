"""What remote models are sent: compared whole with what the official clients send for the same conversation."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from types import FrameType
from typing import Any

import anthropic
import msgspec
import openai
import pytest
from moltbot_server.config_models import Provider, ProviderModel
from moltbot_server.models.providers import ProviderKey, resolve
from moltbot_server.models.providers.calls import DIALECTS, Heads
from moltbot_server.models.providers.presets import Terms, terms
from moltbot_server.turns import (
    GenerationOptions,
    MediaPart,
    Message,
    Role,
    Tool,
    ToolCallPart,
    ToolChoice,
    ToolMode,
    ToolResultPart,
)
from provider_kit import DONE, STOP, Wire, said, stream

PNG = b"\x89PNG\r\n\x1a\nnot a picture"
SCHEMA = '{"type":"object","properties":{"city":{"type":"string"}},"required":["city"]}'
TOOL = Tool(name="weather", description="Tells the weather", parameters_json=SCHEMA)
NOTHING = GenerationOptions()
OPTIONS = GenerationOptions(max_output_tokens=100, temperature=0.5, top_p=0.9, stop=("END", "停"), tools=(TOOL,))
CONVERSATION = (
    said("Be kind.", role=Role.SYSTEM),
    said("Hello"),
    said("Hi!", role=Role.ASSISTANT),
    said("What is this, ", "and how is the weather?", MediaPart(kind="image", data=PNG, media_type="image/png")),
    said(
        "Let me look. ",
        ToolCallPart(call_id="c1", tool="weather", arguments_json='{"city":"上海"}'),
        ToolCallPart(call_id="c2", tool="weather", arguments_json=""),
        role=Role.ASSISTANT,
    ),
    said(
        ToolResultPart(call_id="c1", tool="weather", output="21 °C"),
        ToolResultPart(call_id="c2", tool="weather", output="no city", is_error=True),
        "And now?",
    ),
    said(MediaPart(kind="image", uri="https://example.com/cat.png")),
)


@pytest.fixture
async def wire() -> AsyncIterator[Wire]:
    """A server that takes every request and says nothing."""
    async with Wire(stream(STOP, DONE)).running() as running:
        yield running


def known(name: str, **fields: Any) -> Terms:
    owner, model = resolve(name, ())
    return msgspec.structs.replace(terms(owner, model), **fields)


def ours(what: Terms, messages: tuple[Message, ...], options: GenerationOptions = NOTHING) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DIALECTS[what.dialect].request(what, messages, options))
    return found


def calls_for(what: Terms, messages: tuple[Message, ...]) -> int:
    """Return how many functions of ours are called to write a request."""
    called: list[str] = []

    def notice(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and "moltbot_server" in frame.f_code.co_filename:
            called.append(frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(notice)
    try:
        DIALECTS[what.dialect].request(what, messages, NOTHING)
    finally:
        sys.setprofile(before)
    return len(called)


def sent(wire: Wire) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(wire.requests[-1].partition(b"\r\n\r\n")[2])
    return found


def head_of(wire: Wire) -> tuple[str, dict[str, str]]:
    first, *lines = wire.requests[-1].partition(b"\r\n\r\n")[0].decode().split("\r\n")
    return first, {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}


async def test_a_conversation_is_what_the_client_of_openai_sends(wire: Wire) -> None:
    async with openai.AsyncOpenAI(base_url=f"{wire.address}/v1", api_key="a-key", max_retries=0) as client:
        await client.chat.completions.create(
            model="gpt-4o",
            messages=[
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Hi!"},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "What is this, "},
                        {"type": "text", "text": "and how is the weather?"},
                        {
                            "type": "image_url",
                            "image_url": {"url": "data:image/png;base64,iVBORw0KGgpub3QgYSBwaWN0dXJl"},
                        },
                    ],
                },
                {
                    "role": "assistant",
                    "content": "Let me look. ",
                    "tool_calls": [
                        {
                            "id": "c1",
                            "type": "function",
                            "function": {"name": "weather", "arguments": '{"city":"上海"}'},
                        },
                        {"id": "c2", "type": "function", "function": {"name": "weather", "arguments": "{}"}},
                    ],
                },
                {"role": "tool", "tool_call_id": "c1", "content": "21 °C"},
                {"role": "tool", "tool_call_id": "c2", "content": "Error: no city"},
                {"role": "user", "content": "And now?"},
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}}],
                },
            ],
            max_completion_tokens=100,
            temperature=0.5,
            top_p=0.9,
            stop=["END", "停"],
            seed=7,
            tools=[
                {
                    "type": "function",
                    "function": {
                        "name": "weather",
                        "description": "Tells the weather",
                        "parameters": json.loads(SCHEMA),
                    },
                }
            ],
            tool_choice={"type": "function", "function": {"name": "weather"}},
            stream=True,
            stream_options={"include_usage": True},
        )
    options = msgspec.structs.replace(OPTIONS, seed=7, tool_choice=ToolChoice(tool="weather"))
    assert ours(known("gpt-4o"), CONVERSATION, options) == sent(wire)


async def test_a_conversation_is_what_the_client_of_anthropic_sends(wire: Wire) -> None:
    async with anthropic.AsyncAnthropic(base_url=wire.address, api_key="a-key", max_retries=0) as client:
        await client.messages.create(
            model="claude-sonnet-4-6",
            max_tokens=100,
            system="Be kind.",
            messages=[
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Hi!"},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "What is this, "},
                        {"type": "text", "text": "and how is the weather?"},
                        {
                            "type": "image",
                            "source": {
                                "type": "base64",
                                "media_type": "image/png",
                                "data": "iVBORw0KGgpub3QgYSBwaWN0dXJl",
                            },
                        },
                    ],
                },
                {
                    "role": "assistant",
                    "content": [
                        {"type": "text", "text": "Let me look. "},
                        {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "上海"}},
                        {"type": "tool_use", "id": "c2", "name": "weather", "input": {}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "c1", "content": "21 °C"},
                        {"type": "tool_result", "tool_use_id": "c2", "content": "no city", "is_error": True},
                        {"type": "text", "text": "And now?"},
                        {"type": "image", "source": {"type": "url", "url": "https://example.com/cat.png"}},
                    ],
                },
            ],
            extra_body={"temperature": 0.5, "top_p": 0.9},  # this client is of a version that has them no more
            stop_sequences=["END", "停"],
            tools=[{"name": "weather", "description": "Tells the weather", "input_schema": json.loads(SCHEMA)}],
            tool_choice={"type": "any"},
            stream=True,
        )
    options = msgspec.structs.replace(OPTIONS, tool_choice=ToolChoice(mode=ToolMode.REQUIRED))
    assert ours(known("sonnet-4.6"), CONVERSATION, options) == sent(wire)


async def test_the_head_of_a_request_opens_what_the_official_clients_open(wire: Wire) -> None:
    async with (
        openai.AsyncOpenAI(base_url=f"{wire.address}/v1", api_key="a-key", max_retries=0) as gpt,
        anthropic.AsyncAnthropic(base_url=wire.address, api_key="a-key", max_retries=0) as claude,
        openai.AsyncAzureOpenAI(
            azure_endpoint=wire.address, api_key="a-key", api_version="2024-10-21", max_retries=0
        ) as azure,
    ):
        ask: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True}
        for call, owner, names in (
            (gpt.chat.completions.create, Provider(name="openai", base_url=f"{wire.address}/v1"), ["authorization"]),
            (
                claude.messages.create,
                Provider(name="anthropic", base_url=wire.address, api_version="2026-10-21"),
                ["anthropic-version"],
            ),
            (
                azure.chat.completions.create,
                Provider(name="azure", base_url=wire.address, api_version="2024-10-21"),
                ["api-key"],
            ),
        ):
            await call(**ask, **({"max_tokens": 5} if owner.name == "anthropic" else {}))
            line, theirs = head_of(wire)
            what = terms(owner, ProviderModel(name="m"))
            head = Heads(what).head(ProviderKey(id="1", text="a-key"), 17).decode()
            mine, *lines = head.removesuffix("\r\n\r\n").split("\r\n")
            headers = {name.lower(): value for name, _, value in (each.partition(": ") for each in lines)}
            assert mine == line
            assert [headers[name] for name in names] == [theirs[name] for name in names]
            assert (headers["host"], headers["content-type"]) == (theirs["host"], theirs["content-type"])
            assert headers["content-length"] == "17"
            if owner.name == "anthropic":  # it takes both forms of a key; ours is the one that older relays know too
                assert headers["x-api-key"] == theirs["authorization"].removeprefix("Bearer ")


def test_azure_without_a_version_of_its_interface_is_asked_by_its_newer_address() -> None:
    what = terms(Provider(name="azure", base_url="https://n.openai.azure.com"), ProviderModel(name="gpt", id="my dep"))
    assert what.url == "https://n.openai.azure.com/openai/v1/chat/completions"
    versioned = Provider(name="azure", base_url="https://n.openai.azure.com/", api_version="2024-10-21")
    assert terms(versioned, ProviderModel(name="gpt", id="my dep")).url == (
        "https://n.openai.azure.com/openai/deployments/my%20dep/chat/completions?api-version=2024-10-21"
    )


def test_own_headers_go_along_and_may_replace_the_key() -> None:
    headers = (("X-Team", "green"), ("Authorization", "Basic abc"), ("User-Agent", "mine"))
    what = terms(Provider(name="x", base_url="https://h/v1", headers=headers), ProviderModel(name="m"))
    head = Heads(what).head(ProviderKey(id="1", text="a-key"), 1)
    assert b"X-Team: green" in head
    assert b"Authorization: Basic abc" in head
    assert b"User-Agent: mine" in head
    assert b"a-key" not in head
    assert b"moltbot" not in head


def test_options_have_the_names_that_each_provider_gives_them() -> None:
    options = GenerationOptions(max_output_tokens=5, top_k=3, repetition_penalty=1.1, seed=4, stop=("x",))
    usual = {"max_tokens": 5, "stop": ["x"]}
    plain = ("model", "messages", "stream", "stream_options")
    found = {
        name: {key: value for key, value in ours(known(name), (said("x"),), options).items() if key not in plain}
        for name in ("vllm/m", "llamacpp/m", "mistral/mistral-large", "ollama/m", "anthropic/claude-haiku-4-5")
    }
    assert found == {
        "vllm/m": {**usual, "top_k": 3, "repetition_penalty": 1.1, "seed": 4},
        "llamacpp/m": {**usual, "top_k": 3, "repeat_penalty": 1.1, "seed": 4},
        "mistral/mistral-large": {**usual, "random_seed": 4},
        "ollama/m": {**usual, "seed": 4},
        "anthropic/claude-haiku-4-5": {"max_tokens": 5, "top_k": 3, "stop_sequences": ["x"]},
    }
    assert "top_k" not in ours(known("vllm/m"), (said("x"),), GenerationOptions(top_k=0))


def test_anthropic_always_gets_a_limit_for_its_answer() -> None:
    assert ours(known("opus-4.5"), (said("x"),))["max_tokens"] == 64_000


def test_speakers_take_turns_for_anthropic_and_nothing_empty_is_sent() -> None:
    messages = (
        said("One.", role=Role.SYSTEM),
        said("  "),
        said("a"),
        said("b"),
        said("", role=Role.ASSISTANT),
        said("c"),
        said("Two.", role=Role.SYSTEM),
        said("So far, ", role=Role.ASSISTANT),
    )
    found = ours(known("opus-4.5"), messages)
    assert found["system"] == "One.\n\nTwo."
    assert found["messages"] == [
        {"role": "user", "content": [{"type": "text", "text": text} for text in "abc"]},
        {"role": "assistant", "content": "So far,"},
    ]


def test_results_come_before_words_in_a_message_for_anthropic() -> None:
    result = ToolResultPart(call_id="c", tool="t", output="ok")
    found = ours(known("opus-4.5"), (said("Look: ", result),))
    assert [block["type"] for block in found["messages"][0]["content"]] == ["tool_result", "text"]


def test_pictures_of_earlier_turns_are_named_to_a_model_that_sees_none() -> None:
    picture = MediaPart(kind="image", data=PNG, alt_text="a cat")
    for name in ("deepseek-chat", "opus-4.5"):
        found = ours(known(name, vision=False), (said("See: ", picture),))
        assert "[image: a cat]" in json.dumps(found)
        assert "base64" not in json.dumps(found)


def test_the_kind_of_a_picture_is_found_in_its_bytes() -> None:
    for begin, kind in ((b"\xff\xd8\xff\xe0", "image/jpeg"), (PNG, "image/png"), (b"GIF89a", "image/gif")):
        found = ours(known("gpt-4o"), (said(MediaPart(kind="image", data=begin)),))
        assert found["messages"][0]["content"][0]["image_url"]["url"].startswith(f"data:{kind};base64,")


def test_arguments_that_an_earlier_model_spoilt_are_sent_as_none() -> None:
    call = ToolCallPart(call_id="c", tool="t", arguments_json="{broken")
    for name in ("gpt-4o", "opus-4.5"):
        found = json.dumps(ours(known(name), (said("x"), said(call, role=Role.ASSISTANT))))
        assert "broken" not in found


@pytest.mark.parametrize("model", ["gpt-4o", "openrouter/qwen/qwen3-max", "sonnet-4.6", "opus-5"])
def test_a_model_that_can_be_held_to_a_schema_is_told_so(model: str) -> None:
    strict = GenerationOptions(tools=(msgspec.structs.replace(TOOL, strict=True), TOOL))
    tools = ours(known(model), CONVERSATION, strict)["tools"]
    assert [tool.get("function", tool).get("strict") for tool in tools] == [True, None]


@pytest.mark.parametrize("model", ["deepseek-chat", "mistral-large", "claude-3-haiku"])
def test_a_model_that_may_not_know_of_strict_tools_is_asked_without(model: str) -> None:
    strict = GenerationOptions(tools=(msgspec.structs.replace(TOOL, strict=True),))
    assert ours(known(model), CONVERSATION, strict) == ours(
        known(model), CONVERSATION, GenerationOptions(tools=(TOOL,))
    )


@pytest.mark.parametrize("model", ["gpt-4o", "sonnet-4.6"])
def test_a_long_history_of_texts_is_written_without_a_call_for_each_message(model: str) -> None:
    what = known(model)
    short = (said("Hello"), said("Hi!", role=Role.ASSISTANT)) * 2
    assert calls_for(what, short * 20) == calls_for(what, short)


def test_thoughts_are_never_sent_back() -> None:
    found = ours(known("deepseek-reasoner"), (said("x"), said("y", role=Role.ASSISTANT)))
    assert found["messages"][1] == {"role": "assistant", "content": "y"}


@pytest.mark.parametrize(
    ("mode", "gpt", "claude"),
    [(ToolMode.AUTO, "auto", "auto"), (ToolMode.NONE, "none", "none"), (ToolMode.REQUIRED, "required", "any")],
)
def test_the_freedom_to_call_tools_is_passed_on(mode: ToolMode, gpt: str, claude: str) -> None:
    options = GenerationOptions(tools=(Tool(name="t"),), tool_choice=ToolChoice(mode=mode))
    assert ours(known("gpt-4o"), (said("x"),), options)["tool_choice"] == gpt
    found = ours(known("opus-4.5"), (said("x"),), options)
    assert found["tool_choice"] == {"type": claude}
    assert found["tools"] == [{"name": "t", "input_schema": {"type": "object", "properties": {}}}]
    assert "tool_choice" not in ours(
        known("gpt-4o"), (said("x"),), GenerationOptions(tool_choice=ToolChoice(mode=mode))
    )
