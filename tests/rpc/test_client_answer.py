"""The Python client where an answer is more than text: what was taken back, thoughts, tools."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from moltbot import Answer, MoltBot
from moltbot.errors import from_event
from moltbot.tools import arguments, result, tool
from moltbot.v1 import chat_pb2, message_pb2
from moltbot_server.config_models import Provider, ProviderModel
from moltbot_server.models.providers.engine import ProviderEngine
from moltbot_server.models.providers.keys import ProviderKey
from moltbot_server.testing import running_server
from moltbot_server.testing_provider import MockProvider, Script

SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "examples": ["Paris"]}}, "required": ["city"]}


class OneKey:
    """A ring with one key."""

    def keys(self, provider: str) -> Sequence[ProviderKey]:
        """Return the key."""
        return (ProviderKey(id="k", text="a-good-key"),)


@asynccontextmanager
async def asking(folder: Path, **script: object) -> AsyncIterator[MoltBot]:
    """A client of a core whose model is a remote one that follows a script."""
    async with MockProvider(Script.read(script)).running() as mock:
        where = Provider(name="mock", dialect="openai", base_url=f"{mock.address}/v1")
        model = ProviderModel(name="mock-model", context_length=8000, tools=True, reasoning=True)
        engine = ProviderEngine(where, model, keys=OneKey())
        async with running_server(folder, engine=engine, grace=0.2) as core, MoltBot(core.address, core.key) as bot:
            yield bot


def test_what_was_taken_back_is_no_part_of_an_answer() -> None:
    answer = Answer()
    told: list[tuple[chat_pb2.Event, str, str]] = [
        (chat_pb2.Event(routed=chat_pb2.Routed(model="models/a")), "", ""),
        (chat_pb2.Event(reasoning_delta=chat_pb2.ReasoningDelta(text="Hm.")), "", "Hm."),
        (chat_pb2.Event(text_delta=chat_pb2.TextDelta(text="Wrong")), "Wrong", "Hm."),
        (chat_pb2.Event(reset=chat_pb2.Reset(text="Ri")), "Ri", ""),
        (chat_pb2.Event(text_delta=chat_pb2.TextDelta(text="ght")), "Right", ""),
    ]
    for event, text, reasoning in told:
        answer.add(event)
        assert (answer.text, answer.reasoning) == (text, reasoning)
    assert (answer.model, answer.completed, answer.tool_calls) == ("models/a", None, [])
    answer.add(chat_pb2.Event(completed=chat_pb2.Completed(text="Right.", model="models/b")))
    assert (answer.text, answer.model) == ("Right.", "models/b")


async def test_an_answer_is_put_together_from_its_events(tmp_path: Path) -> None:
    async with asking(tmp_path, reasoning="One two", text="three four") as bot:
        answer = Answer()
        async for event in bot.stream_turn("Hi"):
            answer.add(event)
    assert (answer.text, answer.reasoning, answer.model) == ("three four", "One two", "models/mock-model")


async def test_a_tool_is_offered_asked_for_and_answered(tmp_path: Path) -> None:
    options = message_pb2.GenerationOptions(tools=[tool("weather", "Tells the weather.", SCHEMA), tool("clock")])
    async with asking(tmp_path, use_tools=True) as bot:
        first = await bot.run_turn("How is it?", options=options)
        assert first.completed.finish_reason == message_pb2.FINISH_REASON_TOOL_CALLS
        (call,) = first.tool_calls
        assert (call.tool, arguments(call)) == ("weather", {"city": "Paris"})
        second = await bot.run_turn([result(call, {"sky": "blue"})], session=first.session, options=options)
    assert second.text == 'The tool answered: {"sky": "blue"}'


def test_arguments_that_are_no_object_are_told() -> None:
    assert arguments(message_pb2.ToolCall(call_id="c", tool="t")) == {}
    for wrong in ("[1]", "{"):
        with pytest.raises(ValueError, match=r"object|Expecting"):
            arguments(message_pb2.ToolCall(arguments_json=wrong))


def test_a_field_that_a_turn_fails_by_is_named() -> None:
    failed = chat_pb2.Failed(
        code=3, reason="CONTEXT_LENGTH_EXCEEDED", message="turn.parts: too long", field="turn.parts"
    )
    assert from_event(failed).fields == {"turn.parts": "too long"}
