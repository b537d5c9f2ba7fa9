"""The adapter in front of the real core, with a scripted model."""

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import openai
import pytest
from moltbot_adapters.http.settings import Settings
from moltbot_server.testing import RunningServer, running_server
from running_adapter import Adapter, RunningAdapter
from sse_reader import all_frames, frames


@pytest.fixture
async def server(tmp_path) -> AsyncIterator[RunningServer]:
    async with running_server(tmp_path / "workspace", grace=0.2) as server:
        yield server


@pytest.fixture
async def adapter(server, tmp_path) -> AsyncIterator[Adapter]:
    key_file = tmp_path / "key"
    key_file.write_text(server.key)
    settings = Settings(
        host="127.0.0.1", port=0, core=server.address, key_file=key_file, state=tmp_path / "state", drain_s=1.0
    )
    async with RunningAdapter(settings) as adapter:
        yield adapter


@pytest.fixture
async def client(adapter, server) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=adapter.api, api_key=server.key, max_retries=0) as client:
        yield client


@pytest.fixture
async def browser(adapter, server) -> AsyncIterator[aiohttp.ClientSession]:
    headers = {"X-MoltBot": "1", "Origin": adapter.url}
    async with aiohttp.ClientSession(
        adapter.url, headers=headers, cookie_jar=aiohttp.CookieJar(unsafe=True)
    ) as session:
        async with session.post("/api/login", json={"key": server.key}) as answer:
            assert answer.status == 204
        yield session


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


async def test_it_answers_whole_and_streamed(client):
    whole = await client.chat.completions.create(model="moltbot", messages=_user("hello there"))
    assert whole.choices[0].message.content == "You said: hello there"
    assert whole.usage.completion_tokens > 0
    stream = await client.chat.completions.create(
        model="moltbot", messages=_user("hello there"), stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "You said: hello there"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.total_tokens > 0
    assert whole.model == chunks[0].model


async def test_models_are_those_of_the_core(client):
    listed = (await client.models.list()).data
    assert listed
    assert (await client.models.retrieve(listed[0].id)).id == listed[0].id
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="gpt-none", messages=_user("hi"))
    assert caught.value.code == "model_not_found"


async def test_its_refusals_reach_the_client_as_its_own_errors(client, adapter):
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="moltbot", messages=_user("   "))
    assert caught.value.code == "empty_message"
    async with openai.AsyncOpenAI(base_url=adapter.api, api_key="mb_wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError):
            await stranger.chat.completions.create(model="moltbot", messages=_user("hi"))
    with pytest.raises(openai.InternalServerError) as caught:
        await client.chat.completions.create(model="moltbot", messages=_user("#5 fail=0"), stream=True)
    assert caught.value.code == "model_unavailable"
    with pytest.raises(openai.APIError) as caught:
        await _all(await client.chat.completions.create(model="moltbot", messages=_user("#5 fail=3"), stream=True))
    assert caught.value.code == "model_unavailable"


async def _all(stream) -> list:
    return [chunk async for chunk in stream]


async def test_a_closed_transcript_leaves_no_chat_behind_and_a_session_header_remembers(client, browser):
    await client.chat.completions.create(model="moltbot", messages=_user("one"))
    for text in ("two", "three"):
        await client.chat.completions.create(
            model="moltbot", messages=_user(text), extra_headers={"X-Session-Id": "memory"}
        )
    async with browser.get("/api/sessions/memory/messages") as answer:
        said = [message["text"] for message in (await answer.json())["messages"]]
    assert said == ["two", "You said: two", "three", "You said: three"]
    async with browser.get("/api/sessions") as answer:
        assert (await answer.json())["sessions"] == []  # none of them began in the web chat


async def test_a_chat_in_the_browser_is_listed_resumed_and_deleted(browser):
    say = {"session": "", "text": "#20 pace=0.02", "request_id": "r-1", "model": ""}
    async with browser.post("/api/turns", json=say) as answer:
        seen = []
        async for frame in frames(answer):
            seen.append(frame)
            if frame.event == "text_delta":
                break
    session, turn = seen[0].data["session"], seen[0].data["turn"]
    async with browser.get("/api/sessions") as answer:
        listed = (await answer.json())["sessions"]
    assert [(chat["id"], chat["active_turn"]["id"]) for chat in listed] == [(session, turn)]
    async with browser.get(f"/api/sessions/{session}/turns/{turn}/events?after={seen[-1].id}") as answer:
        seen += await all_frames(answer)
    numbers = [frame.id for frame in seen]
    assert numbers == sorted(set(numbers))
    text = "".join(frame.data["text"] for frame in seen if frame.event == "text_delta")
    assert seen[-1].event == "completed"
    assert seen[-1].data["text"] == text
    async with browser.get(f"/api/sessions/{session}/messages") as answer:
        roles = [(message["role"], message["text"]) for message in (await answer.json())["messages"]]
    assert roles == [("user", "#20 pace=0.02"), ("assistant", text)]
    async with browser.delete(f"/api/sessions/{session}") as answer:
        assert answer.status == 204
    async with browser.get(f"/api/sessions/{session}/messages") as answer:
        assert answer.status == 404


async def test_a_start_that_is_repeated_with_the_last_number_brings_only_what_came_after_it(browser):
    say = {"session": "", "text": "#20 pace=0.02", "request_id": "r-1", "model": ""}
    text, last, ended = "", 0, False
    while not ended:
        async with browser.post("/api/turns", json=say, headers={"Last-Event-ID": str(last)}) as answer:
            async for frame in frames(answer):
                assert frame.id > last
                last, ended = frame.id, frame.event == "completed"
                text += frame.data["text"] if frame.event == "text_delta" else ""
                if frame.event == "text_delta" and len(text) % 3 == 0:
                    break  # and come back: text that waited is told as one event, under its last number
    assert text == frame.data["text"]


async def test_a_stopped_turn_keeps_what_was_said(browser):
    say = {"session": "", "text": "#500 pace=0.02", "request_id": "r-1", "model": ""}
    async with browser.post("/api/turns", json=say) as answer:
        stream = frames(answer)
        first = await anext(stream)
        async for frame in stream:
            if frame.event == "text_delta":
                break
        path = f"/api/sessions/{first.data['session']}/turns/{first.data['turn']}/cancel"
        async with browser.post(path) as stopped:
            assert await stopped.json() == {"cancelled": True}
        last = [frame async for frame in stream][-1]
    assert last.data["finish_reason"] == "cancelled"
    assert last.data["text"]


async def test_leaving_a_stream_frees_its_session(client):
    memory = {"X-Session-Id": "memory"}
    long = client.chat.completions.create(
        model="moltbot", messages=_user("#5000 pace=0.01"), stream=True, extra_headers=memory
    )
    stream = await long
    await anext(stream)
    await stream.close()
    async with asyncio.timeout(5):  # the session's turns come one after the other, and the first had 50 s to go
        answer = await client.chat.completions.create(model="moltbot", messages=_user("next"), extra_headers=memory)
    assert answer.choices[0].message.content == "You said: next"


async def test_health_and_the_page_come_with_it(adapter, browser):
    async with browser.get("/health") as answer:
        assert (answer.status, (await answer.json())["core"]) == (200, {"status": "SERVING"})
    async with browser.get("/api/me") as answer:
        assert (await answer.json())["default_model"]["id"]
