"""The mock provider: what the official clients read from it, what its faults do to the bytes, and who controls it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import openai
import pytest
from moltbot_server.testing_provider import MockProvider, Script, ScriptError
from moltbot_server.testing_provider.calls import Draw
from moltbot_server.testing_provider.server import loopback

ASK: dict[str, Any] = {"model": "any", "messages": [{"role": "user", "content": "Say it"}]}
WORDS = "eins zwei drei"
SHORT = {"text": WORDS}


@pytest.fixture
async def provider() -> AsyncIterator[MockProvider]:
    """A provider that says three words."""
    async with MockProvider(Script.read(SHORT)).running() as running:
        yield running


@pytest.fixture
async def client(provider: MockProvider) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official OpenAI client, which does not try again."""
    url = f"{provider.address}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="a-good-key", max_retries=0) as made:
        yield made


def follow(provider: MockProvider, *faults: dict[str, Any], **fields: Any) -> None:
    provider.follow(Script.read({**SHORT, "faults": list(faults), **fields}))


async def opened(
    provider: MockProvider, *, stream: bool = True, key: str = "k"
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Ask for a chat completion by hand."""
    body = json.dumps({**ASK, "stream": stream})
    reader, writer = await asyncio.open_connection("127.0.0.1", int(provider.address.rpartition(":")[2]))
    head = f"Host: x\r\nAuthorization: Bearer {key}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    writer.write(f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n{body}".encode())
    return reader, writer


async def raw(provider: MockProvider, *, stream: bool = True) -> tuple[bytes, list[bytes], bool]:
    """Return the head of an answer, its HTTP chunks, and whether the answer was ended and not cut."""
    reader, writer = await opened(provider, stream=stream)
    head, _, rest = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    chunks = []
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        if int(size, 16) == 0:
            return head, chunks, True
        chunks.append(rest[: int(size, 16)])
        rest = rest[int(size, 16) + 2 :]
    return head, chunks, False


async def texts(client: openai.AsyncOpenAI) -> list[str]:
    """Return the words of a stream as they come."""
    stream = await client.chat.completions.create(**ASK, stream=True)
    return [part.choices[0].delta.content async for part in stream if part.choices and part.choices[0].delta.content]


async def test_an_answer_comes_whole_and_in_words(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(**ASK)

    assert answer.choices[0].message.content == WORDS
    assert answer.choices[0].finish_reason == "stop"
    assert await texts(client) == ["eins", " zwei", " drei"]


async def test_usage_comes_last_in_a_stream_that_asks_for_it(
    provider: MockProvider, client: openai.AsyncOpenAI
) -> None:
    follow(provider, usage={"input": 7, "output": 9})

    stream = await client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True})
    parts = [part async for part in stream]

    assert parts[-1].choices == []
    assert parts[-1].usage is not None
    assert (parts[-1].usage.prompt_tokens, parts[-1].usage.total_tokens) == (7, 16)
    assert [part.usage for part in parts[:-1]] == [None] * (len(parts) - 1)


async def test_tools_are_called_and_thoughts_are_told(provider: MockProvider, client: openai.AsyncOpenAI) -> None:
    call = {"name": "weather", "arguments": {"city": "Zürich"}}
    provider.follow(Script.read({"tool_calls": [call], "reasoning": "hm hm"}))

    whole = (await client.chat.completions.create(**ASK)).choices[0]
    stream = await client.chat.completions.create(**ASK, stream=True)
    parts = [part.choices[0] async for part in stream]

    assert whole.finish_reason == parts[-1].finish_reason == "tool_calls"
    assert whole.message.tool_calls is not None
    function = whole.message.tool_calls[0].to_dict()["function"]
    assert function == {"name": "weather", "arguments": '{"city": "Zürich"}'}
    streamed = [each for part in parts for each in part.delta.tool_calls or ()]
    assert "".join(each.function.arguments or "" for each in streamed if each.function) == '{"city": "Zürich"}'
    assert whole.message.to_dict()["reasoning_content"] == "hm hm"
    assert "".join(str(part.delta.to_dict().get("reasoning_content", "")) for part in parts) == "hm hm"


async def test_an_echo_says_what_was_asked_in_so_many_chunks_at_its_pace(
    provider: MockProvider, client: openai.AsyncOpenAI
) -> None:
    provider.follow(Script.read({"echo": True, "chunks": 3, "pace": "1ms"}))

    assert await texts(client) == ["Sa", "y ", "it"]


async def test_the_models_are_listed(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["mock-model"]


async def test_only_named_keys_open_and_a_spent_one_is_told(provider: MockProvider, client: openai.AsyncOpenAI) -> None:
    follow(provider, keys=["one-key-1111", "two-key-2222"], out_of_quota=["two-key-2222"])

    with pytest.raises(openai.AuthenticationError) as wrong:
        await client.chat.completions.create(**ASK)
    with pytest.raises(openai.RateLimitError) as spent:
        await client.with_options(api_key="two-key-2222").chat.completions.create(**ASK)
    await client.with_options(api_key="one-key-1111").chat.completions.create(**ASK)

    message = "Incorrect API key provided."
    told = {"message": message, "type": "invalid_request_error", "param": None, "code": "invalid_api_key"}
    assert wrong.value.body == told
    assert spent.value.code == "insufficient_quota"
    calls = provider.calls.shown()
    assert calls["outcomes"] == {"wrong_key": 1, "out_of_quota": 1, "answered": 1}
    assert [call["key"] for call in calls["calls"]] == ["-key", "2222", "1111"]


async def test_a_request_without_messages_is_refused_by_name(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(model="any", messages=[])

    assert refused.value.param == "messages"


@pytest.mark.parametrize("status", [500, 502, 503, 529])
async def test_an_error_has_its_status(provider: MockProvider, client: openai.AsyncOpenAI, status: int) -> None:
    follow(provider, {"kind": "error", "status": status})

    with pytest.raises(openai.InternalServerError) as failed:
        await client.chat.completions.create(**ASK)

    assert failed.value.status_code == status
    assert isinstance(failed.value.body, dict)
    assert failed.value.body.keys() == {"message", "type", "param", "code"}


async def test_a_rate_limit_says_when_to_come_again_and_ends_after_its_calls(
    provider: MockProvider, client: openai.AsyncOpenAI
) -> None:
    follow(provider, {"kind": "rate_limit", "retry_after": "1500ms", "until": "1 call"})

    with pytest.raises(openai.RateLimitError) as limited:
        await client.chat.completions.create(**ASK)

    assert limited.value.response.headers["Retry-After"] == "2"
    assert await texts(client) == ["eins", " zwei", " drei"]


async def test_a_good_key_can_be_refused(provider: MockProvider, client: openai.AsyncOpenAI) -> None:
    follow(provider, {"kind": "unauthorized", "every": 2})

    await client.chat.completions.create(**ASK)
    with pytest.raises(openai.AuthenticationError):
        await client.chat.completions.create(**ASK)


async def test_a_key_can_lack_a_permission(provider: MockProvider, client: openai.AsyncOpenAI) -> None:
    follow(provider, {"kind": "unauthorized", "status": 403})

    with pytest.raises(openai.PermissionDeniedError):
        await client.chat.completions.create(**ASK)


async def test_an_endless_answer_goes_on_until_its_reader_leaves(
    provider: MockProvider, client: openai.AsyncOpenAI
) -> None:
    follow(provider, {"kind": "endless"})

    heard = []
    async with await client.chat.completions.create(**ASK, stream=True) as stream:
        async for chunk in stream:
            heard.append(chunk.choices[0].delta.content or "")
            if len(heard) > 100:
                break

    assert "".join(heard).startswith(WORDS + WORDS)


async def test_a_huge_piece_is_as_large_as_told(provider: MockProvider, client: openai.AsyncOpenAI) -> None:
    follow(provider, {"kind": "huge", "size": "2MiB"})

    heard = await texts(client)

    assert [len(piece) for piece in heard] == [2 << 20, 4, 5, 5]


@pytest.mark.parametrize("path", ["/openai/v1/chat/completions", "/openai/deployments/my-gpt/chat/completions"])
async def test_providers_with_a_path_and_a_header_of_their_own_are_stood_in_for(
    provider: MockProvider, path: str
) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{provider.address}{path}", json=ASK, headers={"api-key": "k"}) as response,
    ):
        assert (await response.json())["choices"][0]["message"]["content"] == WORDS


async def test_an_empty_answer_is_no_error(provider: MockProvider, client: openai.AsyncOpenAI) -> None:
    follow(provider, {"kind": "empty"})

    assert (await client.chat.completions.create(**ASK)).choices[0].message.content == ""
    assert await texts(client) == []


@pytest.mark.parametrize("stream", [True, False])
async def test_a_page_of_html_may_come_instead(provider: MockProvider, stream: bool) -> None:
    follow(provider, {"kind": "wrong_content_type"})
    reader, writer = await opened(provider, stream=stream)

    answer = await reader.read()
    writer.close()

    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"Content-Type: text/html" in answer
    assert b"<!doctype html>" in answer


@pytest.mark.parametrize(("after", "words"), [(0, 0), (2, 2), (99, 3)])
async def test_a_cut_stream_has_so_many_words_and_no_end(provider: MockProvider, after: int, words: int) -> None:
    follow(provider, {"kind": "cut", "after": after})

    head, chunks, ended = await raw(provider)

    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"".join(chunks).count(b"data: ") == 1 + words
    assert not ended


async def test_a_cut_answer_that_does_not_stream_stops_in_its_middle(provider: MockProvider) -> None:
    follow(provider, {"kind": "cut", "after": 1})

    _, chunks, ended = await raw(provider, stream=False)

    assert not ended
    with pytest.raises(ValueError, match=r"Unterminated|Expecting"):
        json.loads(b"".join(chunks))


async def test_a_stream_can_hold_a_line_that_is_no_json(provider: MockProvider) -> None:
    follow(provider, {"kind": "broken_sse"})

    _, chunks, ended = await raw(provider)
    lines = b"".join(chunks).decode().split("\n\n")

    assert ended
    assert lines[2] == 'data: {"id": oops'
    assert lines[-2] == "data: [DONE]"


async def test_a_stream_can_end_in_the_middle_of_a_line_or_without_its_last_word(provider: MockProvider) -> None:
    follow(provider, {"kind": "broken_sse", "how": "truncated", "until": 1})
    _, truncated, ended = await raw(provider)
    assert ended
    assert not b"".join(truncated).endswith(b"\n")

    follow(provider, {"kind": "broken_sse", "how": "no_done"})
    _, without, ended = await raw(provider)
    assert ended
    assert b'"finish_reason":"stop"' in b"".join(without)
    assert b"[DONE]" not in b"".join(without)


async def test_characters_come_in_parts_and_are_right_together(
    provider: MockProvider, client: openai.AsyncOpenAI
) -> None:
    follow(provider, {"kind": "split_utf8"}, text="é 你好 🙂")

    _, chunks, ended = await raw(provider)

    assert ended
    assert sum("\ufffd" in chunk.decode(errors="replace") for chunk in chunks) >= 4
    assert "你好" in b"".join(chunks).decode()
    assert await texts(client) == ["é", " 你好", " 🙂"]


async def test_a_call_that_hangs_is_counted_and_leaves_others_alone() -> None:
    provider = MockProvider(Script.read({**SHORT, "faults": ["hang until=1"]}))
    async with provider.running(), aiohttp.ClientSession(provider.address) as session:
        reader, writer = await opened(provider)
        while not provider.calls.shown()["total"]:
            async with session.get("/control/calls") as answer:
                await answer.read()
        _, chunks, ended = await raw(provider)
    try:
        answered = await reader.read()
    except ConnectionResetError:
        answered = b""
    writer.close()

    assert ended
    assert b"drei" in b"".join(chunks)
    assert answered == b""
    assert provider.calls.shown()["outcomes"] == {"hang": 1, "answered": 1}


async def test_a_stream_can_stop_after_its_first_word_and_is_cut_with_the_provider() -> None:
    provider = MockProvider(Script.read({**SHORT, "faults": ["hang_after_first"]}))
    async with provider.running():
        reader, writer = await opened(provider)
        first = await reader.readuntil(b'"content":"eins"')
    rest = await reader.read()
    writer.close()

    assert b"zwei" not in first + rest
    assert not rest.endswith(b"0\r\n\r\n")


async def test_the_first_word_waits_while_the_head_of_the_stream_does_not(provider: MockProvider) -> None:
    follow(provider, {"kind": "slow", "by": "1h"}, first_token="1h")

    reader, writer = await opened(provider)
    begun = await reader.readuntil(b'"role":"assistant","content":""')

    assert b"text/event-stream" in begun
    assert provider.calls.shown()["outcomes"] == {"slow": 1}
    writer.close()


def test_the_same_seed_gives_the_same_lots_and_shares_are_kept() -> None:
    script = {"faults": ["error share=10%", "hang share=0.2"], "first_token": "1s-2s"}

    def lots(**fields: Any) -> list[tuple[str, float]]:
        draw = Draw(Script.read({**script, **fields}))
        drawn = [draw.next() for _ in range(4000)]
        return [(lot.fault.kind if lot.fault else "", lot.wait) for lot in drawn]

    kinds = [kind for kind, _ in lots(seed=7)]
    assert lots(seed=7) == lots(seed=7) != lots(seed=8)
    assert [kind for kind, _ in lots(seed=7, first_token=0)] == kinds
    assert 300 < kinds.count("error") < 500
    assert 650 < kinds.count("hang") < 950
    assert all(1 <= wait <= 2 for _, wait in lots())


def test_a_fault_can_last_some_seconds() -> None:
    now = [100.0]
    draw = Draw(Script.read({"faults": ["error until=30s"]}), lambda: now[0])

    begun = draw.next().fault
    now[0] += 30

    assert begun is not None
    assert draw.next().fault is None


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ({"pase": 1}, "there is no 'pase'"),
        ({"pace": "soon"}, "pace: must be a duration"),
        ({"first_token": "2s-1s"}, "first_token: the range ends"),
        ({"faults": ["explode"]}, r"faults\[0\].kind: must be one of error"),
        ({"faults": ["error status=418"]}, r"faults\[0\].status: must be one of 500"),
        ({"faults": [{"kind": "hang", "share": 0.1, "every": 2}]}, "share and every do not go together"),
        ({"faults": [{"kind": "hang", "after": 1}]}, "there is no 'after'"),
        ({"faults": ["hang share=0.6", "empty share=60%"]}, "add up to 1.2"),
        ({"text": "a", "echo": True}, "text: an answer that echoes"),
        ([], "the script: must be a mapping"),
    ],
)
def test_a_script_that_cannot_be_followed_says_why(written: object, told: str) -> None:
    with pytest.raises(ScriptError, match=told):
        Script.read(written)


def test_a_script_reads_what_it_shows() -> None:
    script = Script.read(
        {
            "text": " a b ",
            "reasoning": "c",
            "tool_calls": [{"name": "t", "arguments": {"x": [1]}}],
            "use_tools": True,
            "chunks": 4,
            "first_token": ["200ms", 2],
            "pace": "20ms",
            "usage": {"input": 3, "output": 2, "cached": 1},
            "faults": ["error status=503 share=5%", "cut after=2 every=3", "slow by=2m until=9 calls", "hang until=1m"],
            "keys": ["k"],
            "out_of_quota": ["q"],
            "seed": 3,
        }
    )

    assert Script.read(json.loads(json.dumps(script.shown()))) == script
    assert script.first_token == (0.2, 2.0)
    assert [fault.status for fault in script.faults][:1] == [503]


async def test_a_script_is_changed_and_calls_are_read_and_forgotten_while_it_runs(
    provider: MockProvider, client: openai.AsyncOpenAI
) -> None:
    async with aiohttp.ClientSession(provider.address) as session:
        async with session.put(
            "/control/script", json={"text": "neu", "faults": [{"kind": "empty", "every": 2}]}
        ) as put:
            assert put.status == 200
        said = [await texts(client), await texts(client)]
        async with session.put("/control/script", json={"pace": "soon"}) as wrong:
            refused = wrong.status, (await wrong.json())["error"]["param"]
        async with session.get("/control/script") as kept:
            text = (await kept.json())["text"]
        async with session.get("/control/calls") as answer:
            told = await answer.json()
        async with session.delete("/control/calls") as cleared:
            assert cleared.status == 204

    assert said == [["neu"], []]
    assert refused == (400, "pace")
    assert text == "neu"
    assert (told["total"], told["outcomes"]) == (2, {"answered": 1, "empty": 1})
    assert [(call["model"], call["key"]) for call in told["calls"]] == [("any", "-key")] * 2
    assert provider.calls.shown() == {"total": 0, "outcomes": {}, "calls": []}


def test_it_listens_on_the_loopback_alone() -> None:
    assert [loopback(host) for host in ("localhost", "127.0.0.2", "::1")] == ["127.0.0.1", "127.0.0.2", "::1"]
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(ValueError, match="loopback alone"):
            loopback(host)
