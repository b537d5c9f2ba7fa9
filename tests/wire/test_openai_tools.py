"""Tools and thoughts by the official OpenAI client, unchanged, against the adapter."""

import json
from collections.abc import AsyncIterator

import grpc
import openai
import pytest
from google.protobuf.duration_pb2 import Duration
from moltbot.v1 import chat_pb2, message_pb2
from running_adapter import Adapter
from scripted_core import KEY, Refusal

HELLO = [{"role": "user", "content": "hello"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "description": "城市"}}, "required": ["city"]}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells the weather.", "parameters": SCHEMA},
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
PARIS = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Paris"}'}}
OSLO = {"id": "c2", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Oslo"}'}}


@pytest.fixture
async def client(adapter: Adapter) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=adapter.api, api_key=KEY, max_retries=0) as client:
        yield client


def _calls(*ids: str) -> chat_pb2.Completed:
    """Returns what an answer says besides its text that asks for the weather of a city for each id."""
    cities = {"c1": "Paris", "c2": "Oslo"}
    parts = [
        message_pb2.Part(
            tool_call=message_pb2.ToolCall(
                call_id=each, tool="weather", arguments_json=json.dumps({"city": cities[each]}, separators=(",", ":"))
            )
        )
        for each in ids
    ]
    return chat_pb2.Completed(attachments=parts)


def _asks_for(core, *ids: str, pieces: tuple[str, ...] = ()) -> None:
    core.script.pieces = pieces
    core.script.finish = message_pb2.FINISH_REASON_TOOL_CALLS
    core.script.completion = _calls(*ids)


async def test_tools_and_the_choice_among_them_reach_the_core(client, core):
    await client.chat.completions.create(
        model="moltbot",
        messages=HELLO,
        tools=[WEATHER, CLOCK],
        tool_choice={"type": "function", "function": {"name": "clock"}},
    )
    options = core.turns[0].input.options
    assert [(tool.name, tool.description) for tool in options.tools] == [
        ("weather", "Tells the weather."),
        ("clock", ""),
    ]
    assert json.loads(options.tools[0].parameters_json) == SCHEMA
    assert options.tools[1].parameters_json == ""
    assert options.tool_choice == message_pb2.ToolChoice(mode=message_pb2.TOOL_MODE_REQUIRED, tool="clock")


async def test_a_wish_to_hold_the_model_to_the_schema_reaches_the_core(client, core):
    strict, loose = (
        {"type": "function", "function": {**tool["function"], "strict": tool is CLOCK}} for tool in (CLOCK, WEATHER)
    )
    await client.chat.completions.create(model="moltbot", messages=HELLO, tools=[strict, loose])
    assert [tool.strict for tool in core.turns[0].input.options.tools] == [True, False]


@pytest.mark.parametrize("mode", ["auto", "none", "required"])
async def test_how_free_the_model_is_to_ask_for_tools_reaches_the_core(client, core, mode):
    await client.chat.completions.create(model="moltbot", messages=HELLO, tools=[CLOCK], tool_choice=mode)
    choice = core.turns[0].input.options.tool_choice
    assert message_pb2.ToolMode.Name(choice.mode) == f"TOOL_MODE_{mode.upper()}"


async def test_no_choice_is_made_where_there_are_no_tools(client, core):
    await client.chat.completions.create(
        model="moltbot", messages=HELLO, tools=[], tool_choice="auto", parallel_tool_calls=True
    )
    assert core.turns[0].input.options == message_pb2.GenerationOptions()


async def test_an_answer_may_ask_for_tools(client, core):
    _asks_for(core, "c1", "c2")
    answer = await client.chat.completions.create(model="moltbot", messages=HELLO, tools=[WEATHER])
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert [call.model_dump() for call in choice.message.tool_calls] == [PARIS, OSLO]


async def test_tools_are_asked_for_in_a_stream_too(client, core):
    _asks_for(core, "c1", "c2", pieces=("Let me ", "look."))
    async with client.chat.completions.stream(model="moltbot", messages=HELLO, tools=[WEATHER]) as stream:
        kinds = {event.type async for event in stream}
        choice = (await stream.get_final_completion()).choices[0]
    assert {"content.delta", "tool_calls.function.arguments.done"} <= kinds
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me look.")
    told = [(call.id, call.function.name, call.function.arguments) for call in choice.message.tool_calls]
    assert told == [("c1", "weather", '{"city":"Paris"}'), ("c2", "weather", '{"city":"Oslo"}')]


async def test_a_stream_without_a_word_asks_for_tools(client, core):
    _asks_for(core, "c1")
    chunks = [
        chunk
        async for chunk in await client.chat.completions.create(
            model="moltbot", messages=HELLO, tools=[WEATHER], stream=True
        )
    ]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[1].choices[0].delta.tool_calls[0].model_dump() == {"index": 0, **PARIS}
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, "tool_calls"]


@pytest.mark.parametrize("streamed", [False, True])
async def test_who_wants_one_call_at_a_time_is_told_of_one(client, core, streamed):
    _asks_for(core, "c1", "c2")
    asked = {"model": "moltbot", "messages": HELLO, "tools": [WEATHER], "parallel_tool_calls": False}
    if streamed:
        async with client.chat.completions.stream(**asked) as stream:
            message = (await stream.get_final_completion()).choices[0].message
    else:
        message = (await client.chat.completions.create(**asked)).choices[0].message
    assert [call.id for call in message.tool_calls] == ["c1"]


async def test_what_tools_answered_is_the_newest_message_and_names_them(client, core):
    await client.chat.completions.create(
        model="moltbot",
        messages=[
            *HELLO,
            {"role": "assistant", "content": "Let me look.", "tool_calls": [PARIS, OSLO]},
            {"role": "tool", "tool_call_id": "c2", "content": "rain"},
            {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "sun"}]},
        ],
        tools=[WEATHER],
    )
    turn = core.turns[0].input
    result, part = message_pb2.ToolResult, message_pb2.Part
    assert list(turn.parts) == [
        part(tool_result=result(call_id="c2", tool="weather", output="rain")),
        part(tool_result=result(call_id="c1", tool="weather", output="sun")),
    ]
    roles = [message.role for message in turn.transcript.messages]
    assert roles == [message_pb2.ROLE_USER, message_pb2.ROLE_ASSISTANT]
    said = turn.transcript.messages[1].parts
    assert [part.WhichOneof("content") for part in said] == ["text", "tool_call", "tool_call"]


async def test_in_a_session_the_core_has_the_call_that_a_tool_answers(client, core):
    await client.chat.completions.create(
        model="moltbot",
        messages=[{"role": "tool", "tool_call_id": "c1", "content": "sun"}],
        tools=[WEATHER],
        extra_headers={"X-Session-Id": "trip"},
    )
    turn = core.turns[0].input
    assert turn.session == "sessions/trip"
    assert list(turn.parts) == [message_pb2.Part(tool_result=message_pb2.ToolResult(call_id="c1", output="sun"))]


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [WEATHER, {"type": "function"}]}, "tools[1].function"),
        ({"tools": [{"type": "function", "function": {"name": 5}}]}, "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
            "tools[0].function.parameters",
        ),
        ({"tools": [{"type": "function", "function": {"name": "f", "strict": "yes"}}]}, "tools[0].function.strict"),
        ({"tools": "all"}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tools": [CLOCK], "parallel_tool_calls": "no"}, "parallel_tool_calls"),
        (
            {"tools": [CLOCK], "parallel_tool_calls": False, "extra_headers": {"X-Session-Id": "trip"}},
            "parallel_tool_calls",
        ),
        ({"messages": [*HELLO, {"role": "assistant", "content": "hi"}]}, "messages"),
        ({"messages": [*HELLO, {"role": "tool", "tool_call_id": "c9", "content": "x"}]}, "messages[1].tool_call_id"),
        ({"messages": [*HELLO, {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id"),
        (
            {
                "messages": [
                    *HELLO,
                    {"role": "assistant", "tool_calls": [PARIS]},
                    {
                        "role": "tool",
                        "tool_call_id": "c1",
                        "content": [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}],
                    },
                ]
            },
            "messages[2].content",
        ),
    ],
)
async def test_a_wrong_word_about_tools_is_refused_by_name(client, core, asked, param):
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(**{"model": "moltbot", "messages": HELLO, **asked})
    assert caught.value.param == param
    assert core.calls == []


async def test_a_model_without_tools_names_the_parameter(client, core):
    core.script.refusals = [
        Refusal(
            code=grpc.StatusCode.INVALID_ARGUMENT,
            reason="UNSUPPORTED_OPTION",
            message="turn.options.tools: this model cannot honour it; leave it out",
            field="turn.options.tools",
        )
    ]
    with pytest.raises(openai.BadRequestError, match="tools: this model cannot") as caught:
        await client.chat.completions.create(model="moltbot", messages=HELLO, tools=[CLOCK])
    assert (caught.value.code, caught.value.param) == ("unsupported_value", "tools")


async def test_a_picture_from_an_open_address_is_refused(client, core):
    picture = {"type": "image_url", "image_url": {"url": "http://example.org/a.png"}}
    with pytest.raises(openai.BadRequestError, match="https") as caught:
        await client.chat.completions.create(model="moltbot", messages=[{"role": "user", "content": [picture]}])
    assert caught.value.param == "messages[0].content[0].image_url.url"
    assert core.calls == []


async def test_thoughts_come_beside_the_answer(client, core):
    core.script.completion = chat_pb2.Completed(reasoning="Hm. Let me see.")
    answer = await client.chat.completions.create(model="moltbot", messages=HELLO)
    message = answer.choices[0].message
    assert (message.content, message.model_extra["reasoning_content"]) == ("Hello, world!", "Hm. Let me see.")


@pytest.mark.parametrize("thoughts", [("Hm. ", "Let me see."), ()])
async def test_thoughts_stream_before_the_answer_and_apart_from_it(client, core, thoughts):
    core.script.thoughts = thoughts
    core.script.completion = chat_pb2.Completed(reasoning="Hm. Let me see.")
    stream = await client.chat.completions.create(model="moltbot", messages=HELLO, stream=True)
    deltas = [chunk.choices[0].delta async for chunk in stream]
    assert "".join(delta.content or "" for delta in deltas) == "Hello, world!"
    thought = [(delta.model_extra or {}).get("reasoning_content", "") for delta in deltas]
    assert "".join(thought) == "Hm. Let me see."
    assert deltas[0].role == "assistant"
    if thoughts:
        assert thought[1:3] == list(thoughts)


async def test_each_chunk_names_the_model_that_wrote_it(client, core):
    core.script.switch = "models/openrouter/meta-llama/llama-3:free"
    core.script.completion = chat_pb2.Completed(model=core.script.switch)
    stream = await client.chat.completions.create(model="moltbot", messages=HELLO, stream=True)
    models = [chunk.model async for chunk in stream]
    assert models == ["demo", "demo"] + ["openrouter/meta-llama/llama-3:free"] * 4


async def test_a_model_may_be_named_with_its_provider(client, core):
    answer = await client.chat.completions.create(model="openrouter/meta-llama/llama-3:free", messages=HELLO)
    assert core.turns[0].input.model == "models/openrouter/meta-llama/llama-3:free"
    assert answer.model == "openrouter/meta-llama/llama-3:free"


async def test_a_cached_answer_says_so(client, core):
    core.script.completion = chat_pb2.Completed(cached=True)
    raw = await client.chat.completions.with_raw_response.create(model="moltbot", messages=HELLO)
    assert raw.headers["x-moltbot-cached"] == "true"
    assert raw.parse().model_extra["cached"] is True
    stream = await client.chat.completions.create(model="moltbot", messages=HELLO, stream=True)
    assert [chunk async for chunk in stream][-1].model_extra["cached"] is True
    core.script.completion = chat_pb2.Completed()
    raw = await client.chat.completions.with_raw_response.create(model="moltbot", messages=HELLO)
    assert "x-moltbot-cached" not in raw.headers
    assert raw.parse().model_extra["cached"] is False


async def test_the_models_that_were_asked_are_told_with_the_times(client, core):
    attempts = [
        chat_pb2.Attempt(
            model="models/a", outcome="MODEL_UNAVAILABLE", reason="HTTP 503", total=Duration(nanos=5_000_000)
        ),
        chat_pb2.Attempt(
            model="models/demo",
            outcome="ANSWERED",
            start=Duration(nanos=5_000_000),
            first_token=Duration(nanos=2_000_000),
            total=Duration(nanos=7_000_000),
        ),
    ]
    core.script.completion = chat_pb2.Completed(timings=chat_pb2.Timings(attempt_log=attempts))
    answer = await client.chat.completions.create(model="moltbot", messages=HELLO)
    assert answer.model_extra["timings"]["attempt_log"] == [
        {
            "model": "a",
            "outcome": "MODEL_UNAVAILABLE",
            "reason": "HTTP 503",
            "start_ms": 0,
            "first_token_ms": None,
            "total_ms": 5,
        },
        {"model": "demo", "outcome": "ANSWERED", "reason": "", "start_ms": 5, "first_token_ms": 2, "total_ms": 7},
    ]


async def test_a_budget_that_is_used_up_is_a_quota_and_is_not_tried_again(adapter, core):
    core.script.refusals = [
        Refusal(code=grpc.StatusCode.RESOURCE_EXHAUSTED, reason="BUDGET_EXCEEDED", message="used up", retry_s=5.0)
    ] * 2
    async with openai.AsyncOpenAI(base_url=adapter.api, api_key=KEY, max_retries=1) as client:
        with pytest.raises(openai.RateLimitError) as caught:
            await client.chat.completions.create(model="moltbot", messages=HELLO)
    assert (caught.value.code, caught.value.type) == ("insufficient_quota", "insufficient_quota")
    assert caught.value.response.headers["retry-after"] == "5"
    assert core.names() == ["RunTurn"]


async def test_a_provider_without_a_key_is_the_servers_fault_and_is_not_tried_again(adapter, core):
    core.script.refusals = [
        Refusal(code=grpc.StatusCode.FAILED_PRECONDITION, reason="MODEL_CREDENTIAL", message="openai has no key")
    ] * 2
    async with openai.AsyncOpenAI(base_url=adapter.api, api_key=KEY, max_retries=1) as client:
        with pytest.raises(openai.InternalServerError, match="openai has no key") as caught:
            await client.chat.completions.create(model="moltbot", messages=HELLO)
    assert (caught.value.status_code, caught.value.code) == (503, "model_credential")
    assert core.names() == ["RunTurn"]
