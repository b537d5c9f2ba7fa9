"""The official OpenAI client, unchanged, against the adapter."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import openai
import pytest
from google.protobuf.duration_pb2 import Duration
from moltbot.v1 import chat_pb2, message_pb2
from running_adapter import Adapter
from scripted_core import KEY, Refusal

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
async def client(adapter: Adapter) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=adapter.api, api_key=KEY, max_retries=0) as client:
        yield client


async def test_an_answer_comes_whole(client, core):
    answer = await client.chat.completions.create(model="moltbot", messages=HELLO)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", "Hello, world!")
    assert (choice.finish_reason, choice.index, answer.object) == ("stop", 0, "chat.completion")
    assert answer.model == "demo"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (7, 4, 11)
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
    assert answer.model_extra["timings"]["total_ms"] == 12.5
    assert core.names() == ["RunTurn"]


async def test_an_answer_streams_in_well_formed_chunks(client):
    stream = await client.chat.completions.create(
        model="moltbot", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert {(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks} == {
        (chunks[0].id, chunks[0].created, "demo", "chat.completion.chunk")
    }
    *spoken, last, usage = chunks
    assert (spoken[0].choices[0].delta.role, spoken[0].choices[0].delta.content) == ("assistant", "")
    assert [chunk.choices[0].delta.content for chunk in spoken[1:]] == ["Hello", ", ", "world", "!"]
    assert all(chunk.choices[0].finish_reason is None and chunk.usage is None for chunk in spoken)
    assert (last.choices[0].finish_reason, last.choices[0].delta.content) == ("stop", None)
    assert (usage.choices, usage.usage.total_tokens) == ([], 11)


async def test_no_usage_chunk_comes_unasked(client):
    stream = await client.chat.completions.create(model="moltbot", messages=HELLO, stream=True)
    chunks = [chunk async for chunk in stream]
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


async def test_the_synchronous_client_works_too(adapter):
    def ask() -> tuple[str, str]:
        with openai.OpenAI(base_url=adapter.api, api_key=KEY, max_retries=0) as client:
            whole = client.chat.completions.create(model="moltbot", messages=HELLO).choices[0].message.content
            with client.chat.completions.create(model="moltbot", messages=HELLO, stream=True) as stream:
                return whole, "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    assert await asyncio.to_thread(ask) == ("Hello, world!", "Hello, world!")


async def test_every_character_survives_the_stream(client, core):
    core.script.pieces = ("你好 🦀\n", 'q"\\', "\u2028\x85\r\n", "\x00\x1f", "é\u0301 👩‍👩‍👧", "end")
    stream = await client.chat.completions.create(model="moltbot", messages=HELLO, stream=True)
    assert [c.choices[0].delta.content async for c in stream][1:-1] == list(core.script.pieces)


async def test_the_first_chunk_comes_before_the_last_is_known(client, core):
    core.script.gate = asyncio.Event()
    stream = await client.chat.completions.create(model="moltbot", messages=HELLO, stream=True)
    first = [await anext(stream), await anext(stream)]
    assert first[1].choices[0].delta.content == "Hello"
    core.script.gate.set()
    assert "".join([c.choices[0].delta.content or "" async for c in stream]) == ", world!"


async def test_messages_become_a_closed_transcript(client, core):
    await client.chat.completions.create(
        model="demo",
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "two"},
            {"role": "system", "content": "Now in French."},
            {"role": "user", "content": [{"type": "text", "text": "three"}, {"type": "text", "text": "four"}]},
        ],
        temperature=0.5,
        top_p=0.9,
        max_completion_tokens=50,
        stop=["END", "STOP"],
        seed=42,
        user="u-1",
        frequency_penalty=0,
        extra_body={"top_k": 40, "repetition_penalty": 1.25},
    )
    turn = core.turns[0].input
    part = message_pb2.Part
    assert list(turn.transcript.messages) == [
        message_pb2.Message(role=message_pb2.ROLE_USER, parts=[part(text="one")]),
        message_pb2.Message(role=message_pb2.ROLE_ASSISTANT, parts=[part(text="two")]),
        message_pb2.Message(role=message_pb2.ROLE_SYSTEM, parts=[part(text="Now in French.")]),
    ]
    assert list(turn.parts) == [part(text="three"), part(text="four")]
    assert turn.options == message_pb2.GenerationOptions(
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        repetition_penalty=1.25,
        max_output_tokens=50,
        stop=["END", "STOP"],
        seed=42,
    )
    assert (turn.system_prompt, turn.model, turn.session) == ("Be brief.\n\nBe kind.", "models/demo", "")
    assert (turn.user, turn.channel, turn.cancel_on_disconnect) == ("u-1", "api", False)
    assert len(turn.request_id) == 32


async def test_a_single_message_is_a_closed_transcript_too(client, core):
    await client.chat.completions.create(model="moltbot", messages=HELLO)
    turn = core.turns[0].input
    assert turn.HasField("transcript")
    assert not turn.transcript.messages
    assert turn.model == ""


async def test_a_session_header_gives_the_turn_a_memory(client, core):
    answer = await client.chat.completions.with_raw_response.create(
        model="moltbot",
        messages=[{"role": "user", "content": "old"}, {"role": "assistant", "content": "x"}, *HELLO],
        extra_headers={"X-Session-Id": "chat-7"},
    )
    turn = core.turns[0].input
    assert (turn.session, turn.HasField("transcript")) == ("sessions/chat-7", False)
    assert [part.text for part in turn.parts] == ["hello"]
    assert answer.headers["x-session-id"] == "chat-7"


async def test_pictures_sounds_and_files_become_parts(client, core):
    await client.chat.completions.create(
        model="moltbot",
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "look"},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw=="}},
                    {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
                    {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}},
                    {
                        "type": "file",
                        "file": {"file_data": "data:application/pdf;base64,JVBERg==", "filename": "a.pdf"},
                    },
                ],
            }
        ],
    )
    media, part = message_pb2.Media, message_pb2.Part
    assert list(core.turns[0].input.parts) == [
        part(text="look"),
        part(image=media(data=b"\x89PNG", media_type="image/png")),
        part(image=media(uri="https://example.org/a.png")),
        part(audio=media(data=b"RIFF", media_type="audio/wav")),
        part(file=media(data=b"%PDF", media_type="application/pdf", filename="a.pdf")),
    ]


async def test_tool_calls_of_the_past_are_kept(client, core):
    call = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    await client.chat.completions.create(
        model="moltbot",
        messages=[
            *HELLO,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "noon"},
            *HELLO,
        ],
    )
    said = core.turns[0].input.transcript.messages
    assert said[1].parts[0].tool_call == message_pb2.ToolCall(call_id="c1", tool="clock", arguments_json="{}")
    assert said[2].parts[0].tool_result == message_pb2.ToolResult(call_id="c1", tool="clock", output="noon")


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": -1}, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"extra_body": {"min_p": 0.1}}, "min_p"),
        ({"extra_body": {"something_new": {"deep": [1]}}}, "something_new"),
        ({"moderation": {"model": "omni-moderation-latest"}}, "moderation"),
    ],
)
async def test_what_cannot_be_honoured_is_refused_by_name(client, core, asked, param):
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="moltbot", messages=HELLO, **asked)
    assert (caught.value.code, caught.value.param, caught.value.type) == (
        "unsupported_value",
        param,
        "invalid_request_error",
    )
    assert core.calls == []


async def test_what_changes_nothing_is_taken(client, core):
    await client.chat.completions.create(
        model="moltbot",
        messages=[{"role": "user", "content": "hello", "name": "ada"}],
        metadata={"team": "a"},
        store=True,
        service_tier="auto",
        safety_identifier="s",
        prediction={"type": "content", "content": "Hello"},
        prompt_cache_key="k",
        prompt_cache_retention="24h",
        n=1,
        logprobs=False,
        presence_penalty=0,
        response_format={"type": "text"},
        extra_body={"min_p": 0, "something_new": None, "prompt_cache_options": {"ttl": "30m"}},
    )
    assert core.turns[0].input.options == message_pb2.GenerationOptions()


async def test_an_unknown_key_is_an_authentication_error(adapter, core):
    async with openai.AsyncOpenAI(base_url=adapter.api, api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            await client.chat.completions.create(model="moltbot", messages=HELLO)
        assert caught.value.code == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()
        with pytest.raises(openai.AuthenticationError):
            await client.chat.completions.create(model="moltbot", messages=HELLO, stream=True)
    assert [metadata["authorization"] for _, metadata in core.calls] == ["Bearer wrong"] * 3
    assert core.turns == []


async def test_an_unknown_model_is_not_found(client, core):
    core.script.refusals = [Refusal(code=grpc.StatusCode.NOT_FOUND, reason="MODEL_NOT_FOUND", message="no model x")]
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="x", messages=HELLO)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert "no model x" in caught.value.message
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="no/such model", messages=HELLO)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("x")


async def test_a_full_queue_is_a_rate_limit_with_a_time_to_wait(client, core):
    core.script.refusals = [Refusal(code=grpc.StatusCode.RESOURCE_EXHAUSTED, reason="QUEUE_FULL", retry_s=2.5)]
    with pytest.raises(openai.RateLimitError) as caught:
        await client.chat.completions.create(model="moltbot", messages=HELLO)
    assert caught.value.code == "rate_limit_exceeded"
    assert caught.value.response.headers["retry-after"] == "3"
    assert caught.value.response.headers["retry-after-ms"] == "2500"
    assert caught.value.request_id.startswith("req_")


async def test_the_client_waits_as_told_and_succeeds(adapter, core):
    core.script.refusals = [Refusal(code=grpc.StatusCode.RESOURCE_EXHAUSTED, reason="QUEUE_FULL", retry_s=0.01)]
    async with openai.AsyncOpenAI(base_url=adapter.api, api_key=KEY, max_retries=1) as client:
        answer = await client.chat.completions.create(model="moltbot", messages=HELLO)
    assert answer.choices[0].message.content == "Hello, world!"


@pytest.mark.parametrize(
    ("code", "reason"),
    [(grpc.StatusCode.DATA_LOSS, "STORAGE_DAMAGED"), (grpc.StatusCode.ALREADY_EXISTS, "TURN_DELETED")],
)
async def test_the_client_does_not_repeat_what_cannot_succeed(adapter, core, code, reason):
    core.script.refusals = [Refusal(code=code, reason=reason)]
    async with openai.AsyncOpenAI(base_url=adapter.api, api_key=KEY, max_retries=2) as client:
        with pytest.raises(openai.APIStatusError) as caught:
            await client.chat.completions.create(model="moltbot", messages=HELLO)
    assert caught.value.code == reason.lower()
    assert len(core.names()) == 1


async def test_a_refused_field_is_named_as_the_client_knows_it(client, core):
    core.script.refusals = [
        Refusal(
            code=grpc.StatusCode.INVALID_ARGUMENT,
            reason="UNSUPPORTED_OPTION",
            message="no sampling",
            field="turn.options.temperature",
        ),
        Refusal(code=grpc.StatusCode.INVALID_ARGUMENT, reason="CONTEXT_LENGTH_EXCEEDED", field="turn.parts"),
    ]
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="moltbot", messages=HELLO, temperature=1)
    assert (caught.value.code, caught.value.param) == ("unsupported_value", "temperature")
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="moltbot", messages=HELLO)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


async def test_a_turn_that_fails_before_its_first_word_has_a_status(client, core):
    core.script.pieces = ()
    core.script.failed = chat_pb2.Failed(
        code=14, reason="MODEL_UNAVAILABLE", message="down", retryable=True, retry_delay=Duration(seconds=5)
    )
    with pytest.raises(openai.InternalServerError) as caught:
        await client.chat.completions.create(model="moltbot", messages=HELLO, stream=True)
    assert (caught.value.status_code, caught.value.code) == (503, "model_unavailable")
    assert caught.value.response.headers["retry-after"] == "5"


async def test_a_field_that_a_turn_fails_by_is_named_as_the_client_knows_it(client, core):
    core.script.pieces = ()
    core.script.failed = chat_pb2.Failed(
        code=3, reason="CONTEXT_LENGTH_EXCEEDED", message="turn.parts: takes 99 tokens", field="turn.parts"
    )
    with pytest.raises(openai.BadRequestError, match="messages: takes 99 tokens") as caught:
        await client.chat.completions.create(model="moltbot", messages=HELLO, stream=True)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


async def test_a_turn_that_fails_later_raises_in_the_stream(client, core):
    core.script.failed = chat_pb2.Failed(code=14, reason="MODEL_UNAVAILABLE", message="the model left")
    heard = []

    async def listen() -> None:
        async for chunk in await client.chat.completions.create(model="moltbot", messages=HELLO, stream=True):
            heard.append(chunk.choices[0].delta.content)

    with pytest.raises(openai.APIError, match="the model left") as caught:
        await listen()
    assert heard == ["", "Hello", ", ", "world", "!"]
    assert caught.value.code == "model_unavailable"


async def test_a_cancelled_turn_is_no_success(client, core):
    core.script.finish = message_pb2.FINISH_REASON_CANCELLED
    with pytest.raises(openai.ConflictError) as caught:
        await client.chat.completions.create(model="moltbot", messages=HELLO)
    assert caught.value.code == "turn_cancelled"
    with pytest.raises(openai.APIError, match="cancelled"):
        async for _ in await client.chat.completions.create(model="moltbot", messages=HELLO, stream=True):
            pass


async def test_a_reset_that_goes_on_from_what_is_shown_is_unseen(client, core):
    core.script.reset = chat_pb2.Reset(text="Hello, world! Again")
    stream = await client.chat.completions.create(model="moltbot", messages=HELLO, stream=True)
    assert "".join([c.choices[0].delta.content or "" async for c in stream]) == "Hello, world! Again"


async def test_a_reset_that_takes_blanks_and_thoughts_back_is_unseen(client, core):
    core.script.thoughts = ("Hm.",)
    core.script.pieces = ("\n", " ")
    core.script.reset = chat_pb2.Reset(text="")
    core.script.completion = chat_pb2.Completed(text="Good")
    stream = await client.chat.completions.create(model="moltbot", messages=HELLO, stream=True)
    assert "".join([c.choices[0].delta.content or "" async for c in stream]).strip() == "Good"


async def test_a_reset_that_takes_words_back_is_an_error(client, core):
    core.script.reset = chat_pb2.Reset(text="Good")
    with pytest.raises(openai.APIError) as caught:
        async for _ in await client.chat.completions.create(model="moltbot", messages=HELLO, stream=True):
            pass
    assert caught.value.code == "answer_replaced"


async def test_leaving_a_stream_cancels_the_turn(client, core):
    core.script.gate = asyncio.Event()
    stream = await client.chat.completions.create(model="moltbot", messages=HELLO, stream=True)
    await anext(stream)
    await stream.close()
    async with asyncio.timeout(1):
        await core.turns[0].cancelled.wait()


async def test_leaving_a_call_that_is_not_streamed_cancels_the_turn(client, core):
    core.script.gate = asyncio.Event()
    with pytest.raises(openai.APITimeoutError):
        await client.with_options(timeout=0.3).chat.completions.create(model="moltbot", messages=HELLO)
    async with asyncio.timeout(1):
        await core.turns[0].cancelled.wait()


async def test_a_named_request_outlives_its_connection_and_is_answered_once(client, core):
    core.script.gate = asyncio.Event()
    named = {"Idempotency-Key": "order-1"}
    with pytest.raises(openai.APITimeoutError):
        await client.with_options(timeout=0.3).chat.completions.create(
            model="moltbot", messages=HELLO, extra_headers=named
        )
    core.script.gate.set()
    answer = await client.chat.completions.create(model="moltbot", messages=HELLO, extra_headers=named)
    assert answer.choices[0].message.content == "Hello, world!"
    assert [turn.input.request_id for turn in core.turns] == ["order-1"]
    again = await client.chat.completions.create(model="moltbot", messages=HELLO, extra_headers=named)
    stream = await client.chat.completions.create(model="moltbot", messages=HELLO, extra_headers=named, stream=True)
    assert {answer.id, again.id, *[chunk.id async for chunk in stream]} == {answer.id}
    other = await client.chat.completions.create(model="moltbot", messages=HELLO)
    assert other.id != answer.id


async def test_models_that_can_answer_are_listed(client):
    listed = (await client.models.list()).data
    assert [(model.id, model.object, model.owned_by, model.created) for model in listed] == [
        ("demo", "model", "moltbot", 1_700_000_000)
    ]
    assert (await client.models.retrieve("demo")).id == "demo"
    assert (await client.models.retrieve("moltbot")).id == "moltbot"


async def test_a_time_limit_reaches_the_core(client, core):
    await client.chat.completions.create(
        model="moltbot", messages=HELLO, stream=True, extra_headers={"X-Request-Timeout": "2.5"}
    )
    assert 2.0 < core.deadlines[0] <= 2.6  # what gRPC tells of a deadline is rounded up
