"""Remote models as engines: answers of the mock provider in both dialects, every fault of it, several keys, the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from moltbot_server.config_models import Price, Provider, ProviderModel
from moltbot_server.errors import (
    InvalidConfiguration,
    InvalidField,
    ModelCredential,
    ModelUnavailable,
    QueueFull,
    Unimplemented,
    UnsupportedContent,
    UnsupportedOption,
)
from moltbot_server.models.engine import Finished, Generation
from moltbot_server.models.providers import Cooldowns, ProviderEngine, resolve
from moltbot_server.testing_provider import MockProvider, Script
from moltbot_server.turns import (
    FinishReason,
    GenerationOptions,
    MediaPart,
    Tool,
    ToolCallPart,
    ToolChoice,
    ToolMode,
    Usage,
)
from provider_kit import DONE, HELLO, STOP, Heard, Ring, Wire, answered, provider, said, started, stream, word

SILENT = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n|PAUSE|"
DIALECTS = ("openai", "anthropic")
GREETING = "Grüße 你好 🙂 ¿qué tal?"
WEATHER = Tool(name="weather", parameters_json='{"type":"object"}')


@pytest.fixture
async def mock() -> AsyncIterator[MockProvider]:
    """A provider that greets."""
    async with MockProvider(Script.read({"text": GREETING})).running() as running:
        yield running


def follow(mock: MockProvider, *faults: dict[str, Any], **fields: Any) -> None:
    mock.follow(Script.read({"text": GREETING, "faults": list(faults), **fields}))


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_an_answer_comes_whole_with_what_it_used(mock: MockProvider, dialect: str) -> None:
    follow(mock, usage={"input": 7, "output": 9}, pace="2ms")
    async with started(provider(mock.address, dialect)) as engine:
        heard, end = await answered(engine)
    assert (heard.text, heard.thoughts) == (GREETING, "")
    assert (end.finish_reason, end.usage) == (FinishReason.STOP, Usage(input_tokens=7, output_tokens=9))
    assert end.attachments == ()
    assert end.first_token > 0
    assert end.generation > 0
    assert len(heard.pieces) > 2  # told as it came


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_thoughts_are_told_apart_from_the_answer(mock: MockProvider, dialect: str) -> None:
    follow(mock, reasoning="Let me see now")
    async with started(provider(mock.address, dialect)) as engine:
        heard, _ = await answered(engine)
    assert (heard.text, heard.thoughts) == (GREETING, "Let me see now")


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_calls_of_tools_are_put_together(mock: MockProvider, dialect: str) -> None:
    calls = [{"name": "weather", "arguments": {"city": "上海"}}, {"name": "weather", "arguments": {}}]
    mock.follow(Script.read({"tool_calls": calls, "pace": "1ms"}))
    async with started(provider(mock.address, dialect)) as engine:
        _, end = await answered(engine, options=GenerationOptions(tools=(WEATHER,)))
    assert end.finish_reason is FinishReason.TOOL_CALLS
    found = [part for part in end.attachments if isinstance(part, ToolCallPart)]
    assert [(part.tool, part.arguments_json.replace(" ", "")) for part in found] == [
        ("weather", '{"city":"上海"}'),
        ("weather", "{}"),
    ]
    assert len({part.call_id for part in found}) == 2


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_tool_that_was_not_offered_is_not_called(mock: MockProvider, dialect: str) -> None:
    mock.follow(Script.read({"tool_calls": [{"name": "rm", "arguments": {}}]}))
    async with started(provider(mock.address, dialect)) as engine:
        with pytest.raises(ModelUnavailable, match="a tool that it was not offered"):
            await answered(engine, options=GenerationOptions(tools=(WEATHER,)))


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_connections_are_used_again(mock: MockProvider, dialect: str) -> None:
    async with started(provider(mock.address, dialect)) as engine:
        for _ in range(5):
            await answered(engine)
        many = [Heard() for _ in range(4)]
        for heard in many:
            engine.begin(HELLO, GenerationOptions(), heard)
        assert engine.numbers["answers"] == 4
        for heard in many:
            await heard.finished()
        assert len(engine.pool) == 4
        assert engine.numbers["answers"] == 0


# --- faults ----------------------------------------------------------------------------------------------------------

FAULTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"kind": "error", "status": 500}, ModelUnavailable, r"failed \(500\)"),
    ({"kind": "error", "status": 503}, ModelUnavailable, r"failed \(503\)"),
    ({"kind": "error", "status": 529}, ModelUnavailable, r"failed \(529\)"),
    ({"kind": "rate_limit", "retry_after": 20}, QueueFull, "takes no more requests"),
    ({"kind": "unauthorized"}, ModelCredential, r"refuses the key \(401\)"),
    ({"kind": "wrong_content_type"}, ModelUnavailable, "a page for people"),
    ({"kind": "cut", "after": 0}, ModelUnavailable, "in the middle of an answer"),
    ({"kind": "cut", "after": 1}, ModelUnavailable, "in the middle of an answer"),
    ({"kind": "broken_sse", "how": "not_json"}, ModelUnavailable, "cannot be understood"),
    ({"kind": "broken_sse", "how": "truncated"}, ModelUnavailable, "(cannot be understood|broke off)"),
    ({"kind": "broken_sse", "how": "no_done"}, ModelUnavailable, r"ended without (\[DONE\]|message_stop)"),
    ({"kind": "hang"}, ModelUnavailable, "sent nothing for 0.2 s"),
    ({"kind": "hang_after_first"}, ModelUnavailable, "sent nothing for 0.2 s"),
]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("fault", "error", "text"),
    FAULTS,
    ids=lambda value: "_".join(map(str, value.values())) if isinstance(value, dict) else "",
)
async def test_each_fault_is_told_by_what_it_means(
    mock: MockProvider, dialect: str, fault: dict[str, Any], error: type[Exception], text: str
) -> None:
    follow(mock, fault, pace="1ms")
    later = [0.0]
    rests = Cooldowns(lambda: later[0])
    async with started(provider(mock.address, dialect, idle_timeout=0.2), cooldowns=rests) as engine:
        with pytest.raises(error, match=text):
            await answered(engine)
        follow(mock)
        later[0] += 3600
        heard, _ = await answered(engine)  # nothing of the fault is left behind
        assert heard.text == GREETING
        assert engine.numbers["answers"] == 0


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_an_answer_that_comes_to_no_end_is_ended(mock: MockProvider, dialect: str) -> None:
    follow(mock, {"kind": "endless"}, pace="5ms")
    async with started(provider(mock.address, dialect, idle_timeout=5.0, answer_timeout=0.4)) as engine:
        with pytest.raises(ModelUnavailable, match=r"mock did not come to an end within 0\.4 s\.$"):
            await asyncio.wait_for(answered(engine), 5)
        assert engine.numbers["answers"] == 0


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_provider_that_ignores_the_limit_is_stopped_beyond_it(mock: MockProvider, dialect: str) -> None:
    follow(mock, text="word and word again " * 1000, chunks=4000, pace="1ms")
    async with started(provider(mock.address, dialect)) as engine:
        heard, end = await answered(engine, options=GenerationOptions(max_output_tokens=100))
    assert end.finish_reason is FinishReason.LENGTH
    assert 100 < len(heard.text.split()) < 1000
    assert end.usage.output_tokens > 100


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_an_answer_in_tiny_pieces_is_not_taken_for_a_long_one(mock: MockProvider, dialect: str) -> None:
    follow(mock, text="letter by letter " * 20, chunks=340)
    async with started(provider(mock.address, dialect)) as engine:
        heard, end = await answered(engine, options=GenerationOptions(max_output_tokens=64))
    assert (heard.text, end.finish_reason) == ("letter by letter " * 20, FinishReason.STOP)


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_characters_that_are_cut_in_two_arrive_whole(mock: MockProvider, dialect: str) -> None:
    follow(mock, {"kind": "split_utf8"}, reasoning="想一想")
    async with started(provider(mock.address, dialect)) as engine:
        heard, _ = await answered(engine)
    assert (heard.text, heard.thoughts) == (GREETING, "想一想")


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_an_answer_without_a_word_is_an_answer(mock: MockProvider, dialect: str) -> None:
    follow(mock, {"kind": "empty"})
    async with started(provider(mock.address, dialect)) as engine:
        heard, end = await answered(engine)
    assert (heard.text, end.finish_reason) == ("", FinishReason.STOP)


async def test_a_slow_first_word_is_waited_for_within_the_limit(mock: MockProvider) -> None:
    follow(mock, {"kind": "slow", "by": "300ms"})
    async with started(provider(mock.address, idle_timeout=5.0)) as engine:
        heard, end = await answered(engine)
    assert heard.text == GREETING
    assert end.first_token >= 0.3


async def test_a_provider_that_is_not_there_is_told_as_such() -> None:
    async with Wire(b"").running() as wire:
        gone = wire.address
    async with started(provider(gone)) as engine:
        with pytest.raises(
            ModelUnavailable, match=r"mock cannot answer: it cannot be reached \(Connection refused\)\.$"
        ):
            await answered(engine)


async def test_a_name_that_nobody_knows_is_told_as_such() -> None:
    async with started(provider("http://no-such-host-of-ours.invalid.local", connect_timeout=5.0)) as engine:
        with pytest.raises(ModelUnavailable, match=r"name of its host is not known|could not be reached"):
            await answered(engine)


async def test_stopping_closes_the_connection_at_once_and_nothing_more_is_heard() -> None:
    async with Wire(SILENT).running() as wire, started(provider(wire.address)) as engine:
        heard = Heard()
        generation = engine.begin(HELLO, GenerationOptions(), heard)
        await wire.asked.wait()
        generation.stop()
        async with asyncio.timeout(0.2):
            await wire.empty.wait()
        generation.stop()
        assert not heard.end.done()
        assert engine.numbers["answers"] == 0


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_nothing_is_heard_after_a_stop_in_the_middle_of_what_has_come(mock: MockProvider, dialect: str) -> None:
    follow(mock, reasoning="one two")

    class Impatient(Heard):
        generation: Generation

        def thought(self, text: str) -> None:
            super().thought(text)
            self.generation.stop()
            stopped.set()

    stopped = asyncio.Event()
    async with started(provider(mock.address, dialect)) as engine:
        heard = Impatient()
        heard.generation = engine.begin(HELLO, GenerationOptions(), heard)
        await asyncio.wait_for(stopped.wait(), 10)
        again, _ = await answered(engine)
        assert again.text == GREETING
        assert (heard.thoughts, heard.text, heard.end.done()) == ("one two", "", False)


async def test_stopping_before_there_is_a_connection_leaves_none() -> None:
    async with Wire(stream(word("x"), STOP, DONE)).running() as wire, started(provider(wire.address)) as engine:
        heard = Heard()
        engine.begin(HELLO, GenerationOptions(), heard).stop()
        again, _ = await answered(engine)
        assert again.text == "x"
        assert not heard.end.done()


async def test_closing_ends_what_runs_with_an_error() -> None:
    async with Wire(SILENT).running() as wire:
        async with started(provider(wire.address)) as engine:
            heard = Heard()
            engine.begin(HELLO, GenerationOptions(), heard)
            await wire.asked.wait()
        with pytest.raises(ModelUnavailable, match="was taken away"):
            await heard.finished()
        assert not engine.healthy
        with pytest.raises(ModelUnavailable, match="not started"):
            engine.begin(HELLO, GenerationOptions(), Heard())


# --- what it says of itself ------------------------------------------------------------------------------------------


async def test_an_engine_tells_what_its_model_can_do() -> None:
    engine = ProviderEngine(Provider(name="openai"), ProviderModel(name="gpt-4o-mini"), keys=Ring("sk-aaaa"))
    can = engine.capabilities
    assert (engine.id, engine.type, engine.is_route, engine.rest) == ("gpt-4o-mini", "openai", False, 0)
    assert (can.context_length, can.image_input, can.tools, can.sampling, can.stop) == (128_000, True, True, True, True)
    assert not can.token_counts
    assert engine.price == Price(input=0.15, output=0.6, cached_input=0.075)
    with pytest.raises(Unimplemented):
        await engine.embed(["x"])


@pytest.mark.parametrize(
    ("name", "options", "error"),
    [
        ("openai/gpt-4o", GenerationOptions(top_k=5), UnsupportedOption),
        ("openai/gpt-4o", GenerationOptions(stop=tuple("abcde")), InvalidField),
        ("openai/gpt-5-mini", GenerationOptions(temperature=0.5), UnsupportedOption),
        ("anthropic/claude-sonnet-4-5", GenerationOptions(seed=1), UnsupportedOption),
        ("anthropic/claude-sonnet-4-5", GenerationOptions(temperature=1.5), InvalidField),
        ("anthropic/claude-opus-5-5", GenerationOptions(temperature=0.5), UnsupportedOption),
        (
            "anthropic/claude-opus-5-5",
            GenerationOptions(tool_choice=ToolChoice(mode=ToolMode.REQUIRED)),
            UnsupportedOption,
        ),
        ("deepseek/deepseek-chat", GenerationOptions(seed=1), UnsupportedOption),
        ("openai/gpt-4o", GenerationOptions(temperature=3), InvalidField),
    ],
)
def test_options_that_a_provider_would_ignore_are_refused(
    name: str, options: GenerationOptions, error: type[InvalidField]
) -> None:
    engine = ProviderEngine(*resolve(name, ()))
    with pytest.raises(error):
        engine.check(options)


def test_options_that_it_honours_are_taken() -> None:
    engine = ProviderEngine(*resolve("openrouter/qwen/qwen3-max", ()))
    engine.check(GenerationOptions(temperature=1.5, top_p=0.5, top_k=5, seed=1, repetition_penalty=1.1, stop=("a",)))
    engine.check(GenerationOptions(tools=(WEATHER,), tool_choice=ToolChoice(tool="weather")))


async def test_a_picture_that_a_provider_cannot_fetch_is_refused_before_anything_is_sent() -> None:
    model = ProviderModel(name="m", vision=True)
    async with Wire(b"").running() as wire, started(provider(wire.address), model=model) as engine:
        picture = MediaPart(kind="image", uri="gs://bucket/cat.png")
        with pytest.raises(UnsupportedContent):
            engine.begin((said("What is this?", picture),), GenerationOptions(), Heard())
        assert (wire.connections, engine.numbers["answers"]) == (0, 0)


async def test_tokens_are_guessed_rather_too_many_than_too_few() -> None:
    async with started(provider("http://127.0.0.1:1")) as engine:
        english = "The quick brown fox jumps over the lazy dog. " * 20
        chinese = "敏捷的棕色狐狸跳过了懒狗。" * 20
        assert 200 <= await engine.tokens(english) <= 320  # 201 in o200k
        assert 200 <= await engine.tokens(chinese) <= 320  # 260 characters
        assert engine.count(said("")) < 10
        assert engine.count(said(MediaPart(kind="image", uri="https://x/y.png"))) > 1000
        assert await engine.tokens("") == 0


def test_an_address_that_would_show_keys_to_the_world_is_refused() -> None:
    for address in (
        "http://api.example.com/v1",
        "ftp://x",
        "https://user:word@host/v1",
        "https://host/v1?key=1",
        "nonsense",
    ):
        with pytest.raises(InvalidConfiguration, match=r"providers\.mock\.base_url"):
            ProviderEngine(provider(address), ProviderModel(name="m"))
    for address in (
        "http://192.168.1.5:8000/v1",
        "http://vllm:8000",
        "http://gpu.lan/v1",
        "https://api.example.com/v1",
    ):
        ProviderEngine(provider(address), ProviderModel(name="m"))


def test_a_header_that_would_break_the_request_is_refused() -> None:
    for header in (
        ("X-A", "b\r\nHost: evil"),
        ("Host", "evil"),
        ("bad name", "x"),
        ("Content-Length", "1"),
        ("X", "ü"),
    ):
        with pytest.raises(InvalidConfiguration, match=r"providers\.mock\.headers"):
            ProviderEngine(provider("http://127.0.0.1:1", headers=(header,)), ProviderModel(name="m"))


async def test_an_answer_that_both_ends_and_is_stopped_ends_once(mock: MockProvider) -> None:
    async with started(provider(mock.address)) as engine:
        heard = Heard()
        generation = engine.begin(HELLO, GenerationOptions(), heard)
        assert isinstance(await heard.finished(), Finished)
        generation.stop()
        again, _ = await answered(engine)
        assert again.text == GREETING
